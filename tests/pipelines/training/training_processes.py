"""What test_several_processes.py starts with torchrun: `training_processes.py FOLDER`, lines of `vcache` from FOLDER/lines.json.

A line is run by all processes. FOLDER/done-RANK.json says for each line its exit status, the rows that this process was given,
and whether open_clip is loaded.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vcache.pipelines import cli
from vcache.pipelines.loading.loader import ClipLoader

seen: dict[str, list[list[int]]] = {}
"""Rows of each batch, by what was asked of which split."""
stop_after: dict[str, int] = {}
"""{"batches": n}: a Ctrl-C during the n-th."""


def recording(name: str, original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def record(self: ClipLoader, *arguments: Any, **named: Any) -> Iterator[Any]:
        asked = f"{name} {arguments[0]}" if name == "epoch" else name
        for batch in original(self, *arguments, **named):
            seen.setdefault(f"{self.split} {asked}", []).append(batch.rows.tolist())
            if name == "epoch" and "batches" in stop_after:
                stop_after["batches"] -= 1
                if not stop_after["batches"]:
                    os.kill(os.getpid(), signal.SIGINT)
            yield batch

    return record


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name in ("epoch", "in_order"):
        setattr(ClipLoader, name, recording(name, getattr(ClipLoader, name)))
    done = []
    for line in json.loads((folder / "lines.json").read_text()):
        sys.argv = ["vcache", *shlex.split(line["line"])]
        seen.clear()
        stop_after.clear()
        if rank == line.get("stopped_rank"):  # the others are not asked, and stop with it
            stop_after["batches"] = line["stopped_after"]
        try:
            cli.main()
            status: Any = 0
        except SystemExit as exit:
            status = exit.code or 0
        done.append({"status": status, "rows": dict(seen), "open_clip": "open_clip" in sys.modules})
    (folder / f"done-{rank}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
