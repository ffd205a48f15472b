"""Tables and the figure of accuracy.py, from the lines of its results."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vcache.pipelines.line_chart import COLOURS, Level, Line, axis_around, line_chart

Lines = Mapping[str, Sequence[Mapping[str, Any] | None]]
"""Results of each arm by its name, seed by seed; None is a run that is not done."""

_DRAWS = 4_000


def report(group: str, lines: Lines, reference: str, fresh: str) -> None:
    """The table of a group; the views are compared with training online, too."""
    others = [reference] + ([fresh] if fresh in lines else [])
    compared = "".join(f" minus {other}: by seed | mean, 95% |" for other in others)
    print(
        f"\n{group}\n\n| | MB a video | top-1 by seed | mean ± deviation | trained on |{compared} s of cores an epoch |"
    )
    print(f"|---|---|---|---|---|{'---|---|' * len(others)}---|")
    for name, results in lines.items():
        done = [result for result in results if result is not None]
        if not done:
            continue
        top1 = [100 * result["top1"] for result in done]
        cells = [
            name,
            f"{stored_views(done[0]['arm']) * done[0]['clip_bytes'] / 1e6:.3f}",
            ", ".join(f"{value:.1f}" for value in top1),
            spread(top1),
            f"{100 * statistics.fmean(result['train_top1'] for result in done):.1f}",
            *(cell for other in others for cell in difference(results, lines[other], same=name == other)),
            f"{statistics.median(result['epoch_core_seconds'] for result in done):.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def stored_views(arm: Mapping[str, Any]) -> int:
    """Of a training video."""
    return 0 if arm["source"] == "online" else int(arm["views"])


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def difference(
    results: Sequence[Mapping[str, Any] | None], others: Sequence[Mapping[str, Any] | None], *, same: bool
) -> tuple[str, str]:
    """In percent, by the seeds that both have; and the mean with its interval."""
    pairs = [(a, b) for a, b in zip(results, others, strict=True) if a is not None and b is not None]
    if same or not pairs:
        return "", ""
    minus = np.stack([right(a) - right(b) for a, b in pairs])  # (seeds, videos)
    low, high = interval(minus)
    by_seed = ", ".join(f"{100 * value:+.1f}" for value in minus.mean(axis=1))
    return by_seed, f"{100 * minus.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def right(result: Mapping[str, Any]) -> np.ndarray:
    """1.0 for each validation video that the head was right about."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), dtype=np.uint8), count=result["val"])
    return bits.astype(np.float64)


def interval(minus: np.ndarray) -> tuple[float, float]:
    """95% of the mean of (seeds, videos), by drawing both again; of few seeds somewhat too narrow."""
    rng, (num_seeds, num_videos) = np.random.default_rng(0), minus.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _DRAWS) / num_seeds
    videos = rng.multinomial(num_videos, np.full(num_videos, 1 / num_videos), _DRAWS) / num_videos
    low, high = np.quantile(((seeds @ minus) * videos).sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


def figure(lines: Lines, path: Path, settings: Mapping[str, Any]) -> None:
    """Top-1 by the number of cached views, with one standard deviation over seeds; the other ways are levels."""
    done = {name: [100 * r["top1"] for r in results if r is not None] for name, results in lines.items()}
    arms = {name: next(r["arm"] for r in results if r is not None) for name, results in lines.items() if done[name]}
    cached = sorted(
        (name for name, arm in arms.items() if (arm["source"], arm["head"]) == ("cached", "evl")),
        key=lambda name: arms[name]["views"],
    )
    levels = [
        Level(name=f"{name} {spread(done[name])}", colour=COLOURS[1 + i], value=statistics.fmean(done[name]))
        for i, name in enumerate(name for name, arm in arms.items() if arm["source"] != "cached")
    ]
    line = Line(
        name=f"cached {spread(done[cached[-1]])}",
        colour=COLOURS[0],
        values=[statistics.fmean(done[name]) for name in cached],
        errors=[statistics.stdev(done[name]) if len(done[name]) > 1 else None for name in cached],
    )
    bounds = [value + (sign * error if error else 0) for value, error in zip(line.values, line.errors, strict=True)
              for sign in (-1, 1)]  # fmt: skip
    chart = line_chart(
        "EVL on the demo's motions: top-1 by cached views",
        f"{settings['train']} videos to train on, {settings['val']} to evaluate on, {settings['epochs']} epochs; "
        f"seeds 0 to {max(map(len, done.values())) - 1}, bars of one standard deviation",
        [str(arms[name]["views"]) for name in cached],
        "cached views of each video (vcache extract --views), the first of them unaugmented",
        [line],
        levels=levels,
        axis=axis_around(bounds + [level.value for level in levels]),
    )
    chart.quantize(256).save(path, optimize=True)
