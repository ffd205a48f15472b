"""`vcache compare`: runs, or settings of several seeds, against a reference on the same videos.

Everything is paired: videos go by their ids and classes by their names, as in an ensemble. Differences are other - reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from vcache.pipelines.evaluation.average_precision import average_precisions
from vcache.pipelines.evaluation.bootstrap import Interval
from vcache.pipelines.evaluation.members import Members, read_members
from vcache.pipelines.evaluation.metrics import compute_metrics, target_ranks
from vcache.pipelines.reporting.compare_entrants import CompareError, entrants, group_names, groups_of, with_predictions
from vcache.pipelines.reporting.compare_paired import (
    Hits,
    difference_intervals,
    holm,
    mcnemar_exact,
    precision_intervals,
)
from vcache.pipelines.reporting.compare_seeds import seed_spread
from vcache.pipelines.reporting.comparison import (
    ClassDifference,
    Comparison,
    Contender,
    MeasureDifference,
    Pair,
    VideoDifference,
)

BEST = "best"
MOST_VIDEOS = 5
"""In either direction, of those on which two differ most."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `vcache compare` is asked."""

    runs: tuple[Path, ...]
    """Run folders, sweeps, or .npz files of predictions."""
    split: str | None = None
    views: str | None = None
    reference: str | None = None
    """Name of a run or setting as the comparison calls it, or BEST; the first one otherwise."""
    each: bool = False
    """Every run by itself, seeds of one setting too."""
    common: bool = False
    """Leave out the videos that some lack."""
    seed: int = 0
    """Of the bootstrap."""
    device: str = "auto"
    """Where runs are evaluated that were not so far."""


def run_comparison(
    config: CompareConfig,
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Comparison:
    """Find or make the predictions, align them, and compare each contender with the reference.

    Raises:
        CompareError: fewer than two are named, or no contender has the name of the reference.
        EnsembleError: predictions are missing, or of other videos, classes or targets.
    """
    found = entrants(config.runs, on_note)
    if len(found) < 2:
        raise CompareError(
            f"a comparison takes two runs at least, and {config.runs[0]} is one. Name another behind it, or a sweep."
        )
    ready = with_predictions(
        found, split=config.split, views=config.views, device=config.device, on_stage=on_stage, on_note=on_note
    )
    on_stage("comparing")
    members = read_members([entrant.path for entrant in ready], common=config.common)
    groups = groups_of(found, each=config.each)
    names = group_names(found, members.names, groups)
    notes = (*members.notes, *_notes_on_files(members))
    for note in notes:
        on_note(note)
    sides = [_Side(members, name, places) for name, places in zip(names, groups, strict=True)]
    reference = _reference(sides, config.reference)
    pairs = [_pair(reference, side, config.seed) for side in sides if side is not reference]
    return Comparison(
        contenders=tuple(side.contender for side in sides),
        reference=reference.contender,
        chosen_best=config.reference == BEST,
        pairs=tuple(_corrected(pairs)),
        num_videos=len(members.targets),
        num_classes=members.said[0].scores.shape[1],
        split=members.first.split,
        views=members.first.views,
        notes=notes,
    )


class _Side:
    """A contender with what its runs say of the videos."""

    def __init__(self, members: Members, name: str, places: Sequence[int]) -> None:
        self.members, self.places = members, places
        self.scores = [torch.from_numpy(members.said[place].scores) for place in places]
        self.contender = Contender(
            name=name,
            runs=tuple(members.names[place] for place in places),
            metrics=tuple(compute_metrics(scores, members.targets) for scores in self.scores),
        )

    @property
    def hits(self) -> Hits:
        ranks = torch.stack([target_ranks(scores, self.members.targets) for scores in self.scores])
        top1, top5 = ((ranks < most).double().mean(dim=0).numpy() for most in (1, 5))
        return Hits(top1=top1, top5=top5)

    @property
    def certainty(self) -> Float[np.ndarray, " M"]:
        """Of each video the probability that is given to its class, or to its classes; a mean over the runs."""
        return np.mean([self._certainty(place) for place in self.places], axis=0)

    def _certainty(self, place: int) -> Float[np.ndarray, " M"]:
        targets, p = self.members.targets, self.members.probabilities[place]
        if not self.members.multi_label:
            return p.gather(1, targets[:, None])[:, 0].numpy()
        of_truth = torch.where(targets > 0, p, self.members.complements[place])
        return of_truth.clamp_min(1e-300).log().mean(dim=1).exp().numpy()


def _reference(sides: Sequence[_Side], name: str | None) -> _Side:
    if name is None:
        return sides[0]
    if name == BEST:
        measure = _measures(sides[0].members)[0]
        return max(sides, key=lambda side: side.contender.mean(measure))
    for side in sides:
        if side.contender.name == name:
            return side
    there = ", ".join(repr(side.contender.name) for side in sides)
    raise CompareError(f"--reference {name}: nothing is called so. There are: {there}; or say {BEST}.")


def _measures(members: Members) -> tuple[str, ...]:
    if members.multi_label:
        return ("mean_average_precision",)
    several = members.probabilities[0].shape[1] > 5  # of five classes every one is in the top five
    return ("top1", *(["top5"] if several else []), "mean_class_accuracy")


def _pair(reference: _Side, other: _Side, seed: int) -> Pair:
    gained, lost = _videos(reference, other)
    if reference.members.multi_label:
        measures, classes = _of_precisions(reference, other, seed)
        return Pair(
            other=other.contender.name,
            measures=measures,
            p_holm=None,
            both_right=None,
            neither_right=None,
            classes=classes,
            gained=gained,
            lost=lost,
        )
    first, second = reference.hits, other.hits
    targets = reference.members.targets.numpy()
    intervals = difference_intervals(first, second, targets, seed=seed)
    single = len(reference.places) == len(other.places) == 1
    hits = {"top1": (first.top1, second.top1), "top5": (first.top5, second.top5)}
    measures = tuple(
        _measured(reference, other, name, intervals[name], hits.get(name) if single else None)
        for name in _measures(reference.members)
    )
    return Pair(
        other=other.contender.name,
        measures=measures,
        p_holm=None,
        both_right=int((first.top1 * second.top1).sum()) if single else None,
        neither_right=int(((1 - first.top1) * (1 - second.top1)).sum()) if single else None,
        classes=_classes(reference.members, first.top1, second.top1, counted=single),
        gained=gained,
        lost=lost,
    )


def _measured(
    reference: _Side, other: _Side, name: str, interval: Interval, hits: tuple[np.ndarray, np.ndarray] | None = None
) -> MeasureDifference:
    """`hits` of two single runs, of which McNemar's test can be made."""
    old, new = reference.contender, other.contender
    only = _only(*hits) if hits else (None, None)
    spread = seed_spread(old.values(name), new.values(name)) if len(old.runs) + len(new.runs) > 2 else None
    return MeasureDifference(
        measure=name,
        reference=old.mean(name),
        other=new.mean(name),
        difference=new.mean(name) - old.mean(name),
        interval=interval,
        only_reference=only[0],
        only_other=only[1],
        p_value=mcnemar_exact(*_only(*hits)) if hits else None,
        seeds=spread,
    )


def _only(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    return int((first > second).sum()), int((second > first).sum())


def _classes(
    members: Members, first: Float[np.ndarray, " M"], second: Float[np.ndarray, " M"], *, counted: bool
) -> tuple[ClassDifference, ...]:
    rows, targets = [], members.targets.numpy()
    only = {k: _only(first[targets == k], second[targets == k]) for k in np.unique(targets).tolist()}
    p_values = {k: mcnemar_exact(*counts) for k, counts in only.items()} if counted else {}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    for k, counts in only.items():
        of_class = targets == k
        old, new = float(first[of_class].mean()), float(second[of_class].mean())
        rows.append(
            ClassDifference(
                name=_class_name(members, k),
                num_videos=int(of_class.sum()),
                reference=old,
                other=new,
                difference=new - old,
                only_reference=counts[0] if counted else None,
                only_other=counts[1] if counted else None,
                p_value=p_values.get(k),
                p_holm=corrected.get(k),
            )
        )
    return tuple(sorted(rows, key=lambda row: row.difference))


def _of_precisions(
    reference: _Side, other: _Side, seed: int
) -> tuple[tuple[MeasureDifference, ...], tuple[ClassDifference, ...]]:
    """mAP, and the average precision of each class."""
    members = reference.members
    relevant = members.targets.numpy() > 0
    first, second = ([scores.numpy() for scores in side.scores] for side in (reference, other))
    overall, of_classes = precision_intervals(first, second, relevant, seed=seed)
    old, new = (np.mean([average_precisions(x, relevant) for x in side], axis=0) for side in (first, second))
    rows = [
        ClassDifference(
            name=_class_name(members, k),
            num_videos=int(relevant[:, k].sum()),
            reference=float(old[k]),
            other=float(new[k]),
            difference=float(new[k] - old[k]),
            interval=interval,
        )
        for k, interval in enumerate(of_classes)
        if interval is not None
    ]
    measure = _measured(reference, other, "mean_average_precision", overall)
    return (measure,), tuple(sorted(rows, key=lambda row: row.difference))


def _videos(reference: _Side, other: _Side) -> tuple[tuple[VideoDifference, ...], tuple[VideoDifference, ...]]:
    """Those on which the other is most ahead, and those on which the reference is."""
    old, new, first = reference.certainty, other.certainty, reference.members.first
    targets = reference.members.targets

    def told(row: int) -> VideoDifference:
        labels = [int(targets[row])] if targets.ndim == 1 else targets[row].nonzero()[:, 0].tolist()
        return VideoDifference(
            video=first.video_ids[row] if first.video_ids else f"row {row}",
            label="; ".join(_class_name(reference.members, k) for k in labels),
            reference=float(old[row]),
            other=float(new[row]),
        )

    order = np.argsort(new - old, kind="stable")
    gained = [row for row in order[::-1][:MOST_VIDEOS].tolist() if new[row] > old[row]]
    lost = [row for row in order[:MOST_VIDEOS].tolist() if new[row] < old[row]]
    return tuple(map(told, gained)), tuple(map(told, lost))


def _class_name(members: Members, k: int) -> str:
    return str(k) if members.class_names is None else members.class_names[k]


def _corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """With the p-values of the first measure, McNemar's or of seeds Welch's, corrected over the pairs that have one."""
    found = {pair.other: value for pair in pairs if (value := pair.measures[0].tested) is not None}
    corrected = dict(zip(found, holm(list(found.values())), strict=True))
    return [replace(pair, p_holm=corrected.get(pair.other)) for pair in pairs]


def _notes_on_files(members: Members) -> list[str]:
    """What differs between evaluations that are compared all the same."""
    notes = []
    for field, words in (("split", "splits"), ("views", "views"), ("average", "averages of views")):
        told = {getattr(says, field) for says in members.said}
        if field == "average" and {says.views for says in members.said} <= {"1x1", ""}:
            continue
        if len(told - {""}) > 1:
            listed = ", ".join(
                f"{name} {getattr(says, field)}" for name, says in zip(members.names, members.said, strict=True)
            )
            notes.append(f"they were evaluated on other {words}: {listed}. That is part of what is compared.")
    return notes
