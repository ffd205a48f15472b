"""What a comparison finds: contenders, and of each one its difference from the reference. Differences are other - reference."""

import statistics
from dataclasses import dataclass

from vcache.pipelines.evaluation.bootstrap import Interval
from vcache.pipelines.evaluation.metrics import Metrics
from vcache.pipelines.reporting.compare_seeds import SeedSpread


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A run, or a setting with the runs of its seeds."""

    name: str
    runs: tuple[str, ...]
    metrics: tuple[Metrics, ...]
    """Of each run."""

    def values(self, measure: str) -> list[float]:
        """Of each run, in 0..1."""
        return [getattr(metrics, measure) for metrics in self.metrics]

    def mean(self, measure: str) -> float:
        return statistics.fmean(self.values(measure))


@dataclass(frozen=True, kw_only=True)
class MeasureDifference:
    """One metric of both, in 0..1; the counts are of videos that one of them alone has right."""

    measure: str
    reference: float
    other: float
    difference: float
    interval: Interval
    """Over the videos, with the trainings as they are."""
    only_reference: int | None = None
    only_other: int | None = None
    p_value: float | None = None
    """McNemar's exact test; None for means over seeds, mean class accuracy and mAP."""
    seeds: SeedSpread | None = None
    """Where one of them is a mean over seeds."""

    @property
    def tested(self) -> float | None:
        """The p-value of the test that was made: McNemar's, over seeds Welch's; None if neither could be."""
        return self.p_value if self.seeds is None else self.seeds.p_value


@dataclass(frozen=True, kw_only=True)
class ClassDifference:
    """One class that has videos: top-1, or where videos have several classes the average precision."""

    name: str
    num_videos: int
    reference: float
    other: float
    difference: float
    only_reference: int | None = None
    only_other: int | None = None
    p_value: float | None = None
    p_holm: float | None = None
    """Corrected over the classes."""
    interval: Interval | None = None
    """Of an average precision, not corrected."""


@dataclass(frozen=True, kw_only=True)
class VideoDifference:
    """A video, and the probability that each gives its class, a mean over seeds; of several classes, to each of them right or
    wrong, in the geometric mean."""

    video: str
    label: str
    reference: float
    other: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One contender against the reference."""

    other: str
    measures: tuple[MeasureDifference, ...]
    """The one that settings are compared by first."""
    p_holm: float | None
    """What `tested` is of the first measure, corrected over the comparisons."""
    both_right: int | None
    neither_right: int | None
    classes: tuple[ClassDifference, ...]
    """By their difference, the least first."""
    gained: tuple[VideoDifference, ...]
    lost: tuple[VideoDifference, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of it."""

    contenders: tuple[Contender, ...]
    """In the order named; settings of a sweep in its order."""
    reference: Contender
    chosen_best: bool
    """Whether the reference was chosen by these very videos."""
    pairs: tuple[Pair, ...]
    num_videos: int
    num_classes: int
    split: str
    views: str
    notes: tuple[str, ...]
