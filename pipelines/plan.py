"""`vcache plan`: what an extraction would write and how long it would take, without doing it, and which way pays."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from vcache.extract.datasets.base import Video
from vcache.extract.spec import DTYPES
from vcache.pipelines.console import duration, out, size
from vcache.pipelines.extraction import bytes_left, tasks_left, videos_to_add
from vcache.pipelines.growth import DatasetChanged
from vcache.pipelines.measuring import measure_rates
from vcache.pipelines.planning import Choice, ExtractionPlan, Forecast, Rates, recommendation
from vcache.pipelines.request import CROSS_FRAME, ExtractionConfig, ExtractionError
from vcache.pipelines.room import free_bytes, nearest_folder, with_reserve
from vcache.pipelines.setup import ExtractionSetup, prepare_extraction
from vcache.store.errors import StoreError
from vcache.store.object_path import ObjectPath, local
from vcache.store.reader import FeatureStore


def plan_extraction(
    config: ExtractionConfig, *, seconds: float | None, on_stage: Callable[[str], None] = lambda name: None
) -> ExtractionPlan:
    """The plan of `run_extraction(config)`, with about `seconds` spent on measuring, or none. Writes nothing.

    Raises:
        What `run_extraction` raises before it starts, NotEnoughSpace aside; MeasuringError.
    """
    if isinstance(config.store, ObjectPath):
        raise ExtractionError(
            f"{config.store}: `vcache plan` looks at a disk, and knows neither the room in a bucket nor the speed of the way to "
            "it. Leave --store out for the sizes and for what decoding and the backbone take."
        )
    if config.more_models:
        raise ExtractionError("`vcache plan` plans one model at a time. Name one --model.")
    on_stage("loading the backbone")
    setup = prepare_extraction(config)
    on_stage("looking at the store")
    choices = choices_at_hand(setup)
    return ExtractionPlan(
        dataset=setup.dataset.name,
        model=setup.backbone.facts.model,
        store=local(setup.path),
        store_exists=setup.path.exists(),
        layers=setup.layers,
        num_frames=config.frames,
        splits={split: len(setup.dataset.split(split)) for split in setup.dataset.splits},
        choices=choices,
        free_bytes=free_bytes(local(setup.path)),
        free_folder=nearest_folder(local(setup.path)),
        decode_workers=config.decode_workers,
        batch_size=setup.batch_size,
        device=str(setup.backbone.device),
        rates=measure_rates(setup, seconds, on_stage) if seconds is not None else None,
    )


def choices_at_hand(setup: ExtractionSetup) -> tuple[Choice, ...]:
    """Every dtype with every kind of cross-frame attention, for the layers that were asked for.

    Raises:
        StoreError, ExtractionError, DatasetChanged: the store that was asked for cannot be extended like this.
    """
    choices = []
    everything = _Base(None, videos_to_add(setup, None))
    with ExitStack() as stack:
        bases: dict[str, _Base] = {}
        for other in _variants(setup):
            if other.key not in bases:
                bases[other.key] = _find_base(other, stack, must_do=other.key == setup.key) or everything
            choices.append(_choice(other, bases[other.key], everything, asked=other.config == setup.config))
    return tuple(choices)


@dataclass(frozen=True)
class _Base:
    """What a choice would extend: a store, or none; and the videos that it does not know."""

    store: FeatureStore | None
    to_add: dict[str, tuple[Video, ...]]


def _variants(setup: ExtractionSetup) -> Iterator[ExtractionSetup]:
    for dtype in DTYPES:
        for cross_frame in CROSS_FRAME:
            with suppress(ExtractionError):  # as maps of a single frame
                config = replace(setup.config, dtype=dtype, cross_frame=cross_frame)
                yield replace(setup, config=config)


def _find_base(setup: ExtractionSetup, stack: ExitStack, *, must_do: bool) -> _Base | None:
    """The store of this choice; None if it is not there, or will not do where it need not: then the choice has its own."""
    if not setup.path.exists():
        return None
    try:
        store = stack.enter_context(FeatureStore.open(setup.path))
        return _Base(store, videos_to_add(setup, store))
    except (StoreError, ExtractionError, DatasetChanged):
        if must_do:
            raise
        return None


def _choice(setup: ExtractionSetup, base: _Base, everything: _Base, *, asked: bool) -> Choice:
    tasks = tasks_left(setup, base.store, base.to_add)
    missing = bytes_left(setup, base.store, base.to_add)
    return Choice(
        dtype=setup.config.dtype,
        cross_frame=setup.config.cross_frame,
        asked=asked,
        video_bytes=_video_bytes(setup),
        total_bytes=bytes_left(setup, None, everything.to_add),
        missing_bytes=missing,
        missing_files=sum(len(task.arrays) for task in tasks),
        missing_videos=sum(len(task.rows) for task in tasks),
        needed_bytes=with_reserve(missing),
    )


def _video_bytes(setup: ExtractionSetup) -> int:
    """All arrays of all views, of a video of the split that has most."""
    return max(
        sum(spec.row_bytes for arrays in setup.view_arrays(split).values() for spec in arrays)
        for split in setup.dataset.splits
    )


def describe_plan(plan: ExtractionPlan) -> dict[str, Any]:
    """Everything the screen shows, for a program: the plan with a forecast of each choice."""
    choices = [
        asdict(choice) | {"fits": plan.fits(choice), "forecast": expected and asdict(expected)}
        for choice in plan.choices
        for expected in [plan.forecast(choice)]
    ]
    asked = next(choice for choice in choices if choice["asked"])
    told = asdict(plan) | {"store": str(plan.store), "free_folder": str(plan.free_folder)}
    return told | {"choices": choices, "asked": asked, "recommendation": recommendation(plan)}


def print_plan(plan: ExtractionPlan) -> None:
    asked, free = plan.asked, f"{size(plan.free_bytes)} free in {escape(str(plan.free_folder))}"
    splits = ", ".join(f"{split} {rows:,}" for split, rows in plan.splits.items())
    layers = ",".join(map(str, plan.layers))
    room = "" if plan.fits(asked) else "[red]does not fit:[/red] "
    to_write = f"{room}{size(asked.missing_bytes)} to write in {asked.missing_files:,} files"
    _say(f"[bold]{escape(str(plan.store))}[/bold]  ({'is there' if plan.store_exists else 'new'})")
    _say(f"  {escape(plan.dataset)}: {splits} videos; {escape(plan.model)}, layers {layers}, {plan.num_frames} frames")
    _say(f"  {to_write if asked.missing_bytes else 'all stored'}, {size(asked.video_bytes)} a video; {free}")
    if plan.rates and (expected := plan.forecast(asked)):
        _print_facts("measured here:", _rate_lines(plan, plan.rates))
        _print_facts("expected:", _time_lines(plan, plan.rates, expected))
    out.print(_choices_table(plan))
    out.print(f"[bold]{escape(recommendation(plan))}[/bold]", highlight=False)


def _rate_lines(plan: ExtractionPlan, rates: Rates) -> list[tuple[str, str, str]]:
    threads = "1 thread" if plan.decode_workers == 1 else f"{plan.decode_workers} threads"
    failed = f", {rates.num_failed} failed" if rates.num_failed else ""
    return [
        ("decode", _per_second(rates.decode_seconds), f"{threads}; {rates.num_sampled} videos decoded{failed}"),
        ("forward", _per_second(rates.forward_seconds), f"{plan.device}, batches of {plan.batch_size}"),
        ("disk write", f"{size(int(rates.write_bytes_per_second))}/s", "and synced"),
        ("disk read", f"{size(int(rates.read_bytes_per_second))}/s", "rows in random order, not from memory"),
    ]


def _time_lines(plan: ExtractionPlan, rates: Rates, expected: Forecast) -> list[tuple[str, str, str]]:
    """How the times of the choice that was asked for come about."""
    decode, forward = f"decode {duration(rates.decode_seconds)}", f"forward {duration(rates.forward_seconds)}"
    from_videos = f"{decode} + {forward} a video" if rates.shared_cores else f"the slower of {decode}, {forward}"
    from_store = f"{size(plan.asked.video_bytes)} a video at {size(int(rates.read_bytes_per_second))}/s"
    lines = [
        ("epoch from videos", duration(expected.video_epoch_seconds), from_videos),
        ("epoch from the store", duration(expected.store_epoch_seconds), from_store),
    ]
    if not plan.asked.missing_videos:
        return lines
    extraction = f"{plan.asked.missing_videos:,} videos; {expected.limit} limits"
    return [("extraction", duration(expected.extraction_seconds), extraction), *lines]


def _print_facts(title: str, lines: list[tuple[str, str, str]]) -> None:
    names, values = (max(len(line[column]) for line in lines) for column in (0, 1))
    _say(title)
    for name, value, how in lines:
        _say(f"  {name:<{names}}  {value:>{values}}  {how}")


def _choices_table(plan: ExtractionPlan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("  dtype", "cross-frame"):
        table.add_column(column, no_wrap=True)
    for column in ["a video", "to write"] + (["extraction", "epoch", "pays in"] if plan.rates else []):
        table.add_column(column, justify="right", no_wrap=True)
    for choice in plan.choices:
        to_write = size(choice.missing_bytes) if choice.missing_bytes else "stored"
        cells = [f"{'>' if choice.asked else ' '} {choice.dtype}", choice.cross_frame, size(choice.video_bytes)]
        cells.append(to_write if plan.fits(choice) else f"[red]{to_write}[/red]")
        if expected := plan.forecast(choice):
            extraction = duration(expected.extraction_seconds) if choice.missing_bytes else "-"
            cells += [extraction, duration(expected.store_epoch_seconds), _pays_from(choice, expected)]
        table.add_row(*cells, style="bold" if choice.asked else None)
    return table


def _pays_from(choice: Choice, expected: Forecast) -> str:
    if expected.break_even_epochs is None:
        return "[red]never[/red]"
    return f"epoch {expected.break_even_epochs:,}" if choice.missing_bytes else "at once"


def _per_second(seconds: float) -> str:
    rate = 1 / seconds
    return f"{rate:.3g} videos/s" if rate < 100 else f"{rate:,.0f} videos/s"


def _say(line: str) -> None:
    """One line, however long: what is cut into lines cannot be copied."""
    out.print(line, soft_wrap=True, highlight=False)
