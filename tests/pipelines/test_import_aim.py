"""`vcache import-head aim`: official files become runs with the tower in the file, evaluated on stored pixels."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vcache.heads.aim import AIM
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.checkpoint_file import CheckpointError
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.import_aim import extract_line
from vcache.pipelines.imported_runs import notes_on_store
from vcache.pipelines.importing import ImportConfig, import_head
from vcache.pipelines.matching import HeadStoreMismatch, pixel_statistics
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.settings import SettingError
from vcache.pipelines.tail_file import TAIL
from vcache.store.groups import write_manifest
from vcache.store.key import cache_key
from vcache.store.reader import FeatureStore

GOLDENS = Path(__file__).parents[1] / "goldens"
Vcache = Callable[[str], tuple[int, str, str]]
WIDTH, LAYERS, FRAMES, HIDDEN, PATCH, HEADS = 20, 2, 5, 7, 8, 4
"""Another width than the backbone's of the store has; its frames are of 32 pixels."""


def official_state(num_classes: int, patch: int = PATCH) -> dict[str, Tensor]:
    """A file's weights with two adapters in time, none of them zero."""
    linear = {
        "D_fc1.weight": (HIDDEN, WIDTH),
        "D_fc1.bias": (HIDDEN,),
        "D_fc2.weight": (WIDTH, HIDDEN),
        "D_fc2.bias": (WIDTH,),
    }
    block = {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,)}
    block |= {"attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,)}
    block |= {"mlp.c_fc.weight": (4 * WIDTH, WIDTH), "mlp.c_fc.bias": (4 * WIDTH,)}
    block |= {"mlp.c_proj.weight": (WIDTH, 4 * WIDTH), "mlp.c_proj.bias": (WIDTH,)}
    norms = {f"{name}.{part}": (WIDTH,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
    adapters = ("T_Adapter", "T_Adapter_in", "S_Adapter", "MLP_Adapter")
    block |= norms | {f"{name}.{part}": shape for name in adapters for part, shape in linear.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.class_embedding": (WIDTH,),
        "backbone.positional_embedding": (1 + (32 // patch) ** 2, WIDTH),
        "backbone.temporal_embedding": (1, FRAMES, WIDTH),
        "backbone.conv1.weight": (WIDTH, 3, patch, patch),
        **{f"backbone.{name}.{part}": (WIDTH,) for name in ("ln_pre", "ln_post") for part in ("weight", "bias")},
        **{f"backbone.transformer.resblocks.{i}.{n}": shape for i in range(LAYERS) for n, shape in block.items()},
        "cls_head.fc_cls.weight": (num_classes, WIDTH),
        "cls_head.fc_cls.bias": (num_classes,),
    }
    generator = torch.Generator().manual_seed(6)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def official_logits(state: dict[str, Tensor], images: Tensor, scale: float) -> Tensor:
    """The paper's equations in the official order of axes; images (B, T, 3, height, width) are normalised."""
    B = len(images)
    at = {name.removeprefix("backbone."): x for name, x in state.items()}
    patches = F.conv2d(images.flatten(0, 1), at["conv1.weight"], stride=at["conv1.weight"].shape[-1]).flatten(2).mT
    x = torch.cat([at["class_embedding"].expand(len(patches), 1, -1), patches], dim=1) + at["positional_embedding"]
    x = rearrange(x, "(b t) n d -> b n t d", b=B) + at["temporal_embedding"]
    x = F.layer_norm(rearrange(x, "b n t d -> n (b t) d"), (WIDTH,), at["ln_pre.weight"], at["ln_pre.bias"])
    for i in range(LAYERS):
        prefix = f"transformer.resblocks.{i}."
        x = official_block({n.removeprefix(prefix): w for n, w in at.items() if n.startswith(prefix)}, x, scale)
    x = F.layer_norm(x, (WIDTH,), at["ln_post.weight"], at["ln_post.bias"])[0]
    mean = rearrange(x, "(b t) d -> b t d", b=B).mean(dim=1)
    return F.linear(mean, at["cls_head.fc_cls.weight"], at["cls_head.fc_cls.bias"])


def official_block(w: dict[str, Tensor], x: Tensor, scale: float) -> Tensor:
    def norm(name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def adapter(name: str, h: Tensor) -> Tensor:
        return linear(f"{name}.D_fc2", F.gelu(linear(f"{name}.D_fc1", h)))

    def attend(h: Tensor) -> Tensor:
        projections = (w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0)
        out = (w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        return F.multi_head_attention_forward(h, h, h, WIDTH, HEADS, *projections, *out, need_weights=False)[0]

    n = len(x)
    h = norm("ln_1", rearrange(x, "n (b t) d -> t (b n) d", t=FRAMES))
    h = adapter("T_Adapter", attend(h + adapter("T_Adapter_in", h)))
    x = x + rearrange(h, "t (b n) d -> n (b t) d", n=n)
    h = attend(norm("ln_1", x))
    x = x + h + adapter("S_Adapter", h)
    h = norm("ln_2", x)
    hidden = linear("mlp.c_fc", h)
    return x + linear("mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden)) + scale * adapter("MLP_Adapter", h)


def save_official(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"meta": {"epoch": 30, "config": "model = dict()"}, "state_dict": state, "optimizer": {}}, path)
    return path


def imported(path: Path, out: Path, **settings: str) -> Run:
    settings = {"num_heads": str(HEADS), **settings}
    return Run.open(Path(import_head(ImportConfig(head="aim", file=path, settings=settings, out=out)).run))


@pytest.fixture(scope="module")
def store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedding, which nothing here reads, and the pixels of each frame."""
    path = tmp_path_factory.mktemp("aim") / "aim.zarr"
    run_extraction(tiny_extraction(store=path, layers="none", cross_frame="none", pixels=5))
    return path


@pytest.fixture(scope="module")
def num_classes(store: Path) -> int:
    with FeatureStore.open(store) as opened:
        return len(opened.manifest.class_names)


@pytest.mark.parametrize("scale", ["0.5", "1"])
def test_logits_of_a_run_on_stored_pixels_are_the_official_ones(
    store: Path, num_classes: int, tmp_path: Path, scale: str
) -> None:
    state = official_state(num_classes)
    run = imported(save_official(tmp_path / "file.pth", state), tmp_path / "run", adapter_scale=scale)
    notes: list[str] = []
    found = evaluate(run.path, store=store, device="cpu", on_note=notes.append)
    with FeatureStore.open(store) as opened:
        split = found.predictions.split
        names = list(opened.videos(split).ids)
        rows = np.array([names.index(name) for name in found.predictions.video_ids or ()])
        pixels = torch.tensor(opened.read(split, "pixels", rows))
        statistics = pixel_statistics(opened.manifest)
    mean, std = torch.tensor([122.769, 116.74, 104.04]), torch.tensor([68.493, 66.63, 70.321])  # as configured
    images = ((pixels - mean) / std).permute(0, 1, 4, 2, 3)
    expected = official_logits(state, images, float(scale))
    torch.testing.assert_close(torch.from_numpy(found.predictions.scores), expected, rtol=1e-4, atol=1e-5)
    # The store's own normalisation, weights and precision are not CLIP's, and count for nothing.
    assert not torch.allclose(torch.tensor(statistics["pixel_mean"]), mean / 255, atol=0.01)
    assert len(notes) == 1 and "came without class names" in notes[0]


def test_frames_that_were_made_square_are_told(store: Path, num_classes: int, tmp_path: Path) -> None:
    run = imported(save_official(tmp_path / "file.pth", official_state(num_classes)), tmp_path / "run")
    shutil.copytree(store, tmp_path / "squashed.zarr")
    with FeatureStore.open(store) as opened:
        spec = opened.manifest.spec
        squashed = {**spec, "preprocessing": {**spec["preprocessing"], "resize_mode": "squash"}}
        write_manifest(tmp_path / "squashed.zarr", replace(opened.manifest, spec=squashed, key=cache_key(squashed)))
        assert len(notes_on_store(run, opened)) == 1
    with FeatureStore.open(tmp_path / "squashed.zarr") as opened:
        (told, _) = notes_on_store(run, opened)
    assert told.startswith("squashed.zarr has whole frames made square, ")


def test_what_no_weight_tells_is_said_unless_it_was_set(tmp_path: Path) -> None:
    file = save_official(tmp_path / "file.pth", official_state(174))
    taken = import_head(ImportConfig(head="aim", file=file, settings={"num_heads": "4"}, out=tmp_path / "taken"))
    both = {"num_heads": "4", "adapter_scale": "1"}
    told = import_head(ImportConfig(head="aim", file=file, settings=both, out=tmp_path / "told"))
    assert set(taken.notes) - set(told.notes) == {taken.notes[0]} and "0.5, as of all published files" in taken.notes[0]
    assert any("174 classes are taken for those of ssv2" in note for note in told.notes)
    (tmp_path / "told" / TAIL).unlink()
    with pytest.raises(
        RunError, match=r"tail.safetensors from a copy; or import the checkpoint again, into another --out"
    ):
        Run.open(tmp_path / "told").load_head()


def test_an_imported_golden_gives_the_official_logits(
    tmp_path: Path, vcache: Vcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(GOLDENS / "aim_end2end.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    path = save_official(tmp_path / "file.pth", {key[2:]: x for key, x in golden.items() if key.startswith("w/")})
    status, _, said = vcache(f"import-head aim {path} --set num_heads=4 --out {tmp_path / 'run'}")
    assert status == 0, said
    head = Run.open(tmp_path / "run").load_head()
    video = golden["in/video"].permute(0, 2, 3, 4, 1)
    monkeypatch.setattr("vcache.heads.aim.normalised", lambda *_: video)  # it is already
    with torch.inference_mode():
        logits = head(ClipFeatures(pixels=torch.zeros(video.shape, dtype=torch.uint8)))
    torch.testing.assert_close(logits, golden["out/logits"], rtol=1e-5, atol=2e-5)


def test_a_store_of_other_frames_classes_or_patches_is_refused(store: Path, num_classes: int, tmp_path: Path) -> None:
    state = official_state(num_classes)
    other_frames = {**state, "backbone.temporal_embedding": torch.zeros(1, 3, WIDTH)}
    run = imported(save_official(tmp_path / "1.pth", other_frames), tmp_path / "frames")
    with pytest.raises(HeadStoreMismatch, match="reads clips of 3 frames; aim.zarr holds clips of 5"):
        evaluate(run.path, store=store, device="cpu")
    run = imported(save_official(tmp_path / "2.pth", official_state(num_classes + 1)), tmp_path / "classes")
    with pytest.raises(RunError, match=f"has {num_classes + 1} classes; "):
        evaluate(run.path, store=store, device="cpu")
    smaller = {**state, "backbone.conv1.weight": torch.zeros(WIDTH, 3, 4, 4)}
    run = imported(save_official(tmp_path / "3.pth", smaller), tmp_path / "patches")
    with pytest.raises(RunError, match=r"reads frames of 4x4 patches of 4 pixels; .* holds frames of 32 x 32"):
        evaluate(run.path, store=store, device="cpu")


def test_a_store_without_pixels_is_refused(
    config: Callable[..., ExtractionConfig], num_classes: int, tmp_path: Path
) -> None:
    run_extraction(config(cross_frame="none"))
    run = imported(save_official(tmp_path / "file.pth", official_state(num_classes)), tmp_path / "run")
    with pytest.raises(HeadStoreMismatch, match=r"head 'aim' reads pixels; (.|\n)* --pixels 5"):
        evaluate(run.path, store=tmp_path / "store.zarr", device="cpu")


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    state = official_state(3)
    path = save_official(tmp_path / "file.pth", state)
    with pytest.raises(SettingError, match=r"num_heads \(3\) must divide the width \(20\)"):
        imported(path, tmp_path / "run", num_heads="3")
    with pytest.raises(
        CheckpointError, match="is not an AIM checkpoint that fits: num_frames is set to 8, and its weights say 5"
    ):
        imported(path, tmp_path / "run", num_frames="8")
    with pytest.raises(CheckpointError, match="it is a checkpoint of DiST"):
        imported(save_official(tmp_path / "dist.pth", {"dist_net.x": torch.zeros(2)}), tmp_path / "run")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dist.pth", "file.pth"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"num_classes": 400, "num_frames": 32},
            "k400 --split val --model ViT-B-16-quickgelu --layers none --frames 32 --stride 4 --pixels 32 --eval-views 3x1",
        ),
        (
            {"num_classes": 400, "num_frames": 16},
            "k400 --split val --model ViT-B-16-quickgelu --layers none --frames 16 --stride 8 --pixels 16 --eval-views 3x1",
        ),
        (
            {"num_classes": 48, "num_frames": 32},
            "diving48 --split test --model ViT-B-16-quickgelu --layers none --frames 32 --tsn --pixels 32 --eval-views 1x1",
        ),
        (
            {"num_classes": 700, "num_frames": 8, "width": 1024, "num_heads": 16, "grid": (16, 16)},
            "k700 --split val --model ViT-L-14-quickgelu --layers none --frames 8 --stride 16 --pixels 8 --eval-views 3x3",
        ),
        (
            {"num_classes": 9, "num_frames": 6, "grid": (3, 3)},
            "DATASET --split val --model MODEL --layers none --frames 6 --stride STRIDE --pixels 6",
        ),
    ],
)
def test_what_to_extract_is_told_as_a_command(fields: dict[str, object], line: str) -> None:
    assert extract_line(AIM.Config(**fields)) == f"vcache extract {line}"  # type: ignore[arg-type]
