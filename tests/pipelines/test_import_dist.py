"""`vcache import-head dist`: official files become runs that classify by the text of the store they are evaluated on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.main import get_command

from vcache.extract.layers import LayerError
from vcache.heads.dist import DiST
from vcache.heads.requirements import ClipFeatures
from vcache.heads.text import ClassText
from vcache.pipelines.checkpoint_file import CheckpointError
from vcache.pipelines.class_file import ClassFileError
from vcache.pipelines.class_text import LOGIT_SCALE, class_text, text_constant
from vcache.pipelines.cli import app
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.evaluation.head_evaluation import Evaluation
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.import_dist import extract_line
from vcache.pipelines.importing import ImportConfig, import_head
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.settings import SettingError
from vcache.store.constants import Constant, write_constants
from vcache.store.reader import FeatureStore

GOLDENS = Path(__file__).parents[1] / "goldens"
Vcache = Callable[[str], tuple[int, str, str]]

# Of the tiny CLIP of conftest.py, with as many frames as its stores have here.
CONFIG = DiST.Config(
    num_classes=1,
    num_frames=5,
    num_layers=3,
    width=48,
    grid=(4, 4),
    patch_size=8,
    embed_dim=20,
    integration_dim=64,
    temporal_dim=6,
)
SCALE = 2.5


def state_of(config: DiST.Config = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {name: x for name, x in DiST(config).state_dict().items() if not name.startswith("text.")}
    return {name: 0.3 * torch.randn(x.shape, generator=generator) for name, x in state.items()}


def save_official(path: Path, head: dict[str, Tensor], clip: dict[str, Tensor] | None = None) -> Path:
    """As the released files are: the head among CLIP's own weights."""
    state = {f"dist_net.{name}": x for name, x in head.items()} | (clip or {})
    torch.save({"model_state": {f"backbone.base_encoder.{name}": x for name, x in state.items()}}, path)
    return path


def imported(path: Path, out: Path, classes: str | None = None, **settings: str) -> Run:
    file = None
    if classes is not None:
        file = out.with_name(f"{out.name}.txt")
        file.write_text(classes)
    return Run.open(
        Path(import_head(ImportConfig(head="dist", file=path, classes=file, settings=settings, out=out)).run)
    )


@pytest.fixture(scope="module")
def store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers and the pixels of two frames for each; text drawn at random."""
    path = tmp_path_factory.mktemp("dist") / "dist.zarr"
    run_extraction(tiny_extraction(store=path, layers="0:", cross_frame="none", pixels=10))
    with FeatureStore.open(path) as opened:
        shape = (len(opened.manifest.class_names), 1, 20)
        values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        constants = {
            text_constant("label"): Constant(("class", "template", "channel"), values),
            LOGIT_SCALE: Constant(("scale",), np.array([SCALE], np.float32)),
        }
        write_constants(opened, {name: x for name, x in constants.items() if name not in opened.manifest.constants})
    return path


@pytest.fixture
def clip(tiny_clip: Path, store: Path) -> dict[str, Tensor]:
    """CLIP's own weights, under OpenAI's names, as they lie beside the head."""
    with FeatureStore.open(store) as opened:
        scale = torch.tensor(float(opened.constant(LOGIT_SCALE)[0]))
    return {**load_file(tiny_clip / "open_clip_model.safetensors"), "logit_scale": scale}


def evaluated(run: Run, store: Path, classes: str = "trained") -> tuple[Evaluation, list[str]]:
    notes: list[str] = []
    return evaluate(run.path, store=store, classes=classes, device="cpu", on_note=notes.append), notes


def test_an_imported_head_gives_the_official_outputs(tmp_path: Path, vcache: Vcache) -> None:
    with np.load(GOLDENS / "dist_network.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    facts = json.loads((GOLDENS / "dist_network.json").read_text())
    weights = {key[2:]: x for key, x in golden.items() if key.startswith("w/")}
    path, out = save_official(tmp_path / "file.pyth", weights), tmp_path / "run"
    plain = " --set formulation=plain"
    status, _, said = vcache(f"import-head dist {path} --set grid=2,2 --set num_classes=5{plain} --out {out}")
    assert status == 0, said
    head = Run.open(out).load_head()
    config = head.config
    assert (config.integration_dim, config.temporal_dim) == (facts["integration_dim"], facts["temporal_dim"])
    assert (config.gamma, config.num_frames) == (2, 3)
    images = golden["in/images"].unflatten(0, (facts["B"], facts["num_input_frames"]))
    # The golden's images are normalised already, and so the stem is given them.
    head.temporal_stem.register_forward_hook(lambda stem, inputs, _: stem.forward(images.transpose(1, 2)))
    tokens = {i: golden[f"in/mid_feat{i}"].transpose(0, 1).unflatten(0, (facts["B"], 3)) for i in (0, 1)}
    pixels = torch.zeros(facts["B"], 6, 32, 32, 3, dtype=torch.uint8)
    head.set_text(ClassText(golden["in/text"].unsqueeze(1), float(golden["in/logit_scale"])))
    with torch.inference_mode():
        features = ClipFeatures(tokens=tokens, pixels=pixels)
        torch.testing.assert_close(head.embed(features), golden["out/cls_x"], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(head(features), golden["out/logits"], rtol=1e-5, atol=5e-4)


def test_a_run_says_what_the_head_by_hand_says_with_the_stores_text(
    store: Path, clip: dict[str, Tensor], tmp_path: Path
) -> None:
    state = state_of()
    run = imported(save_official(tmp_path / "file.pyth", state, clip), tmp_path / "run")
    assert run.config["head_config"]["num_classes"] is None and not run.has_class_names
    found, notes = evaluated(run, store)
    with FeatureStore.open(store) as opened:
        head = DiST(CONFIG).eval()
        head.load_state_dict({**head.state_dict(), **state})
        head.set_text(class_text(opened, "label"))
        split = found.predictions.split
        names = list(opened.videos(split).ids)
        rows = np.array([names.index(name) for name in found.predictions.video_ids or ()])
        tokens = {i: torch.tensor(opened.read(split, f"tokens/{i}", rows)) for i in range(3)}
        pixels = torch.tensor(opened.read(split, "pixels", rows))
        dataset = opened.manifest.dataset
    with torch.inference_mode():
        expected = head(ClipFeatures(tokens=tokens, pixels=pixels))
    scores = torch.from_numpy(found.predictions.scores)
    torch.testing.assert_close(scores.softmax(dim=1), expected.softmax(dim=1), rtol=1e-4, atol=1e-5)
    assert expected.std(dim=0).min() > 1e-2 and expected.std(dim=1).min() > 1  # videos and text matter
    assert notes == [
        "its frames were normalised by other means and deviations than the head normalises their pixels by, which are CLIP's.",
        "its backbone ran in float32, the official one in float16: logits differ by their rounding, and a video between two "
        "classes may change sides.",
        f"the checkpoint does not tell its classes: videos are compared with the text of the 3 classes of {dataset}, whether it "
        "was trained on these or not.",
    ]


def test_class_names_tell_what_is_zero_shot_and_change_no_score(
    store: Path, clip: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save_official(tmp_path / "file.pyth", state_of(), clip)
    classes = {
        "unnamed": None,
        "turned": "wave\nclap hands\njump",
        "others": "wave\nclimb",
        "some": "wave\njump",
    }
    runs = {name: imported(path, tmp_path / name, classes=words) for name, words in classes.items()}
    with pytest.raises(RunError, match="'climb' and 0 more are not among them. .* --classes all"):
        evaluated(runs["others"], store)
    found = {name: evaluated(run, store, "all" if name == "others" else "trained") for name, run in runs.items()}
    some, said = found.pop("some")
    assert some.predictions.class_names == ("jump", "wave") and some.metrics.num_videos == 4
    assert "1 of the 3 classes of" in said[-1] and said[-1].endswith(
        ": their videos are left out (--classes all takes them, too)."
    )
    for evaluation, _ in found.values():
        np.testing.assert_array_equal(evaluation.predictions.scores, found["unnamed"][0].predictions.scores)
    last = {name: notes[-1] for name, (_, notes) in found.items()}
    assert last["turned"].startswith("its backbone ran in float32")  # of the classes nothing is to be said
    assert "2 of the 3 classes of" in last["others"] and "are not among the 2 that" in last["others"]
    assert "zero-shot" in last["others"]
    configs = {name: run.config["head_config"]["num_classes"] for name, run in runs.items()}
    assert configs == {"unnamed": None, "turned": 3, "others": 2, "some": 2}


def test_whether_the_backbone_is_the_checkpoints_is_proved_by_its_weights(
    store: Path, clip: dict[str, Tensor], tmp_path: Path
) -> None:
    other = {**clip, "visual.ln_pre.bias": clip["visual.ln_pre.bias"] + 1e-6, "logit_scale": torch.tensor(7.5)}
    said = {}
    for name, beside in (("same", clip), ("other", other), ("alone", {})):
        path = save_official(tmp_path / f"{name}.pyth", state_of(), beside)
        settings = {} if beside else {"grid": "4,4"}
        said[name] = evaluated(imported(path, tmp_path / name, **settings), store)[1]
    assert not any("image tower" in note or "OpenAI" in note for note in said["same"])
    assert "was made with others (" in said["other"][0] and "say nothing of the checkpoint" in said["other"][0]
    assert any(f"the logit scale of the checkpoint is 7.5000, that of {store.name}'s CLIP" in x for x in said["other"])
    assert "unless these are the same weights" in said["alone"][0]
    assert not any("logit scale" in note for note in (*said["same"], *said["alone"]))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"num_layers": 2}, RunError, "reads features of num_layers 2; .* with 3"),
        ({"embed_dim": 12}, RunError, "reads features of embed_dim 12; .* with 20"),
        ({"patch_size": 4}, RunError, "reads features of patch_size 4; .* with 8"),
        ({"num_frames": 4}, HeadStoreMismatch, "reads clips of 4 frames"),
        ({"gamma": 4}, HeadStoreMismatch, "reads the pixels of 4 frames for each .* holds those of 10"),
    ],
)
def test_a_store_that_the_head_cannot_read_is_refused_in_words(
    fields: dict[str, int], error: type[Exception], words: str, store: Path, tmp_path: Path
) -> None:
    state = state_of(replace(CONFIG, **fields))
    run = imported(save_official(tmp_path / "file.pyth", state), tmp_path / "run", grid="4,4")
    with pytest.raises(error, match=words):
        evaluated(run, store)


def mixed() -> dict[str, Tensor]:
    return state_of() | {"adapooling_nets.1.positional_embedding": torch.zeros(1, 8, 64)}


@pytest.mark.parametrize(
    ("state", "given", "words"),
    [
        (state_of(), {"num_frames": "8"}, "is not a DiST checkpoint that fits: num_frames is set to 8, and its weights say 5"),
        (mixed(), {}, "its weights are for clips of different numbers of frames, 5 .* and 8 "),
        ({"visual.proj": torch.zeros(3)}, {}, "the checkpoint lacks|it is not whole: there is no temporal_stem.weight"),
        (state_of(replace(CONFIG, num_layers=2)), {}, "does not tell layers: it reads 2 of the 3 blocks .*  --set layers=8:"),
        (state_of(replace(CONFIG, num_layers=2)), {"layers": "0:"}, "3 layers are set to be read, 0,1,2, and it has"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_with_the_reason_and_leave_nothing(
    state: dict[str, Tensor], given: dict[str, str], words: str, clip: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save_official(tmp_path / "file.pyth", state, clip)
    with pytest.raises(CheckpointError, match=words):
        imported(path, tmp_path / "run", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pyth"]


def test_which_layers_are_read_can_be_said(clip: dict[str, Tensor], tmp_path: Path) -> None:
    path = save_official(tmp_path / "file.pyth", state_of(replace(CONFIG, num_layers=2)), clip)
    for number, (words, layers) in enumerate({"-2:": [1, 2], "0,2": [0, 2]}.items()):
        run = imported(path, tmp_path / f"run-{number}", layers=words)
        assert run.config["head_config"]["layers"] == layers and run.load_head().config.read_layers == tuple(layers)
    for words, said in (("-4:", "asked of a backbone with 3 blocks"), ("a", "is not a layer")):
        with pytest.raises(LayerError, match=said):
            imported(path, tmp_path / "refused", layers=words)
    with pytest.raises(SettingError, match="--set num_layers=many: int expected"):
        imported(path, tmp_path / "refused", layers="0:", num_layers="many")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ClassFileError, match="gives no class names: it is empty"):
        import_head(ImportConfig(head="dist", file=path, classes=tmp_path / "empty.txt", out=tmp_path / "refused"))


B16 = DiST.Config(num_classes=1)
L14 = DiST.Config(num_classes=1, num_frames=32, num_layers=24, width=1024, grid=(16, 16), patch_size=14, embed_dim=768)
K400 = {"adaptive_pooling_layers": 4}
LINE = "--split val --model {} --layers {} --tsn --frames {} --pixels {} --eval-views 3x1 --cross-frame none"


@pytest.mark.parametrize(
    ("config", "name", "dataset", "words"),
    [
        (replace(B16, num_frames=16, **K400), "DIST_VIT_B16_K400_16+32f_84.4.pyth", "k400", ("ViT-B-16-quickgelu", "0:", 16, 32)),
        (B16, "DIST_VIT_B16_SSV2_8+16f_68.7.pyth", "ssv2", ("ViT-B-16-quickgelu", "0:", 8, 16)),
        (replace(L14, **K400), "DIST_VIT_L14_K400_K710_32+64f_89.6.pyth", "k400", ("ViT-L-14-quickgelu", "0:", 32, 64)),
        (replace(L14, grid=(24, 24)), "x.pyth", "DATASET", ("ViT-L-14-336-quickgelu", "0:", 32, 64)),
        (B16, "DIST_VIT_B16_K400_8+16f_83.6.pyth", "DATASET", ("ViT-B-16-quickgelu", "0:", 8, 16)),  # its pooling is not
        (replace(B16, width=640, layers=(0, -1), gamma=4), "x.pyth", "DATASET", ("MODEL", "0,11", 8, 32)),
    ],
)  # fmt: skip
def test_what_to_extract_is_told_as_a_command(
    config: DiST.Config, name: str, dataset: str, words: tuple[Any, ...]
) -> None:
    line = extract_line(config, name)
    assert line == f"vcache extract {dataset} {LINE.format(*words)}"
    _, command, *arguments = line.split()
    asked = get_command(app).commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]
    assert (asked["frames"], asked["pixels"], asked["tsn"]) == (words[2], words[3], True)


def test_the_command_line_says_what_it_read_and_evaluates_it(
    store: Path, clip: dict[str, Tensor], tmp_path: Path, vcache: Vcache
) -> None:
    path, out = save_official(tmp_path / "DIST_VIT_B16_K400_16+32f_84.4.pyth", state_of(), clip), tmp_path / "run"
    status, screen, err = vcache(f"import-head dist {path} --out {out}")
    assert status == 0, err
    num_parameters = sum(x.numel() for x in state_of().values())
    for words in (
        f"{num_parameters:,} parameters, whose classes are those of the store that it is evaluated on, compared by their text\n",
        "reads 3 layers (0:) of 5 frames and the pixels of 10, 4x4 patches of width 48; 2 pooling layers",
        "the name of the file says ViT-B16, K400 and 16+32 frames, its weights are of width 48, 2 pooling layers and 5+10 frames",
        "extract with:   vcache extract DATASET --split val --model MODEL --layers 0: --tsn --frames 5 --pixels 10",
        f"evaluate with:  vcache eval {out} --store STORE",
    ):
        assert words in screen
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "head.safetensors"]
    status, screen, err = vcache(f"eval {out} --store {store} --json")
    assert status == 0 and json.loads(screen)["num_videos"] == 6
    assert "does not tell its classes" in " ".join(err.split())
