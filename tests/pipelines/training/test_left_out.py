"""Training without some classes is training on a store that never had them, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from named import NamedHead, named_store
from safetensors.torch import load_file
from viewed import manifest

from vcache.heads import registry
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.explaining import explain
from vcache.pipelines.explanation import Question
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.left_out import kept_classes, left_out_names
from vcache.pipelines.training.sweep_file import read_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.train_head import train_head

Vcache = Callable[..., tuple[int, str, str]]
CLASSES = ("jump", "run", "clap hands", "wave", "put, then take")
LEFT_OUT = ("run", "wave")
KEPT = tuple(name for name in CLASSES if name not in LEFT_OUT)


@pytest.fixture(autouse=True)
def _named_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._HEADS, "named", NamedHead)


def videos(several: bool = False) -> dict[str, list[tuple[str, Any]]]:
    """22 to train on, 13 to validate with; of several classes a third has two and some have none."""
    rng, made = np.random.default_rng(3), {}
    for split, number in (("train", 22), ("val", 13)):
        first, second = (np.array(CLASSES)[rng.integers(len(CLASSES), size=number)].tolist() for _ in range(2))
        sets = [
            set() if i % 7 == 3 else {a, b} if i % 3 == 0 else {a}
            for i, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        made[split] = [(f"{split}{i}", label) for i, label in enumerate(sets if several else first)]
    return made


def without(rows: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The videos that have no class that is left out."""
    return [(video, label) for video, label in rows if not ({label} if isinstance(label, str) else label) & {*LEFT_OUT}]


def two_stores(folder: Path, several: bool = False, **options: Any) -> tuple[Path, Path]:
    """One of all classes, and one that never had those that are left out."""
    every = videos(several)
    text = np.random.default_rng(8).normal(size=(len(CLASSES), 2, 7))
    own = [CLASSES.index(name) for name in KEPT]
    named_store(folder / "all.zarr", CLASSES, every, text=text, **options)
    kept = {split: without(rows) for split, rows in every.items()}
    named_store(folder / "kept.zarr", KEPT, kept, text=text[own], **options)
    return folder / "all.zarr", folder / "kept.zarr"


def trained(head: str, store: Path, out: Path, settings: dict[str, Any], **fields: Any) -> Run:
    settings = {"epochs": 3, "batch_size": 4, "lr": 0.05, **settings}
    train_head(TrainingConfig(head=head, store=store, out=out, device="cpu", settings=settings, **fields))
    return Run.open(out)


VIEWS = {"train": (0, 1, 2), "val": (0, 3, 4, 5)}
CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "by text": {"head": "named"},
    "several classes": {"several": True, "settings": {"label_smoothing": 0.1}},
    "several classes by text": {"head": "named", "several": True},
    "smoothed and mixed": {"settings": {"label_smoothing": 0.2, "mixup": 0.8}},
    "balanced": {"balanced": True},
    "shots": {"shots": 2},
    "fraction": {"fraction": 0.5, "data_seed": 3},
    "views, resident": {"resident": "ram", "views": VIEWS},
    "failures, some of them of classes left out": {"failed": ("train1", "train3", "train5", "val2", "val6")},
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_a_store_that_never_had_these_classes(tmp_path: Path, name: str) -> None:
    case = dict(CASES[name])
    head, settings, several = case.pop("head", "linear"), case.pop("settings", {}), case.pop("several", False)
    of_store = {key: case.pop(key) for key in ("views", "failed") if key in case}
    everything, kept = two_stores(tmp_path, several, **of_store)
    one = trained(head, everything, tmp_path / "one", settings, leave_out=LEFT_OUT, **case)
    other = trained(head, kept, tmp_path / "other", settings, **case)
    for file in ("head.safetensors", "best.safetensors"):
        torch.testing.assert_close(load_file(one.path / file), load_file(other.path / file), rtol=0, atol=0)
    assert epochs(one) == epochs(other)
    assert one.class_names() == other.class_names() == KEPT
    assert (one.left_out, other.left_out) == (LEFT_OUT, ())
    for key in ("head_config", "num_train", "train_digest", "val_digest"):
        assert one.config[key] == other.config[key], key
    found, expected = (evaluate(run.path, device="cpu") for run in (one, other))
    assert (found.metrics, found.kinds, found.num_failed) == (expected.metrics, expected.kinds, expected.num_failed)
    assert found.per_class() == expected.per_class() and found.intervals() == expected.intervals()
    for field in ("scores", "targets", "trained_on"):
        np.testing.assert_array_equal(getattr(found.predictions, field), getattr(expected.predictions, field))
    assert found.predictions.class_names == KEPT
    assert found.predictions.video_ids == expected.predictions.video_ids


def epochs(run: Run) -> list[dict[str, Any]]:
    clock = ("seconds", "waiting_seconds", "read_bytes", "head")
    return [{key: value for key, value in line.items() if key not in clock} for line in run.metrics()]


def test_verb_and_noun_are_those_of_the_classes_that_stay(tmp_path: Path) -> None:
    """Verbs go by the name of the class, two classes to a verb."""
    verbs = {name: k // 2 for k, name in enumerate(CLASSES)}
    facts = {"label_names": {"verb": ["up", "across", "put", "never"]}}
    made = []
    for path, names in zip((tmp_path / "all.zarr", tmp_path / "kept.zarr"), (CLASSES, KEPT), strict=True):
        rows = videos() if names == CLASSES else {split: without(rows) for split, rows in videos().items()}

        def columns(labels: np.ndarray, names: tuple[str, ...] = names) -> dict[str, np.ndarray]:
            return {"verb": np.array([verbs[names[k]] for k in labels], dtype=np.int64)}

        named_store(path, names, rows, facts=facts, columns=columns)
        fields = {"leave_out": LEFT_OUT} if names == CLASSES else {}
        run = trained("linear", path, tmp_path / f"run-{len(names)}", {}, **fields)
        made.append(evaluate(run.path, device="cpu").kinds)
    assert made[0] == made[1] and [kind.kind for kind in made[0]] == ["verb"]


STORE = replace(manifest({"train": 1}), class_names=CLASSES)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ()),
        (("none",), ()),
        (("wave", "run"), ("run", "wave")),
        (("run", "run"), ("run",)),
        (("put, then take",), ("put, then take",)),
        (("run", "put", "then take", "wave"), ("run", "wave", "put, then take")),  # as lists of --set are read
        (("put", "then take"), ("put, then take",)),
    ],
)
def test_words_name_classes_in_the_order_of_the_store(words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert left_out_names(words, STORE) == expected
    kept = kept_classes(expected, STORE)
    assert (kept is None) == (not expected)
    assert kept is None or [CLASSES[k] for k in kept] == [name for name in CLASSES if name not in expected]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("split.txt", "wave\nput, then take\n"),
        ("split.json", '["wave", "put, then take"]'),
        ("split.csv", 'id,name\n1,wave\n0,"put, then take"\n'),
    ],
)
def test_a_word_may_be_a_file_of_names(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert left_out_names((str(tmp_path / name), "jump"), STORE) == ("jump", "wave", "put, then take")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("wav",), "--leave-out 'wav' is no class of the store, and no file. Did you mean 'wave'?"),
        (("xyz",), "no class of the store, and no file. There are: jump, run, clap hands, wave, put, then take, ..."),
        (("FILE",), "split.txt: 'runs' in it is no class of the store. Did you mean 'run'?"),
        (("BAD",), "bad.json gives no class names"),
        (CLASSES[1:], "--leave-out leaves 1 of the 5 classes of toy to train on. Leave out at most 3."),
    ],
)
def test_what_cannot_be_left_out_is_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    (tmp_path / "split.txt").write_text("wave\nruns\n")
    (tmp_path / "bad.json").write_text("{")
    files = {"FILE": str(tmp_path / "split.txt"), "BAD": str(tmp_path / "bad.json")}
    with pytest.raises(SettingError) as caught:
        left_out_names(tuple(files.get(word, word) for word in words), STORE)
    assert message in str(caught.value)


def test_a_run_keeps_the_names_and_older_configs_leave_nothing_out(tmp_path: Path) -> None:
    store, _ = two_stores(tmp_path)
    (tmp_path / "split.txt").write_text("wave\nrun\n")
    run = trained("linear", store, tmp_path / "run", {}, leave_out=(str(tmp_path / "split.txt"),))
    told = run.config["training"]
    assert TrainingConfig.from_json(told).leave_out == LEFT_OUT  # a resume needs no file
    assert TrainingConfig.from_json({key: told[key] for key in told if key != "leave_out"}).leave_out == ()


def test_other_classes_left_out_are_another_run(tmp_path: Path) -> None:
    store, _ = two_stores(tmp_path)
    run = trained("linear", store, tmp_path / "run", {}, leave_out=("wave",))
    other = trained("linear", store, tmp_path / "other", {}, leave_out=("jump",))
    with pytest.raises(RunError, match=r'left_out was \["wave"\] when it began and is \["jump"\] now'):
        run.check_same({**run.config, "left_out": other.config["left_out"]})


def test_no_video_of_the_classes_that_stay_is_said(tmp_path: Path) -> None:
    store = named_store(tmp_path / "s.zarr", ("a", "b", "c"), {"train": [("v0", "c"), ("v1", "c")]})
    with pytest.raises(SettingError, match="no readable video of the classes that are not left out to train on"):
        trained("linear", store, tmp_path / "run", {}, leave_out=("c",))


def test_a_sweep_varies_what_is_left_out_and_shares_batches_where_it_is_the_same(tmp_path: Path) -> None:
    store, _ = two_stores(tmp_path)
    (tmp_path / "half.txt").write_text("wave\nrun\n")
    grid = {"leave_out": ("none", "put,then take", str(tmp_path / "half.txt"), "run,wave")}
    settings = {"store": str(store), "device": "cpu", "epochs": "1", "batch_size": "4"}
    plan = plan_sweep(read_sweep("linear", settings, grid))
    assert [member.config.leave_out for member in plan.members] == [(), ("put, then take",), LEFT_OUT, LEFT_OUT]
    names = [member.name for member in plan.members]
    assert plan.groups == ((names[0],), (names[1],), (names[2], names[3]))


def test_the_command_says_what_is_left_out_and_a_misspelt_name(tmp_path: Path, vcache: Vcache) -> None:
    store, _ = two_stores(tmp_path)
    line = (
        f"train-head linear --store {store} --device cpu --epochs 1 --batch-size 4 --shots 3 --out {tmp_path / 'run'}"
    )
    status, _, err = vcache(f"{line} --leave-out jumping")
    assert (status, "Did you mean 'jump'?" in err) == (1, True)
    status, out, err = vcache(f"{line} --leave-out wave --leave-out 'put, then take' --json")
    assert status == 0, err
    assert "3 of 5 classes are trained on, without 'wave', 'put, then take'; " in err
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["left_out"] == ["wave", "put, then take"] and config["head_config"]["num_classes"] == 3
    assert json.loads(out)["num_train"] == config["num_train"] == 9
    status, _, err = vcache(
        f"sweep linear --store {store} --grid lr=0.1,0.2 --leave-out 'put, then take' --dry-run --json"
    )
    assert status == 0, err


def test_an_evaluation_says_whose_classes_it_is_of(tmp_path: Path) -> None:
    store, _ = two_stores(tmp_path)
    run = trained("linear", store, tmp_path / "run", {}, leave_out=("wave",))
    found = evaluate(run.path, device="cpu").predictions
    assert (found.of_classes, asdict(found)["trained_on"].tolist()) == ("trained", [True] * 4)


def test_a_video_of_a_class_left_out_is_explained_with_the_names_of_those_that_stay(
    float32_store: Path, tmp_path: Path
) -> None:
    settings = {"layers": "-1:", "temporal_cross_attention": "off"}
    run = trained("evl", float32_store, tmp_path / "run", settings, leave_out=("clap hands",))
    found = explain(run.path, Question(row=0, split="val"), device="cpu")
    assert found.truth == "clap hands"
    assert sorted(name for name, _ in found.predictions) == ["jump", "wave"]
