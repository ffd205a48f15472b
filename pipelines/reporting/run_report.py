"""The sections of one run, on a page of its own or below those of its sweep."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vcache.pipelines.console import count
from vcache.pipelines.evaluation.evaluate import open_run_store
from vcache.pipelines.evaluation.head_evaluation import Evaluation
from vcache.pipelines.evaluation.screen import LINES
from vcache.pipelines.evaluation.zero_shot import chance
from vcache.pipelines.reporting.class_sections import classes_section, confusion_section
from vcache.pipelines.reporting.curves_section import curves_section, speed_section
from vcache.pipelines.reporting.examples import Example, choose_examples
from vcache.pipelines.reporting.markup import Content, Markup, tag
from vcache.pipelines.reporting.overlays import draw_overlays
from vcache.pipelines.reporting.page import Section, caption, tiles
from vcache.pipelines.reporting.run_predictions import Asked, find_evaluation
from vcache.pipelines.reporting.run_record import RunRecord
from vcache.pipelines.reporting.settings_sections import provenance_section, settings_section
from vcache.pipelines.reporting.svg_chart import percent
from vcache.pipelines.reporting.video_sections import overlays_section, videos_section
from vcache.pipelines.runs import RunError
from vcache.pipelines.stored_views import describe_grid
from vcache.store.errors import StoreError
from vcache.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report of a run shows, and where it looks."""

    asked: Asked = field(default_factory=Asked)
    root: Path | None = None
    """Where the videos lie now, if they were moved."""
    num_videos: int = 6
    """Right ones, and as many wrong ones."""
    num_explained: int = 4
    """Of them, how many are drawn with what the head looks at."""


@dataclass(frozen=True)
class RunReport:
    """Of one run."""

    result: str
    """In one line."""
    sections: list[Section]
    notes: list[str]
    """What could not be shown, and why."""


def report_run(record: RunRecord, options: Options, on_stage: Callable[[str], None], prefix: str = "") -> RunReport:
    """
    Args:
        prefix: of the anchors.

    Raises:
        RunError, StoreError: the store that was named is not there, or is another.
    """
    notes: list[str] = []
    store = _open_store(record, options, notes.append)
    try:
        on_stage("evaluating")
        evaluation = find_evaluation(record, store, options.asked, notes.append)
        by_chance = chance(evaluation.predictions) if evaluation else {}
        monitored = evaluation and evaluation.metrics.monitored_name
        level = by_chance.get("top1" if monitored == "top-1" else "mean_average_precision")
        sections = [_result_section(record, evaluation, by_chance, f"{prefix}result")]
        sections.append(curves_section(record, f"{prefix}curves", level))
        if evaluation is not None:
            sections += _evaluated(record, evaluation, store, options, notes.append, on_stage, prefix)
        sections.append(speed_section(record, f"{prefix}speed"))
        sections.append(settings_section(record, f"{prefix}settings"))
        sections.append(provenance_section(record, store, f"{prefix}provenance"))
    finally:
        if store is not None:
            store.close()
    return RunReport(result_line(record, evaluation), sections, notes)


def _open_store(record: RunRecord, options: Options, on_note: Callable[[str], None]) -> FeatureStore | None:
    """None, with a note, of a store that is not there and was not named."""
    try:
        return open_run_store(record.run, options.asked.store)
    except (RunError, StoreError, OSError) as error:
        if options.asked.store is not None:
            raise
        on_note(f"Reported from the run alone: {error}")
        return None


def result_line(record: RunRecord, evaluation: Evaluation | None) -> str:
    """ "top-1 76.0% [70.0, 82.0] on val, 200 videos of 10 classes"."""
    if evaluation is not None:
        metrics, predictions = evaluation.metrics, evaluation.predictions
        name = "top1" if metrics.mean_average_precision is None else "mean_average_precision"
        videos = f"{count(metrics.num_videos, 'video')} of {predictions.scores.shape[1]} classes"
        value = f"{metrics.monitored_name} {percent(metrics.monitored)} {_interval(evaluation, name)}"
        return f"{value} on {predictions.split}, {videos}"
    if record.validated:
        last, name = record.validated[-1], "mAP" if record.monitored == "val_mean_average_precision" else "top-1"
        return f"{name} {percent(last[record.monitored])} in the validation after epoch {last['epoch'] + 1}"
    return "not evaluated"


def _interval(evaluation: Evaluation, name: str) -> str:
    found = evaluation.intervals().get(name)
    return "" if found is None else f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _result_section(
    record: RunRecord, evaluation: Evaluation | None, by_chance: dict[str, float], anchor: str
) -> Section:
    content: list[Content] = []
    if evaluation is not None:
        content += [tiles(_tiles(evaluation, by_chance)), caption(_evaluated_words(evaluation))]
    content.append(_progress(record))
    return Section(anchor, "Result", content)


def _tiles(evaluation: Evaluation, by_chance: dict[str, float]) -> list[tuple[str, str, Content]]:
    metrics, intervals = evaluation.metrics, evaluation.intervals()
    shown: list[tuple[str, str, Content]] = []
    for name, words in LINES.items():
        if (value := getattr(metrics, name)) is None:
            continue
        below = [_interval(evaluation, name)] if name in intervals else []
        below += [f"chance {percent(by_chance[name])}"] if name in by_chance else []
        shown.append((words, percent(value), ", ".join(below)))
    for kind in evaluation.kinds:
        shown.append((kind.kind, percent(kind.top1), f"top-5 {percent(kind.top5)}"))
    shown.append(("loss", f"{metrics.loss:.3f}", "mean over the videos"))
    failed = f"{evaluation.num_failed} failed ones left out" if evaluation.num_failed else evaluation.predictions.split
    return [*shown, ("videos", f"{metrics.num_videos:,}", failed)]


def _evaluated_words(evaluation: Evaluation) -> str:
    predictions = evaluation.predictions
    views = describe_grid(predictions.views or "1x1")
    how = f"The last weights on {predictions.split}, {views}."
    intervals = next(iter(evaluation.intervals().values()))
    return f"{how} Brackets are 95% of {intervals.resamples} bootstrap resamples of the videos; they say nothing of another seed."


def _progress(record: RunRecord) -> Markup:
    """How far the training came."""
    if record.run.imported:
        return tag("p", "The head was imported: it was trained elsewhere.")
    done = count(len(record.epochs), "epoch")
    steps = f", {record.epochs[-1]['step']:,} steps" if record.epochs else ""
    of = f", of {record.planned} planned" if record.planned not in ("", done) else ""
    if record.finished:
        return tag("p", f"Trained for {done}{steps}{of}.")
    resume = tag("code", f"vcache resume {record.path}")
    return tag(
        "p", tag("strong", "The training is not finished"), f": {done}{steps} so far{of}. Go on with ", resume, "."
    )


def _evaluated(
    record: RunRecord,
    evaluation: Evaluation,
    store: FeatureStore | None,
    options: Options,
    on_note: Callable[[str], None],
    on_stage: Callable[[str], None],
    prefix: str,
) -> list[Section]:
    """What needs the scores of every video."""
    predictions = evaluation.predictions
    names = predictions.class_names or tuple(map(str, range(predictions.scores.shape[1])))
    right, wrong = choose_examples(predictions, options.num_videos)
    num_videos = len(right) + len(wrong)
    videos = videos_section(
        predictions,
        (right, wrong),
        store,
        options.root,
        f"{prefix}videos",
        lambda done: on_stage(f"frames of video {done} of {num_videos}"),
    )
    sections = [
        confusion_section(evaluation, names, f"{prefix}confusions"),
        classes_section(evaluation, f"{prefix}classes"),
        videos,
    ]
    chosen = _some_of_both(right, wrong, options.num_explained)
    if chosen and store is not None:
        on_stage("loading the backbone to explain")
        drawn = draw_overlays(
            record,
            predictions.split,
            chosen,
            store=store.path,
            root=options.root,
            device=options.asked.device,
            on_note=on_note,
            on_video=lambda done: on_stage(f"explaining video {done} of {len(chosen)}"),
        )
        sections += [overlays_section(drawn, f"{prefix}attention")] if drawn else []
    return sections


def _some_of_both(right: list[Example], wrong: list[Example], most: int) -> list[Example]:
    """Half right and half wrong ones, or more of one where the other has fewer."""
    num_wrong = min(len(wrong), max(most // 2, most - len(right)))
    return [*right[: most - num_wrong], *wrong[:num_wrong]]
