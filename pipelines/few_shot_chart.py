"""Accuracy over the number of shots as a curve, as figure 3 of ActionCLIP: a line for each variant, zero-shot dashed."""

from PIL import Image

from vcache.pipelines.few_shot_members import shots_word
from vcache.pipelines.few_shot_results import ZERO_SHOT, FewShotTable
from vcache.pipelines.line_chart import COLOURS, Colour, Level, Line, axis_around, line_chart
from vcache.pipelines.training.sweep_results import METRICS

_GREY: Colour = (70, 70, 70)


def few_shot_chart(table: FewShotTable, store: str) -> Image.Image:
    """In per cent; bars are a sample standard deviation long to either side."""
    lines, levels = _lines(table), _levels(table)
    ends = [level.value for level in levels]
    for line in lines:
        for value, error in zip(line.values, line.errors, strict=True):
            ends += [] if value is None else [value - (error or 0.0), value + (error or 0.0)]
    heads = ", ".join(dict.fromkeys(row.head for row in table.rows))
    num_seeds = max((one.num_done for row in table.rows for one in row.settings if one), default=0)
    spread = f", mean and standard deviation of {num_seeds} seeds" if num_seeds > 1 else ""
    return line_chart(
        f"Few-shot {METRICS[table.metric]} of {heads}",
        f"{store}: per cent on the validation split{spread}",
        [shots_word(shots) for shots in table.shots],
        "videos of each class to train on",
        lines,
        levels=levels,
        axis=axis_around(ends),
    )


def _lines(table: FewShotTable) -> list[Line]:
    places = range(len(table.shots))
    return [
        Line(
            name=table.label(row),
            colour=COLOURS[number % len(COLOURS)],
            values=[_percent(table.mean(row, place)) for place in places],
            errors=[_percent(table.std(row, place)) for place in places],
        )
        for number, row in enumerate(table.rows)
    ]


def _levels(table: FewShotTable) -> list[Level]:
    """One for all variants where it is the same for all that have it, as it does not depend on what is trained."""
    known = [
        (table.label(row), COLOURS[number % len(COLOURS)], 100 * value)
        for number, row in enumerate(table.rows)
        if row.zero_shot and (value := row.zero_shot.get(table.metric)) is not None
    ]
    if len({value for _, _, value in known}) == 1:
        return [Level(name=ZERO_SHOT, colour=_GREY, value=known[0][2])]
    return [Level(name=f"{ZERO_SHOT} {label}", colour=colour, value=value) for label, colour, value in known]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
