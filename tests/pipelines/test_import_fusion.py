"""`vcache import-head actionclip` and `text4vis`: official files become runs, which read features of the towers in them alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from vcache.heads.actionclip import ActionCLIP
from vcache.heads.official_actionclip import actionclip_checkpoint
from vcache.heads.requirements import ClipFeatures
from vcache.heads.temporal_fusion import FrameConv, FrameLSTM, FrameTransformer, FrameTransformerCls, MeanPooling
from vcache.heads.text4vis import Text4Vis
from vcache.pipelines.checkpoint_file import CheckpointError
from vcache.pipelines.class_text import class_text
from vcache.pipelines.evaluation.evaluate import Evaluation, evaluate
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.importing import ImportConfig, ImportSummary, import_head
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.text_command import add_text
from vcache.pipelines.text_sets import TextMismatch
from vcache.store.reader import FeatureStore

GOLDENS = Path(__file__).parents[1] / "goldens"
Vcache = Callable[..., tuple[int, str, str]]
T, E = 5, 20  # of the stores of `tiny_extraction`, and of the tiny CLIP
SCALE = 2.25

MODULES = {
    "meanp": MeanPooling,
    "conv1d": lambda: FrameConv(E, scrambled=True),
    "lstm": lambda: FrameLSTM(E),
    "transf": lambda: FrameTransformer(E, 1),
}


def drawn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(x.shape, generator=generator) for name, x in state.items()}


def save_actionclip(path: Path, prompt: dict[str, Tensor], clip: dict[str, Tensor]) -> Path:
    """As utils/saving.py of the official code does; its optimiser holds no code, too."""
    wrapped = {f"module.{name}": x for name, x in prompt.items()}
    torch.save(
        {
            "epoch": 7,
            "model_state_dict": clip,
            "fusion_model_state_dict": wrapped,
            "optimizer_state_dict": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-6}]},
        },
        path,
    )
    return path


def save_text4vis(path: Path, fusion: dict[str, Tensor], clip: dict[str, Tensor]) -> Path:
    """VideoCLIP of the official code: the image tower, the fusion and the scale."""
    kept = {name: x for name, x in clip.items() if name.startswith("visual.") or name == "logit_scale"}
    state = kept | {f"fusion_model.{name}": x for name, x in fusion.items()}
    torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}}, path)
    return path


SAVERS = {"actionclip": save_actionclip, "text4vis": save_text4vis}


@pytest.fixture(scope="module")
def tuned(worded_clip: Path) -> dict[str, Tensor]:
    """The tiny CLIP after both of its towers were trained along, in half precision as the official code saves it."""
    state = load_file(worded_clip / "open_clip_model.safetensors")
    generator = torch.Generator().manual_seed(6)
    state = {name: (x + 0.02 * torch.randn(x.shape, generator=generator)).half() for name, x in state.items()}
    return {**state, "logit_scale": torch.tensor(SCALE)}


def folder_of(clip: Path, folder: Path, checkpoint: Path) -> Path:
    """A model whose weights are those of an official file."""
    folder.mkdir()
    for file in (clip / "open_clip_config.json", clip / "bpe_tiny.txt.gz", checkpoint):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def stores(
    worded_clip: Path,
    tuned: dict[str, Tensor],
    tiny_extraction: Callable[..., ExtractionConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Embeddings of the official files, and text where there is a text tower."""
    root = tmp_path_factory.mktemp("fusion")
    files = {
        name: save(root / f"{name}.pt", drawn(MODULES["transf"]().state_dict()), tuned) for name, save in SAVERS.items()
    }
    models = {"frozen": worded_clip} | {name: folder_of(worded_clip, root / name, file) for name, file in files.items()}
    for name, model in models.items():
        config = tiny_extraction(
            store=root / f"{name}.zarr", model=f"local-dir:{model}", layers="-1:", cross_frame="none"
        )
        run_extraction(config)
    return {name: root / f"{name}.zarr" for name in models}


@pytest.fixture(scope="module")
def worded_stores(stores: dict[str, Path], worded_clip: Path) -> dict[str, Path]:
    """With the text that the heads match: of ActionCLIP's own tower, and for Text4Vis of CLIP's, which its file does not have."""
    add_text(stores["actionclip"], ["actionclip"], device="cpu")
    add_text(stores["text4vis"], ["text4vis"], model=f"local-dir:{worded_clip}", device="cpu")
    return stores


def imported(head: str, path: Path, out: Path, **settings: str) -> tuple[Run, ImportSummary]:
    summary = import_head(ImportConfig(head=head, file=path, settings=settings, out=out))
    return Run.open(Path(summary.run)), summary


def evaluated(run: Run, store: Path) -> tuple[Evaluation, list[str]]:
    notes: list[str] = []
    return evaluate(run.path, store=store, device="cpu", on_note=notes.append), notes


def embeddings_of(store: Path, found: Evaluation) -> Tensor:
    with FeatureStore.open(store) as opened:
        split = found.predictions.split
        names = list(opened.videos(split).ids)
        rows = np.array([names.index(name) for name in found.predictions.video_ids or ()])
        return torch.tensor(opened.read(split, "embed", rows))


@pytest.mark.parametrize("kind", MODULES)
def test_an_actionclip_run_says_what_the_official_arithmetic_says_of_its_own_towers(
    kind: str, worded_stores: dict[str, Path], tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    """The arithmetic of test.py: 100 times the cosine, softmax over the classes, mean over the templates."""
    store, module = worded_stores["actionclip"], MODULES[kind]()
    weights = drawn(module.state_dict())
    module.load_state_dict(weights)
    run, summary = imported("actionclip", save_actionclip(tmp_path / "model_best.pt", weights, tuned), tmp_path / "run")
    assert summary.head_config["prompt"] == kind and summary.head_config["num_classes"] is None
    assert summary.head_config["scrambled"] == (kind == "conv1d")
    found, notes = evaluated(run, store)
    with FeatureStore.open(store) as opened, torch.inference_mode():
        texts = normalize(class_text(opened, "actionclip").embeddings, dim=-1)
        videos = normalize(module.eval()(embeddings_of(store, found)), dim=-1)
    expected = torch.stack([(100 * videos @ texts[:, m].T).softmax(dim=1) for m in range(16)]).mean(dim=0)
    np.testing.assert_allclose(found.predictions.probabilities(), expected.numpy(), rtol=1e-3, atol=1e-6)
    assert expected.std(dim=1).min() > 1e-3
    assert not any("made with others" in note for note in notes)
    assert run.load_head().logit_scale.item() == SCALE


@pytest.mark.parametrize("kind", ["meanp", "transf"])
def test_a_text4vis_run_says_what_the_official_arithmetic_says_of_its_own_tower(
    kind: str, worded_stores: dict[str, Path], tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    store, module = worded_stores["text4vis"], MODULES[kind]()
    weights = drawn(module.state_dict())
    module.load_state_dict(weights)
    run, summary = imported("text4vis", save_text4vis(tmp_path / "last_model.pt", weights, tuned), tmp_path / "run")
    assert summary.head_config["temporal"] == {"meanp": "tap", "transf": "t_trans"}[kind]
    found, notes = evaluated(run, store)
    with FeatureStore.open(store) as opened, torch.inference_mode():
        texts = normalize(class_text(opened, "text4vis").embeddings[:, 0], dim=-1)
        videos = normalize(module.eval()(embeddings_of(store, found)), dim=-1)
    expected = (100 * videos @ texts.T).softmax(dim=1)
    np.testing.assert_allclose(found.predictions.probabilities(), expected.numpy(), rtol=1e-3, atol=1e-6)
    assert not any("float16" in note for note in notes)  # the official evaluation is in float32, as the store
    assert run.load_head().classifier.logit_scale.item() == SCALE


@pytest.mark.parametrize("head", SAVERS)
def test_features_of_the_frozen_clip_are_refused_with_the_reason_and_the_way_out(
    head: str, float32_store: Path, tuned: dict[str, Tensor], tmp_path: Path, vcache: Vcache
) -> None:
    file = SAVERS[head](tmp_path / "model_best.pt", drawn(MODULES["transf"]().state_dict()), tuned)
    run, summary = imported(head, file, tmp_path / "run")
    status, _, said = vcache(f"eval {run.path} --store {float32_store}", columns=5000)
    assert status == 1
    assert "reads what the image tower in its checkpoint makes, which was trained along with it (weights " in said
    assert f"What it reads is made with:  {summary.extract}\n" in said
    assert f"--pretrained {file} --layers none --tsn --frames FRAMES" in summary.extract
    assert f"A head for frozen towers is trained with:  vcache train-head {head} --store {float32_store}" in said


def test_the_text_tower_of_actionclip_has_to_be_its_own_too(
    worded_stores: dict[str, Path], tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    """The store has the same image tower, and text of another tower."""
    other = {**tuned, "text_projection": tuned["text_projection"] * 2}
    run, _ = imported("actionclip", save_actionclip(tmp_path / "file.pt", {}, other), tmp_path / "run")
    with pytest.raises(RunError, match="reads what the text tower in its checkpoint makes"):
        evaluated(run, worded_stores["actionclip"])


def test_only_a_store_whose_checkpoint_has_no_text_tower_takes_text_of_another(
    stores: dict[str, Path], worded_clip: Path
) -> None:
    with pytest.raises(TextMismatch, match="text and features must be of one checkpoint"):
        add_text(stores["actionclip"], ["clip_kinetics"], model=f"local-dir:{worded_clip}", device="cpu")


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return arrays, json.loads((GOLDENS / f"{name}.json").read_text())


def clip_of(width: int, embed_dim: int, patch_size: int = 4, image: int = 16) -> dict[str, Tensor]:
    """The sizes of a CLIP: what the readers look at."""
    shapes = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((image // patch_size) ** 2 + 1, width),
        "visual.conv1.weight": (width, 3, patch_size, patch_size),
        "visual.proj": (width, embed_dim),
        "token_embedding.weight": (9, 2 * embed_dim),
        "transformer.resblocks.0.ln_1.weight": (2 * embed_dim,),
        "ln_final.weight": (2 * embed_dim,),
        "logit_scale": (),
    }
    return drawn({name: torch.empty(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", ["meanp", "conv_1d", "lstm", "transf"])
def test_weights_of_the_official_prompts_give_the_official_embeddings(
    name: str, tmp_path: Path, vcache: Vcache
) -> None:
    arrays, facts = golden(f"actionclip_{name}")
    weights = {key[2:]: x for key, x in arrays.items() if key.startswith("w/")}
    file = save_actionclip(tmp_path / "model_best.pt", weights, clip_of(48, facts["embed_dim"]))
    status, _, said = vcache(f"import-head actionclip {file} --out {tmp_path / 'run'}")
    assert status == 0, said
    head = Run.open(tmp_path / "run").load_head()
    with torch.inference_mode():
        video = head.embed(ClipFeatures(embed=arrays["in/frame_emb"]))
    torch.testing.assert_close(video, arrays["out/video_emb"], rtol=1e-5, atol=2e-5)


def test_transf_cls_tells_its_frames(tmp_path: Path) -> None:
    module = FrameTransformerCls(16, 11)
    file = save_actionclip(tmp_path / "file.pt", drawn(module.state_dict()), clip_of(48, 16))
    run, summary = imported("actionclip", file, tmp_path / "run")
    assert run.requirements().num_frames == 11 and "--frames 11" in summary.extract
    state = run.load_head().state_dict()
    torch.testing.assert_close(
        state["fusion_model.transformer.cls_token"], drawn(module.state_dict())["transformer.cls_token"]
    )


@pytest.mark.parametrize(
    ("name", "width", "patch_size", "image", "words"),
    [
        ("k400-vitb-16-f8.pt", 768, 16, 224, "k400 --split val --model ViT-B-16-quickgelu {} --frames 8 --eval-views 4x3"),
        ("k400-vitb-32-f16.pt", 768, 32, 224, "k400 --split val --model ViT-B-32-quickgelu {} --frames 16 --eval-views 4x3"),
        ("k400-vitb-32-f16.pt", 768, 16, 224, "DATASET --split val --model ViT-B-16-quickgelu {} --frames FRAMES"),
        ("best_model.pt", 1024, 14, 336, "DATASET --split val --model ViT-L-14-336-quickgelu {} --frames FRAMES"),
    ],
)  # fmt: skip
def test_what_to_extract_is_told_as_a_command(
    name: str, width: int, patch_size: int, image: int, words: str, tmp_path: Path
) -> None:
    file = save_text4vis(tmp_path / name, {}, clip_of(width, 16, patch_size, image))
    _, summary = imported("text4vis", file, tmp_path / "run")
    assert summary.extract == f"vcache extract {words.format(f'--pretrained {file} --layers none --tsn')}"


X = torch.zeros(3)
SMALL = clip_of(48, 20)


@pytest.mark.parametrize(
    ("head", "content", "words"),
    [
        ("actionclip", {"model_state_dict": {"visual.proj": X, "fusion_model.x": X}}, "it is a checkpoint of Text4Vis"),
        ("text4vis", {"model_state_dict": SMALL, "fusion_model_state_dict": {}}, "it is a checkpoint of ActionCLIP"),
        ("text4vis", SMALL, "it is CLIP's own weights: a backbone, not a head"),
        ("actionclip", SMALL, "it is CLIP's own weights: a backbone, not a head"),
        ("actionclip", {"model": {"decoder.decoder_layers.0.x": X}}, "it is a checkpoint of EVL"),
        (
            "actionclip",
            {"model_state_dict": {**SMALL, "visual.time_embedding": X}, "fusion_model_state_dict": {}},
            "which sees each frame by itself: it has visual.time_embedding",
        ),
        (
            "actionclip",
            {"model_state_dict": SMALL, "fusion_model_state_dict": {"module.other.weight": X}},
            "is none of the official ones: it has other.weight",
        ),
        (
            "actionclip",
            {"model_state_dict": SMALL, "fusion_model_state_dict": {"module.shift.weight": torch.zeros(20, 1, 3)}},
            "it is not whole: there is no frame_position_embeddings.weight",
        ),
        (
            "text4vis",
            {"model_state_dict": {f"fusion_model.{n}": x for n, x in FrameLSTM(20).state_dict().items()} | SMALL},
            "is 'lstm', which Text4Vis does not have",
        ),
        (
            "actionclip",
            {
                "model_state_dict": SMALL,
                "fusion_model_state_dict": {n: x for n, x in FrameLSTM(20).state_dict().items() if "bias" not in n},
            },
            "the checkpoint lacks fusion_model.lstm_visual.bias_hh_l0",
        ),
        (
            "actionclip",
            {"model_state_dict": SMALL | {"logit_scale": torch.tensor(torch.nan)}, "fusion_model_state_dict": {}},
            "NaN or infinite weights in logit_scale",
        ),
        ("actionclip", [1, 2], "it holds a list"),
    ],
)
def test_what_is_no_checkpoint_of_the_head_is_refused_with_the_reason_and_leaves_nothing(
    head: str, content: Any, words: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=words):
        imported(head, tmp_path / "file.pt", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_a_setting_that_the_weights_contradict_is_refused(tmp_path: Path) -> None:
    file = save_actionclip(tmp_path / "file.pt", {}, SMALL)
    with pytest.raises(CheckpointError, match="prompt is set to lstm, and its weights say meanp"):
        imported("actionclip", file, tmp_path / "run", prompt="lstm")


def test_evl_says_of_such_a_file_what_it_is(tmp_path: Path) -> None:
    for name, save in SAVERS.items():
        file = save(tmp_path / f"{name}.pt", drawn(MODULES["transf"]().state_dict()), SMALL)
        called = {"actionclip": "ActionCLIP", "text4vis": "Text4Vis"}[name]
        with pytest.raises(CheckpointError, match=f"of {called}, whose image tower was trained along"):
            imported("evl", file, tmp_path / "run")


def test_the_readers_say_what_is_in_a_file() -> None:
    found = actionclip_checkpoint({"model_state_dict": SMALL, "fusion_model_state_dict": {}})
    assert (found.kind, found.embed_dim, found.width, found.grid) == ("meanp", 20, 48, (4, 4))
    assert {*found.text} == {name for name in SMALL if not name.startswith("visual.")}
    assert ActionCLIP.Config(num_classes=1).scrambled is False and Text4Vis.Config(num_classes=1).temporal == "t_trans"
