"""What can be concluded from a comparison, and what cannot, in sentences."""

from collections.abc import Sequence

from vcache.pipelines.evaluation.bootstrap import Interval
from vcache.pipelines.reporting.comparison import Comparison, MeasureDifference, Pair

ALPHA = 0.05
"""A p-value below it is called a difference, as an interval of 95% without zero is."""
WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class",
    "mean_average_precision": "mAP",
}


def conclusions(comparison: Comparison) -> list[str]:
    """A sentence for each contender, then what holds for all of them."""
    return [*(_verdict(comparison, pair) for pair in comparison.pairs), *_reservations(comparison)]


def p_word(p_value: float) -> str:
    """ "0.031"; below a thousandth the power of ten."""
    if p_value >= 0.0995:
        return f"{p_value:.2f}"
    if p_value >= 0.001:
        return f"{p_value:.3f}"
    return f"{p_value:.0e}".replace("e-0", "e-") if p_value > 1e-99 else "<1e-99"


def brackets(interval: Interval) -> str:
    """ "[-1.2, +3.4]", in points."""
    return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def excludes_zero(low: float, high: float) -> bool:
    """Whether an interval is on one side of zero."""
    return low > 0 or high < 0


def _verdict(comparison: Comparison, pair: Pair) -> str:
    first, reference = pair.measures[0], comparison.reference.name
    told = f"{100 * first.difference:+.1f} points of {WORDS[first.measure]}, 95% {brackets(first.interval)}"
    if first.seeds is not None:
        return _of_seeds(comparison, pair, first, told)
    by_chance = not excludes_zero(first.interval.low, first.interval.high)
    if first.p_value is None:
        return _of_interval(pair, reference, told, by_chance)
    p_value = first.p_value if pair.p_holm is None else pair.p_holm
    assert first.only_reference is not None and first.only_other is not None
    differ = first.only_reference + first.only_other
    test = f"McNemar p = {p_word(p_value)}" + (" after Holm" if len(comparison.pairs) > 1 else "")
    if p_value < ALPHA:
        word = "better" if first.difference > 0 else "worse"
        return f"{pair.other} is {word} than {reference} on such videos: {told}; {test}."
    few = f" They differ on {differ}, too few for this test to find anything." if 2.0 ** (1 - differ) >= ALPHA else ""
    return (
        f"{pair.other} and {reference} cannot be told apart by {comparison.num_videos} videos: {told}; {test}.{few} That is no "
        "proof that they are equal: the interval says which differences remain possible."
    )


def _of_interval(pair: Pair, reference: str, told: str, by_chance: bool) -> str:
    if by_chance:
        return f"{pair.other} and {reference} cannot be told apart by these videos: {told}, which has 0 within it."
    word = "better" if pair.measures[0].difference > 0 else "worse"
    return f"{pair.other} is {word} than {reference} on such videos: {told}, which does not have 0 within it."


def _of_seeds(comparison: Comparison, pair: Pair, first: MeasureDifference, told: str) -> str:
    """Other videos and other seeds are two reasons why a difference may not come again."""
    spread, reference, p_value = first.seeds, comparison.reference.name, pair.p_holm
    after = " after Holm" if len(comparison.pairs) > 1 else ""
    assert spread is not None
    by_videos = excludes_zero(first.interval.low, first.interval.high)
    start = f"{pair.other} against {reference}: {told} over videos"
    if spread.low is None or spread.high is None or p_value is None:
        if spread.first_std is None or spread.second_std is None:
            return f"{start}. One of them was trained once, so what another seed would change is not known."
        return (
            f"{start}. No two seeds of either differ in it, so how far others would is not known: train more of them."
        )
    over_seeds = f"[{100 * spread.low:+.1f}, {100 * spread.high:+.1f}] over seeds (Welch p = {p_word(p_value)}{after})"
    by_seeds = p_value < ALPHA
    verdict = {
        (True, True): "More than the choice of videos or of seeds explains",
        (True, False): "True of these trainings on such videos, but seeds differ too much to say it of the settings",
        (False, True): "True of the settings on these very videos, but they are too few to say it of others",
        (False, False): "Neither videos nor seeds are enough to tell them apart",
    }[by_videos, by_seeds]
    return f"{start}, {over_seeds}. {verdict}."


def _reservations(comparison: Comparison) -> list[str]:
    lines = []
    if all(len(contender.runs) == 1 for contender in comparison.contenders):
        lines.append(
            "Each is one training: how much another seed, and with it another order of the videos, moves these numbers is "
            "not in them. To know it:  vcache sweep HEAD --seeds 3, then  vcache compare SWEEP"
        )
    if len(comparison.pairs) > 1:
        corrected = "Of p, Holm's correction keeps" if _tested(comparison.pairs) else "Nothing here keeps"
        lines.append(
            f"{corrected} the risk of one false alarm among all {len(comparison.pairs)} comparisons at 5%; the intervals are "
            "each for itself."
        )
    if comparison.chosen_best:
        lines.append(
            f"{comparison.reference.name} was chosen as the best of {len(comparison.contenders)} on these very videos, which "
            "flatters it: compare it again on a split that chose nothing."
        )
    return lines


def _tested(pairs: Sequence[Pair]) -> bool:
    return any(pair.p_holm is not None for pair in pairs)
