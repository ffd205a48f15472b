"""Halves of the classes told apart among themselves: against the arithmetic of Text4Vis's test_zeroshot.py at d61b34d."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from named import E, NamedHead
from worded import CLASSES, clip_scores, cosines_100, embeddings, labels_of, softmax, text_of, worded_store

from vcache.heads import registry
from vcache.pipelines.evaluation.class_choice import ClassChoice
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.evaluation.half_classes import HalfClasses, HalfClassesError, draw_halves, half_metrics
from vcache.pipelines.evaluation.head_evaluation import evaluate_head
from vcache.pipelines.runs import RunError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.pipelines.zero_shot import ZeroShotConfig, zero_shot
from vcache.store.reader import FeatureStore

Vcache = Callable[..., tuple[int, str, str]]
K = len(CLASSES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return worded_store(tmp_path_factory.mktemp("halves") / "b.zarr", dataset="other")


def official(
    scores_of: Callable[[list[int]], Float[np.ndarray, "M half"]], labels: Int[np.ndarray, " M"]
) -> dict[str, tuple[float, float]]:
    """Mean and deviation of ten draws; `scores_of` gives those of some classes for all videos."""
    found: dict[str, list[float]] = {"top1": [], "top5": [], "loss": []}
    for draw in range(10):
        np.random.seed(draw)
        taken = sorted(np.random.permutation(K)[: K // 2])
        rows = [i for i, label in enumerate(labels) if label in taken]
        scores = scores_of(taken)[rows]
        best = np.argsort(-scores, axis=1)
        own = [taken.index(labels[i]) for i in rows]
        found["top1"].append(np.mean([own[i] == best[i][0] for i in range(len(rows))]))
        found["top5"].append(np.mean([own[i] in best[i][:5] for i in range(len(rows))]))
        found["loss"].append(np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[range(len(rows)), own]))
    return {name: (float(np.mean(values)), float(np.std(values))) for name, values in found.items()}


def shown(halves: HalfClasses | None) -> dict[str, tuple[float | None, float | None]]:
    assert halves is not None
    return {name: (halves.mean(name), halves.deviation(name)) for name in ("top1", "top5", "loss")}


def near(values: dict[str, tuple[float, float]]) -> dict[str, object]:
    return {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in values.items()}


@pytest.mark.parametrize("templates", ["label", "five"])
@pytest.mark.parametrize("ensemble", ["embeddings", "probabilities"])
def test_halves_are_those_of_the_official_arithmetic(store: Path, ensemble: str, templates: str) -> None:
    """Of probabilities, each half has a softmax of its own: a part of that of all classes would rank videos otherwise."""
    config = ZeroShotConfig(
        store=store, templates=(templates,), ensemble=ensemble, half_classes=True, device="cpu", batch_size=9
    )
    evaluation = zero_shot(config).rows[0].evaluation
    x, text, labels = embeddings(), text_of(CLASSES, templates), labels_of(store)

    def scores(taken: list[int]) -> Float[np.ndarray, "M half"]:
        scores = clip_scores(x, text[taken], ensemble)
        return scores if ensemble == "embeddings" else np.log(scores)

    expected = official(scores, labels)
    assert evaluation.half_classes is not None and evaluation.half_classes.num_classes == 6
    assert shown(evaluation.half_classes) == near(expected)
    assert expected["top1"][1] > 0 and expected["top5"][0] < 1
    hits = clip_scores(x, text, ensemble).argmax(axis=1) == labels  # the head is left with all classes
    assert evaluation.metrics.top1 == pytest.approx(hits.mean())


@pytest.mark.parametrize("views", [(1, 1), (3, 1)])
def test_of_a_head_that_does_not_say_its_embedding_the_outputs_are_taken(store: Path, views: tuple[int, int]) -> None:
    config = NamedHead.Config(num_classes=K, embed_dim=E)
    asked = ClassChoice(which="all", names=CLASSES, templates="label")
    with FeatureStore.open(store) as opened:
        evaluation = evaluate_head(
            NamedHead(config),
            opened,
            name="named",
            requirements=NamedHead.requires(config),
            asked=asked,
            split="val",
            views=views,
            half_classes=True,
            batch_size=7,
        )
    x, text, factor = (
        embeddings(views=(0,) if views == (1, 1) else (3, 4, 5)),
        text_of(CLASSES, "label"),
        np.exp(2) / 100,
    )

    def scores(taken: list[int]) -> Float[np.ndarray, "M half"]:
        logits = factor * cosines_100(x, text[taken, 0])
        return np.log(np.mean(softmax(logits), axis=0))

    assert shown(evaluation.half_classes) == near(official(scores, labels_of(store)))


def trained(out: Path, store: Path, head: str, settings: dict[str, object], leave_out: Sequence[str] = ()) -> Path:
    """By steps that change next to nothing."""
    given = {"epochs": 1, "batch_size": 6, "lr": 1e-9, **settings}
    config = TrainingConfig(head=head, store=store, out=out, device="cpu", settings=given, leave_out=tuple(leave_out))
    train_head(config)
    return out


HEADS = {
    "text4vis": ({"temporal": "tap", "templates": "five"}, "embeddings"),
    "actionclip": ({"prompt": "meanp", "templates": "five"}, "probabilities"),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_run_is_evaluated_on_halves_of_another_datasets_classes(store: Path, tmp_path: Path, head: str) -> None:
    """Nothing in these heads is trained but the logit scale: what they say is what CLIP says without training."""
    settings, ensemble = HEADS[head]
    source = worded_store(tmp_path / "a.zarr", ("dig", "jump", "sew", "wave"), num_videos=8)
    run = trained(tmp_path / "run", source, head, settings)
    found = evaluate(run, store=store, classes="all", half_classes=True, device="cpu")
    config = ZeroShotConfig(store=store, templates=("five",), ensemble=ensemble, half_classes=True, device="cpu")
    before = zero_shot(config).rows[0].evaluation
    np.testing.assert_allclose(found.predictions.scores, before.predictions.scores, rtol=1e-4, atol=1e-3)
    assert found.dataset == "other" and found.predictions.class_names == CLASSES
    np.testing.assert_allclose([*shown(found.half_classes).values()], [*shown(before.half_classes).values()], rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_left_out_classes_have_a_row_without_training(store: Path, tmp_path: Path, head: str) -> None:
    """The protocol of K300/K100: trained without some classes, and evaluated on them; beside it zero-shot on the same."""
    settings, ensemble = HEADS[head]
    unseen = ("wave", "run", "nod", "sit", "bow")
    run = trained(tmp_path / "run", store, head, settings, leave_out=unseen)
    file = tmp_path / "unseen.txt"
    file.write_text("\n".join(unseen))
    found = evaluate(run, classes="left-out", half_classes=True, device="cpu")
    config = ZeroShotConfig(
        store=store, templates=("five",), ensemble=ensemble, classes=file, half_classes=True, device="cpu"
    )
    before = zero_shot(config).rows[0].evaluation
    assert found.predictions.video_ids == before.predictions.video_ids and len(found.predictions) < 40
    assert found.predictions.class_names == before.predictions.class_names == tuple(k for k in CLASSES if k in unseen)
    np.testing.assert_allclose(found.predictions.scores, before.predictions.scores, rtol=1e-4, atol=1e-3)
    assert found.half_classes is not None and found.half_classes.num_classes == 2


def test_halves_need_text_and_classes_that_are_not_those_trained_on(
    store: Path, tmp_path: Path, vcache: Vcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._HEADS, "named", NamedHead)
    run = trained(tmp_path / "named", store, "named", {"templates": "label"})
    with pytest.raises(RunError, match="--half-classes .* Say which:  --classes all  or  --classes left-out"):
        evaluate(run, half_classes=True, device="cpu")
    status, out, _ = vcache(f"eval {run} --classes all --half-classes --device cpu --no-save")
    assert status == 0
    assert "half-class top-1" in out and "half-class top-5" in out
    assert "half-class: mean and deviation over 10 draws of 6 of the classes" in out
    linear = trained(tmp_path / "linear", store, "linear", {})
    with pytest.raises(RunError, match="head 'linear' .* has outputs for the classes that it was trained on"):
        evaluate(linear, half_classes=True, device="cpu")


def test_draws_are_numpys_permutations() -> None:
    for num_classes in (4, 7, 101):
        for seed, half in enumerate(draw_halves(num_classes)):
            np.random.seed(seed)
            assert half == tuple(sorted(np.random.permutation(num_classes)[: num_classes // 2]))


def test_too_few_classes_or_videos_are_refused() -> None:
    with pytest.raises(HalfClassesError, match="half of 3 classes leaves nothing to tell apart; 4 classes are needed"):
        draw_halves(3)
    halves = draw_halves(4)
    targets = torch.tensor([k for k in range(4) if k not in halves[0]])
    with pytest.raises(HalfClassesError, match="none of the videos is of the 2 classes that draw 0 takes"):
        half_metrics([torch.zeros(2, 2)] * 10, halves, targets)


def test_of_videos_with_several_classes_the_precision_of_each_half_is_averaged(tmp_path: Path) -> None:
    store = worded_store(tmp_path / "several.zarr", several=True)
    config = ZeroShotConfig(store=store, templates=("label",), half_classes=True, device="cpu")
    evaluation = zero_shot(config).rows[0].evaluation
    halves = evaluation.half_classes
    assert halves is not None and halves.mean("top1") is None and halves.deviation("top5") is None
    precisions = np.array([row.average_precision for row in evaluation.per_class()])
    expected = [precisions[list(half)].mean() for half in draw_halves(K)]
    assert halves.mean("mean_average_precision") == pytest.approx(np.mean(expected))
    assert halves.deviation("mean_average_precision") == pytest.approx(np.std(expected))
