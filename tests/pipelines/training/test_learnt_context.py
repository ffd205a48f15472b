"""Text4Vis with a learnt context, from the store's own text tower to a run that is evaluated without one of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from logged import metrics_of
from safetensors.torch import load_file, save_file
from stops import stop_after
from torch.nn.functional import normalize

from vcache.extract.text import FrozenTextTower, load_text_tower
from vcache.heads.text4vis import Text4Vis
from vcache.pipelines import text_tower
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.random_state import RandomState
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_file import read_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.store.reader import FeatureStore

SETTINGS = {
    "classifier": "coop", "temporal": "tap", "context_length": 2, "epochs": 2, "batch_size": 5, "lr": 0.01, "warmup_epochs": 0,
    "schedule_every": 1,
}  # fmt: skip
NUM_STEPS = 6  # 12 clips in batches of 5: two epochs of three
CTX = "classifier.prompt_learner.ctx"


@pytest.fixture(scope="module")
def clip(worded_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the store, which a test may change and put back."""
    return Path(shutil.copytree(worded_clip, tmp_path_factory.mktemp("checkpoint") / "clip"))


@pytest.fixture(scope="module")
def store(video_folder: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worded") / "s.zarr"
    run_extraction(
        ExtractionConfig(
            dataset=str(video_folder), layers="-1", frames=3, tsn=True, cross_frame="none", dtype="float32",
            model=f"local-dir:{clip}", pretrained=None, device="cpu", store=path,
        )
    )  # fmt: skip
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose text tower is loaded from here on."""
    models: list[str] = []

    def load(model: str, *args: object, **kwargs: object) -> FrozenTextTower:
        models.append(model)
        return load_text_tower(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(text_tower, "load_text_tower", load)
    return models


def config(store: Path, out: Path, leave_out: tuple[str, ...] = (), **settings: Any) -> TrainingConfig:
    return TrainingConfig(
        head="text4vis", store=store, out=out, device="cpu", settings={**SETTINGS, **settings}, leave_out=leave_out
    )


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, before = tmp_path_factory.mktemp("runs") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    train_head(config(store, out))
    torch.set_num_threads(before)
    return out


def test_the_context_is_trained_and_the_tower_is_no_part_of_the_run(trained: Path, store: Path) -> None:
    weights, width = load_file(trained / "head.safetensors"), 24
    assert set(weights) == {CTX, "classifier.logit_scale"} and weights[CTX].shape == (2, width)
    with RandomState(0, torch.device("cpu")).active():
        drawn = Text4Vis(Run.open(trained).head_config()).state_dict()[CTX]
    moved = (weights[CTX] - drawn).abs()
    assert moved.median() > 0.02  # AdamW moves by about the rate at each step; decay alone would by a hundredth of that
    with FeatureStore.open(store) as opened:
        assert build_head_config("text4vis", {"classifier": "coop"}, opened.manifest).context_width == width
        assert build_head_config("text4vis", {}, opened.manifest).context_width is None


def test_an_evaluation_compares_with_the_prompts_of_the_classes(trained: Path, store: Path, clip: Path) -> None:
    tower, ctx = load_text_tower(f"local-dir:{clip}", None), load_file(trained / "head.safetensors")[CTX]
    says = evaluate(trained, device="cpu")
    prompts = tower.embed_prompts(["clap hands", "jump", "wave"], 2)
    tokens = torch.cat([prompts.tokens[:, :1], ctx.expand(3, -1, -1), prompts.tokens[:, 3:]], dim=1)
    classes = normalize(tower.encode_embedded(tokens, prompts.ends), dim=-1)
    with FeatureStore.open(store) as opened:
        rows = [opened.videos("val").ids.index(video) for video in says.predictions.video_ids or ()]
        videos = torch.tensor(opened.read("val", "embed", rows)).mean(dim=1)
    expected = 100 * normalize(videos, dim=-1) @ classes.T
    torch.testing.assert_close(torch.from_numpy(says.predictions.scores), expected, rtol=1e-3, atol=1e-3)
    assert says.metrics.top1 == metrics_of(trained)[-1]["val_top1"]


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_training_that_was_stopped_goes_on_bit_for_bit(
    trained: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, num_steps)
        train_head(config(store, tmp_path / "run"))
    resume_run(tmp_path / "run")
    for file in ("head", "best"):
        whole, resumed = (load_file(run / f"{file}.safetensors") for run in (trained, tmp_path / "run"))
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert metrics_of(tmp_path / "run") == metrics_of(trained)


def test_an_average_of_the_weights_is_validated_with_the_same_tower(store: Path, tmp_path: Path) -> None:
    train_head(config(store, tmp_path / "run", ema_decay=0.5, epochs=1))
    assert Run.open(tmp_path / "run").metrics()[0]["val_top1"] == evaluate(tmp_path / "run", device="cpu").metrics.top1


def test_classes_that_were_left_out_are_asked_for_by_their_names(store: Path, tmp_path: Path) -> None:
    train_head(config(store, tmp_path / "run", leave_out=("jump",), epochs=1))
    of = {which: evaluate(tmp_path / "run", classes=which, device="cpu") for which in ("trained", "left-out", "all")}
    names = {which: says.predictions.class_names for which, says in of.items()}
    assert names == {
        "trained": ("clap hands", "wave"),
        "left-out": ("jump",),
        "all": ("clap hands", "jump", "wave"),
    }
    scores = {which: says.predictions.scores for which, says in of.items()}
    two = [row for row, target in enumerate(of["all"].predictions.targets) if target != 1]
    torch.testing.assert_close(
        torch.from_numpy(scores["all"][two][:, [0, 2]]), torch.from_numpy(scores["trained"]), rtol=1e-4, atol=1e-4
    )
    assert scores["left-out"].shape == (2, 1)


def test_contexts_of_their_own_are_those_of_the_classes_that_were_trained_on(store: Path, tmp_path: Path) -> None:
    settings = {"class_specific_context": True, "epochs": 1}
    train_head(config(store, tmp_path / "run", leave_out=("clap hands",), **settings))
    assert load_file(tmp_path / "run" / "head.safetensors")[CTX].shape == (2, 2, 24)
    assert evaluate(tmp_path / "run", device="cpu").predictions.scores.shape == (4, 2)
    with pytest.raises(
        RunError,
        match="--classes all: head 'text4vis' .* A run of text4vis that classifies by text alone can be asked for any:",
    ):
        evaluate(tmp_path / "run", classes="all", device="cpu")


def test_heads_of_a_sweep_share_one_tower_and_become_what_they_are_alone(
    store: Path, trained: Path, tmp_path: Path, loads: list[str], clip: Path
) -> None:
    fixed = {name: str(value) for name, value in SETTINGS.items() if name != "context_length"}
    fixed |= {"store": str(store), "device": "cpu"}
    members = read_sweep("text4vis", fixed, {"context_length": ("1", "2", "3")})
    run_sweep(Sweep.create(tmp_path / "sweep", plan_sweep(members)))
    assert loads == [f"local-dir:{clip}"]
    (same,) = (
        path.parent for path in (tmp_path / "sweep").rglob("head.safetensors") if load_file(path)[CTX].shape[0] == 2
    )
    torch.testing.assert_close(
        load_file(same / "head.safetensors"), load_file(trained / "head.safetensors"), rtol=1e-5, atol=1e-6
    )


def test_bfloat16_trains_too(store: Path, tmp_path: Path) -> None:
    train_head(TrainingConfig(**{**vars(config(store, tmp_path / "run", epochs=1)), "precision": "bfloat16"}))
    assert load_file(tmp_path / "run" / "head.safetensors")[CTX].isfinite().all()


def test_a_setting_that_the_tower_cannot_take_is_refused(store: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"context_length": 9}, "--set context_length=9: 9 learnt vectors before the class name: .* room for 1 to 8"),
        ({"context_length": 0}, "context_length .0. must be at least 1"),
        ({"context_width": 20}, "--set context_width: it comes from the store, which has 24"),
    ):
        with pytest.raises(SettingError, match=message):
            train_head(config(store, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def moved(clip: Path) -> Any:
    """The checkpoint is away for the length of a test."""
    away = clip.with_name("away")
    clip.rename(away)
    yield away
    shutil.rmtree(clip, ignore_errors=True)
    away.rename(clip)


def test_a_checkpoint_that_is_not_there_is_named(
    store: Path, trained: Path, tmp_path: Path, clip: Path, moved: Path
) -> None:
    for ask in (lambda: train_head(config(store, tmp_path / "run")), lambda: evaluate(trained, device="cpu")):
        with pytest.raises(HeadStoreMismatch, match=f"runs the text tower .* local-dir:{clip}, .* no file {clip}"):
            ask()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("with_text", [True, False])
def test_another_checkpoint_in_its_place_is_refused(
    store: Path, trained: Path, clip: Path, moved: Path, tmp_path: Path, with_text: bool,
    forget_text: Callable[[Path], None],
) -> None:  # fmt: skip
    """By its text tower; of a store without text, which has nothing else to tell it by, by its image tower."""
    shutil.copytree(moved, clip)
    weights = {name: x.clone() for name, x in load_file(moved / "open_clip_model.safetensors").items()}
    changed = "ln_final.bias" if with_text else "visual.ln_post.bias"
    save_file({**weights, changed: weights[changed] + 1}, clip / "open_clip_model.safetensors")
    copied = Path(shutil.copytree(store, tmp_path / "s.zarr"))
    if not with_text:
        forget_text(copied)
    with pytest.raises(
        HeadStoreMismatch, match=f"was made with {'a text' if with_text else 'the image'} tower .* Put that back"
    ):
        evaluate(trained, store=copied, device="cpu")


def test_a_store_without_text_has_its_names_all_the_same(
    store: Path, trained: Path, tmp_path: Path, forget_text: Callable[[Path], None]
) -> None:
    copied = Path(shutil.copytree(store, tmp_path / "s.zarr"))
    forget_text(copied)
    assert "text" not in json.loads((copied / "zarr.json").read_text())["attributes"]["vcache"]["facts"]
    one, other = (evaluate(trained, store=path, device="cpu").predictions.scores for path in (store, copied))
    assert (one == other).all()
