"""What a run says of its epochs, without what differs between two runs that are the same."""

from pathlib import Path
from typing import Any

from vcache.pipelines.runs import Run

CLOCK = ("head", "seconds", "waiting_seconds", "read_bytes")
"""The name of the run, and how long it took or read."""


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in Run.open(run).metrics()]
