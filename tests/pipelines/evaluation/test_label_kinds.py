"""Verb and noun of an action, read off a store of EPIC's form and marginalised."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from viewed import manifest

from vcache.pipelines.evaluation.label_kinds import KindMetrics, LabelKind, kind_metrics, label_kinds, marginalised
from vcache.store.manifest import VideoTable
from vcache.store.reader import FeatureStore
from vcache.store.writer import create_store

VERBS, NOUNS = ("take", "put", "wash", "mix"), ("cup", "pan")
PAIRS = ((0, 0), (0, 1), (1, 0), (2, 1), (3, 0))
"""Verb and noun of each class; no stored video has the last class."""
MakeStore = Callable[..., FeatureStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """make_store(train=(0, 1, ...), val=...): classes of the videos; `other_verb` is that of the last of each split."""

    def make(other_verb: int | None = None, **splits: tuple[int, ...]) -> FeatureStore:
        tables = {}
        for split, classes in splits.items():
            ids = tuple(f"{split}{row}" for row in range(len(classes)))
            columns = {
                kind: np.array([PAIRS[k][i] for k in classes], dtype=np.int64)
                for i, kind in enumerate(("verb", "noun"))
            }
            if other_verb is not None:
                columns["verb"][-1] = other_verb
            tables[split] = VideoTable(ids, ids, np.array(classes, dtype=np.int64), columns)
        plain = manifest({split: len(classes) for split, classes in splits.items()})
        facts = plain.facts | {"label_names": {"noun": list(NOUNS), "verb": list(VERBS)}}
        names = tuple(f"{VERBS[verb]} {NOUNS[noun]}" for verb, noun in PAIRS)
        create_store(tmp_path / "epic.zarr", replace(plain, class_names=names, facts=facts), tables)
        return FeatureStore.open(tmp_path / "epic.zarr")

    return make


def test_the_verb_of_a_class_is_what_any_split_says_of_it(make_store: MakeStore) -> None:
    with make_store(train=(0, 2, 1), val=(2, 3, 2, 0)) as store:
        noun, verb = label_kinds(store, "val", np.array([0, 1, 3]))
    assert (noun.name, noun.value_names, verb.name, verb.value_names) == ("noun", NOUNS, "verb", VERBS)
    assert (verb.of_class.tolist(), noun.of_class.tolist()) == ([0, 0, 1, 2, -1], [0, 1, 0, 1, -1])
    assert (verb.targets.tolist(), noun.targets.tolist()) == ([1, 2, 0], [0, 1, 0])


def test_a_kind_of_which_a_class_has_two_values_is_left_out_and_it_is_said(make_store: MakeStore) -> None:
    notes: list[str] = []
    with make_store(other_verb=3, train=(0, 1, 2, 3), val=(3, 0)) as store:
        kinds = label_kinds(store, "val", np.arange(2), notes.append)
    assert [kind.name for kind in kinds] == ["noun"]
    assert notes == ["verb accuracy is left out: the videos of class 'take cup' have more than one verb."]


def test_a_kind_that_no_video_of_the_split_has_is_left_out(make_store: MakeStore) -> None:
    with make_store(other_verb=-1, train=(0, 1), val=(2,)) as store:
        assert [kind.name for kind in label_kinds(store, "val", np.arange(1))] == ["noun"]


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_of_the_classes_with_a_verb_are_summed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, targets = rng.normal(size=(23, 7)), rng.integers(0, 6, 23)
    of_class = np.array([2, 0, 5, 2, -1, 0, 3])
    kind = LabelKind(name="verb", value_names=tuple("abcdef"), of_class=of_class, targets=targets)
    classes = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    expected = np.stack([classes[:, of_class == value].sum(axis=1) for value in range(6)], axis=1)
    np.testing.assert_allclose(marginalised(torch.from_numpy(scores), kind).exp(), expected, rtol=1e-12)
    metrics = kind_metrics(torch.from_numpy(scores), kind)
    assert (metrics.kind, metrics.num_videos) == ("verb", 23)
    assert metrics.top1 == pytest.approx(accuracy_score(targets, expected.argmax(axis=1)))
    assert metrics.top5 < 1  # six values, of which some are in no class


def test_two_actions_together_can_say_another_verb_than_the_best_action() -> None:
    kind = LabelKind(name="verb", value_names=("a", "b"), of_class=np.array([0, 1, 1]), targets=np.array([1, -1]))
    scores = torch.tensor([[0.4, 0.3, 0.3], [0.4, 0.3, 0.3]]).log()
    assert kind_metrics(scores, kind) == KindMetrics(kind="verb", num_videos=1, top1=1.0, top5=1.0)


def test_probabilities_that_no_float_can_hold_keep_their_order() -> None:
    kind = LabelKind(name="verb", value_names=("a", "b", "c"), of_class=np.array([0, 1, 2]), targets=np.array([1]))
    logs = marginalised(torch.tensor([[0.0, -2000.0, -3000.0]]), kind)
    assert logs.tolist() == [[0.0, -2000.0, -3000.0]]


def test_a_store_of_one_kind_of_label_has_no_others(tmp_path: Path) -> None:
    table = VideoTable(("v",), ("v",), np.zeros(1, dtype=np.int64))
    create_store(tmp_path / "plain.zarr", manifest({"val": 1}), {"val": table})
    with FeatureStore.open(tmp_path / "plain.zarr") as store:
        assert label_kinds(store, "val", np.array([0])) == ()
