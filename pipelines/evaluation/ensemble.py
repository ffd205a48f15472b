"""The weighted average of several models' probabilities for each video, as EVL's Tables 10, 11, 13 and 14.

"Ensemble is done by weighted averaging the video-level prediction scores and the average weight alpha in [0, 1] is searched
with a coarse granularity of 0.1 on the validation set" (Lin et al. 2022, section 4.4). What is averaged here is the
probabilities of each video, after its views were averaged. The paper reports on the videos on which alpha was chosen, which is
optimistic; `tune_on` chooses on others. Differs: more than two models may take part, with all weights of the same step that
sum to 1, and of equally good weights those nearest to equal ones are chosen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vcache.pipelines.evaluation.alignment import EnsembleError
from vcache.pipelines.evaluation.members import Members, find_predictions, read_members
from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics
from vcache.pipelines.evaluation.predictions import Predictions

HALF = "half"
MAX_COMBINATIONS = 1001
"""Five members in steps of 0.1. Each is measured on all videos, Kinetics-400 in a third of a second."""


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """What `vcache ensemble` is asked."""

    members: tuple[Path, ...]
    """Run folders or .npz files."""
    split: str | None = None
    views: str | None = None
    """Which of a run's predictions: those of this split, and of these views."""
    weights: tuple[float, ...] | None = None
    """One for each member, rather than a search; they are divided by their sum."""
    step: float = 0.1
    tune_on: tuple[str, ...] = ()
    """Where the weights are chosen: nothing, on the videos reported on; "half", on a half of them, reporting on the other; else
    other predictions of the members, in their order."""
    seed: int = 0
    """Of the half."""
    common: bool = False
    """Leave out the videos that some members lack."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Weights, and the measure that they reach where they are chosen."""

    weights: tuple[float, ...]
    value: float


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The average with the chosen weights."""

    members: tuple[str, ...]
    measure: str
    """What was compared: top-1, or mAP where videos have several classes."""
    combinations: tuple[Combination, ...]
    best: Combination
    metrics: Metrics
    alone: tuple[Metrics, ...]
    """Of each member on the same videos as `metrics`."""
    num_tuned: int
    """Videos on which the weights were chosen; 0 if they were given."""
    optimistic: bool
    """Whether these are the videos of `metrics`."""
    notes: tuple[str, ...]
    predictions: Predictions
    """Of all videos, those that the weights were chosen on among them."""


def run_ensemble(config: EnsembleConfig, on_note: Callable[[str], None] = lambda note: None) -> Ensemble:
    """Choose the weights, or take those given, and measure the average.

    `on_note` hears, in a sentence each, what could not be checked.

    Raises:
        EnsembleError: the members do not go together, or there are too many combinations.
    """
    _check(config)
    paths = [find_predictions(path, split=config.split, views=config.views) for path in config.members]
    members = read_members(paths, common=config.common)
    tuning, reported = _tuning_and_reported(config, members)
    notes = tuple(dict.fromkeys([*members.notes, *tuning.notes]))
    for note in notes:
        on_note(note)
    combinations = tuple(_measured(tuning, weights) for weights in _weights_to_try(config))
    best = max(combinations, key=_rank)
    each_alone = torch.eye(len(paths), dtype=torch.float64).tolist()
    metrics = _metrics(reported, best.weights)
    return Ensemble(
        members=members.names,
        measure=metrics.monitored_name,
        combinations=combinations,
        best=best,
        metrics=metrics,
        alone=tuple(_metrics(reported, weights) for weights in each_alone),
        num_tuned=0 if config.weights else len(tuning.targets),
        optimistic=not config.weights and tuning is reported,
        notes=notes,
        predictions=_predictions(members, best.weights),
    )


def parse_weights(text: str) -> tuple[float, ...]:
    """ "0.3,0.7" as numbers."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise EnsembleError(f"--weights {text}: numbers are expected, one for each member, as 0.3,0.7.") from error


def simplex(num_members: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All weights k / steps, k = 0 ... steps, that sum to 1; of two members the first one's go from 0 to 1."""
    for parts in _compositions(num_members, steps):
        yield tuple(part / steps for part in parts)


def num_combinations(num_members: int, steps: int) -> int:
    """How many `simplex` gives."""
    return math.comb(steps + num_members - 1, num_members - 1)


def average(members: Members, weights: Sequence[float]) -> Float[Tensor, "M K"]:
    """Scores, of which softmax (of several classes a video, sigmoid) makes the weighted mean of the members' probabilities."""
    p = _weighted(members.probabilities, weights)
    # A probability of 0, which a file may hold, has a finite score too.
    scores = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    if members.multi_label:
        scores -= _weighted(members.complements, weights).clamp_min(torch.finfo(p.dtype).tiny).log()
    return scores


def _weights_to_try(config: EnsembleConfig) -> list[tuple[float, ...]]:
    if config.weights:
        return [tuple(weight / sum(config.weights) for weight in config.weights)]
    return list(simplex(len(config.members), round(1 / config.step)))


def _compositions(num_parts: int, total: int) -> Iterator[tuple[int, ...]]:
    if num_parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(num_parts - 1, total - first):
            yield (first, *rest)


def _check(config: EnsembleConfig) -> None:
    num = len(config.members)
    if num < 2:
        raise EnsembleError(f"an ensemble has two members at least, and {num} is named.")
    if config.weights is not None:
        if config.tune_on:
            raise EnsembleError("--weights says what --tune-on would choose. Leave one of them out.")
        if len(config.weights) != num:
            raise EnsembleError(
                f"--weights has {len(config.weights)} numbers for {num} members. Give one for each, in their order."
            )
        if not (min(config.weights) >= 0 and 0 < sum(config.weights) < math.inf):
            raise EnsembleError(f"--weights {_joined(config.weights)}: weights are 0 or more, and not all of them 0.")
        return
    _check_step(num, config.step)


def _check_step(num: int, step: float) -> None:
    steps = round(1 / step) if 0 < step < math.inf else 0
    if steps < 1 or not math.isclose(steps * step, 1):
        raise EnsembleError(f"--step {step:g} does not divide 1. Give 0.1, 0.05 or 0.25.")
    if (combinations := num_combinations(num, steps)) > MAX_COMBINATIONS:
        raise EnsembleError(
            f"{num} members in steps of {step:g} have {combinations:,} combinations of weights, and {MAX_COMBINATIONS:,} is "
            "the most that are tried. Choose a larger step, as --step 0.25, or give --weights."
        )


def _tuning_and_reported(config: EnsembleConfig, members: Members) -> tuple[Members, Members]:
    """The videos to choose the weights on, and those to report on: the same object where they are the same."""
    if config.weights or not config.tune_on:
        return members, members
    if config.tune_on == (HALF,):
        return _halves(members, config.seed)
    if len(config.tune_on) != len(config.members):
        raise EnsembleError(
            f"--tune-on has {len(config.tune_on)} files for {len(config.members)} members. Give one for each, in their order, or "
            f"--tune-on {HALF}."
        )
    tuning = read_members([find_predictions(Path(path)) for path in config.tune_on], common=config.common)
    _check_tuning(tuning, members)
    return tuning, members


def _check_tuning(tuning: Members, members: Members) -> None:
    if (
        tuning.multi_label != members.multi_label
        or tuning.probabilities[0].shape[1] != members.probabilities[0].shape[1]
    ):
        raise EnsembleError(
            "--tune-on names predictions for other classes than the members'. Name those of another split."
        )
    if tuning.first.video_ids is None or members.first.video_ids is None:
        return
    if both := set(tuning.first.video_ids) & set(members.first.video_ids):
        raise EnsembleError(
            f"--tune-on: {len(both)} of its videos are reported on, too ({min(both)}). Name predictions of another split, or say "
            f"--tune-on {HALF}."
        )


def _halves(members: Members, seed: int) -> tuple[Members, Members]:
    """Two halves of the videos, the same ones whatever order the files have them in."""
    num_videos = len(members.targets)
    if num_videos < 2:
        raise EnsembleError(f"--tune-on {HALF} takes two videos at least; there is {num_videos}.")
    ids = members.first.video_ids
    order = list(range(num_videos)) if ids is None else sorted(range(num_videos), key=ids.__getitem__)
    drawn = torch.randperm(num_videos, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor(order)[drawn]
    return members.only(rows[: num_videos // 2].sort().values), members.only(rows[num_videos // 2 :].sort().values)


def _weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total.add_(part, alpha=weight)
    return total


def _metrics(members: Members, weights: Sequence[float]) -> Metrics:
    return compute_metrics(average(members, weights), members.targets, views=members.first.views)


def _measured(members: Members, weights: tuple[float, ...]) -> Combination:
    return Combination(weights=weights, value=_metrics(members, weights).monitored)


def _rank(combination: Combination) -> tuple[float, float]:
    """The best measure; among equals, the weights nearest to equal ones."""
    return combination.value, -sum(weight * weight for weight in combination.weights)


def _predictions(members: Members, weights: Sequence[float]) -> Predictions:
    told = ", ".join(f"{weight:g} {name}" for weight, name in zip(weights, members.names, strict=True))
    targets = members.targets.numpy()
    return Predictions(
        scores=average(members, weights).float().numpy(),
        video_ids=members.first.video_ids,
        paths=members.first.paths,
        targets=targets.astype("uint8") if members.multi_label else targets,
        class_names=members.class_names,
        split=members.first.split,
        views=members.first.views,
        average="ensemble",
        kind="sigmoid" if members.multi_label else "softmax",
        store_key=members.first.store_key,
        run=f"ensemble of {told}",
        of_classes=members.first.of_classes,
        trained_on=members.first.trained_on,
    )


def _joined(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
