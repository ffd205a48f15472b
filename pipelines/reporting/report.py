"""`vcache report`: what came of a run or of a sweep, as one HTML file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vcache.pipelines.console import count
from vcache.pipelines.reporting.markup import tag
from vcache.pipelines.reporting.page import note, page
from vcache.pipelines.reporting.run_record import ReportError, RunRecord
from vcache.pipelines.reporting.run_report import Options, RunReport, report_run
from vcache.pipelines.reporting.sweep_report import report_sweep
from vcache.pipelines.runs import write_text
from vcache.pipelines.training.sweep import is_sweep


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One `vcache report` command."""

    path: Path
    """A run, finished or not, or the folder of a sweep."""
    out: Path | None = None
    """The file to write; None: report.html in that folder."""
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Written:
    """What was written."""

    path: Path
    size_bytes: int
    result: str
    sections: Sequence[str]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "report": str(self.path),
            "size_bytes": self.size_bytes,
            "result": self.result,
            "sections": list(self.sections),
            "notes": list(self.notes),
        }


def write_report(config: ReportConfig, on_stage: Callable[[str], None] = lambda stage: None) -> Written:
    """
    Raises:
        ReportError: there is neither a run nor a sweep, or the file cannot be written there.
        RunError, StoreError: the store that was named is not there, or is another than the run was trained on.
    """
    out = checked_out(config)
    if is_sweep(config.path):
        kind, found = "Sweep", report_sweep(config.path, config.options, on_stage)
    elif (config.path / "config.json").is_file():
        kind, found = "Run", report_run(RunRecord.open(config.path), config.options, on_stage)
    else:
        raise ReportError(_nothing_there(config.path))
    html = _html(kind, config.path.resolve(), found)
    try:
        write_text(out, html)
    except OSError as error:
        raise ReportError(
            f"{out} cannot be written: {error.strerror}. Name another place with --out FILE.html."
        ) from error
    return Written(out, len(html.encode()), found.result, [one.title for one in found.sections], found.notes)


def checked_out(config: ReportConfig) -> Path:
    """The file to write, looked at before minutes are spent on what stands in it."""
    if config.out is None:
        return config.path / "report.html"
    if config.out.is_dir():
        raise ReportError(f"{config.out} is a folder. Name a file:  --out {config.out / 'report.html'}")
    if not config.out.parent.is_dir():
        raise ReportError(
            f"{config.out.parent} is not there, so {config.out.name} cannot be written into it. Make it first."
        )
    return config.out


def _nothing_there(path: Path) -> str:
    if not path.exists():
        near = f" There are: {', '.join(names)}." if (names := _runs_in(path.parent)) else ""
        return f"{path} is not there.{near}"
    if not path.is_dir():
        return f"{path} is a file; a report is of the folder of a run or of a sweep."
    if names := _runs_in(path):
        return (
            f"{path} is neither a run nor a sweep: it holds {count(len(names), 'run')}. Name one of them, as in:  "
            f"vcache report {names[0]}"
        )
    return f"{path} is neither a run nor a sweep: it has no config.json and no sweep.json. `vcache train-head` makes a run."


def _runs_in(folder: Path) -> list[str]:
    found = sorted({file.parent for name in ("config.json", "sweep.json") for file in folder.glob(f"*/{name}")})
    return [str(path) for path in found[:8]]


def _html(kind: str, path: Path, found: RunReport) -> str:
    header = [
        tag(
            "p",
            f"{kind} report of vcache {version('vcache')}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC",
            class_="kicker",
        ),
        tag("h1", path.name),
        tag("p", found.result, class_="result"),
        map(note, found.notes),
    ]
    footer = f"Written by vcache {version('vcache')} from {path}. The file asks for nothing over the network."
    return page(f"{path.name}: {found.result}", header, found.sections, footer)
