"""What `vcache plan` shows: the same numbers on a screen and, as JSON, for a program."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from vcache.pipelines.console import count, duration, out, size
from vcache.pipelines.planning import Choice, ExtractionPlan, Forecast, PlannedStore, Rates, recommendation


def describe_plan(plan: ExtractionPlan) -> dict[str, Any]:
    """Everything the screen shows, for a program: the plan with a forecast of each choice."""
    choices = [
        asdict(choice) | {"fits": plan.fits(choice), "forecast": expected and asdict(expected)}
        for choice in plan.choices
        for expected in [plan.forecast(choice)]
    ]
    asked = next(choice for choice in choices if choice["asked"])
    stores = [asdict(store) | {"path": str(store.path)} for store in plan.stores]
    told = asdict(plan) | {"stores": stores, "free_folder": str(plan.free_folder)}
    return told | {"choices": choices, "asked": asked, "recommendation": recommendation(plan)}


def print_plan(plan: ExtractionPlan) -> None:
    for store in plan.stores:
        _print_store(store)
    for line in _content_lines(plan):
        _say(f"  {line}")
    if plan.rates and (expected := plan.forecast(plan.asked)):
        _print_facts("measured here:", _rate_lines(plan, plan.rates))
        _print_facts("expected:", _time_lines(plan, plan.rates, expected))
    out.print(_choices_table(plan))
    out.print(f"[bold]{escape(recommendation(plan))}[/bold]", highlight=False)


def _print_store(store: PlannedStore) -> None:
    _say(f"[bold]{escape(str(store.path))}[/bold]  ({'is there' if store.is_there else 'new'})")
    _say(f"  {escape(store.model)}, {_layers(store)}")
    if store.to_retry:
        _say(f"  {count(store.to_retry, 'video')} that failed before will be tried again, and come on top")


def _layers(store: PlannedStore) -> str:
    """ "layers 8,9", "the stem and layers 8,9" or what there is without layers."""
    layers = f"layers {','.join(map(str, store.layers))}" if store.layers else ""
    if store.stem:
        return f"the stem and {layers}" if layers else "the stem and the embedding, no layers"
    return layers or "no layers, the embedding alone"


def _content_lines(plan: ExtractionPlan) -> Iterator[str]:
    """What is to be extracted, and the room that it needs and finds."""
    asked = plan.asked
    splits = ", ".join(f"{split} {rows:,}" for split, rows in plan.splits.items())
    yield f"{escape(plan.dataset)}: {splits} videos of {count(plan.num_frames, 'frame')}"
    if max(plan.views.values()) > 1:
        yield f"views of each video: {', '.join(f'{number} ({split})' for split, number in plan.views.items())}"
    room = "" if plan.fits(asked) else "[red]does not fit:[/red] "
    files = f"{asked.missing_files:,} file{'' if asked.missing_files == 1 else 's'}"
    to_write = f"{room}{size(asked.missing_bytes)} to write in {files}" if asked.missing_bytes else "all stored"
    free = f"{size(plan.free_bytes)} free in {escape(str(plan.free_folder))}"
    yield f"{to_write}, {size(asked.video_bytes)} a video; {free}"
    if plan.part is not None:
        yield f"bytes, files and time of part {plan.part[0]} of {plan.part[1]}; room for all of them: {size(asked.needed_bytes)}"


def _rate_lines(plan: ExtractionPlan, rates: Rates) -> list[tuple[str, str, str]]:
    processes = f"{plan.decode_workers} process{'' if plan.decode_workers == 1 else 'es'}"
    failed = f", {rates.num_failed} failed" if rates.num_failed else ""
    decode = f"{plan.decoder}, {processes}; {count(rates.num_sampled, 'video')} decoded{failed}"
    several = len(plan.stores) > 1
    return [
        ("decode", _per_second(rates.decode_seconds, "videos"), decode),
        *(
            ("device", _per_second(seconds, "clips"), _forward_line(store, plan.device, several))
            for store, seconds in zip(plan.stores, rates.forward_seconds, strict=True)
        ),
        ("disk write", f"{size(int(rates.write_bytes_per_second))}/s", "and synced"),
        ("disk read", f"{size(int(rates.read_bytes_per_second))}/s", "rows in random order, not from memory"),
    ]


def _forward_line(store: PlannedStore, device: str, several: bool) -> str:
    return f"{device}, {f'{escape(store.model)}, ' if several else ''}batches of {store.batch_size}"


def _time_lines(plan: ExtractionPlan, rates: Rates, expected: Forecast) -> list[tuple[str, str, str]]:
    """How the times of the choice that was asked for come about."""
    decode, forward = rates.view_decode_seconds, sum(rates.forward_seconds)
    each = f"decode {duration(decode)}", f"device {duration(forward)}"
    from_videos = f"{' + '.join(each)} a video" if rates.shared_cores else f"the slower of {', '.join(each)}"
    from_store = f"{size(plan.asked.view_bytes)} a video at {size(int(rates.read_bytes_per_second))}/s"
    lines = [
        ("epoch from videos", duration(expected.video_epoch_seconds), from_videos),
        ("epoch from the store", duration(expected.store_epoch_seconds), from_store),
    ]
    if not plan.asked.missing_videos:
        return lines
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in expected.video_seconds.items())
    limit = f"{plan.asked.missing_videos:,} videos; limited by {expected.limit}"
    return [("extraction", duration(expected.extraction_seconds), limit), ("  of one video", "", parts), *lines]


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


def _per_second(seconds: float, of: str) -> str:
    rate = 1 / seconds
    return f"{rate:.3g} {of}/s" if rate < 100 else f"{rate:,.0f} {of}/s"


def _say(line: str) -> None:
    """One line, however long: what is cut into lines cannot be copied."""
    out.print(line, soft_wrap=True, highlight=False)
