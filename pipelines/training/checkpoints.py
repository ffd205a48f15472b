"""Checkpoints of a training: what it needs to go on as if it had not been stopped.

RUN/checkpoint/N.safetensors    tensors: weights, optimiser, averages, random states, after N batches
RUN/checkpoint/N.json           the rest, with size and CRC32C of the other file; written last

A checkpoint without its JSON is not there, so a kill while one is written leaves the one before.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from vcache.pipelines.runs import RunError, as_safetensors, write_bytes, write_text
from vcache.store.checksum import crc32c


@dataclass(frozen=True)
class Checkpoint:
    """Of one head, after so many batches since its training began."""

    number: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpoints:
    """Those of one run."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoint"

    def save(self, checkpoint: Checkpoint) -> None:
        """Durable when it returns; earlier ones stay, also where the disk is full."""
        self.folder.mkdir(exist_ok=True)
        data = as_safetensors(checkpoint.tensors)
        write_bytes(self._tensors(checkpoint.number), data)
        facts = {**checkpoint.facts, "size": len(data), "crc32c": crc32c(data)}
        write_text(self._facts(checkpoint.number), json.dumps(facts, indent=2) + "\n")

    def numbers(self) -> list[int]:
        """Of those that are whole, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal())

    def load(self, number: int) -> Checkpoint:
        """
        Raises:
            RunError: the file is not the one that was written.
        """
        facts, path = json.loads(self._facts(number).read_text()), self._tensors(number)
        data = path.read_bytes() if path.exists() else b""
        if (len(data), crc32c(data)) != (facts.pop("size"), facts.pop("crc32c")):
            raise RunError(
                f"{path} is damaged: its bytes are not those that were written. Restore it from a copy, or delete the run "
                "and train again."
            )
        return Checkpoint(number, load(data), facts)

    def keep_only(self, number: int) -> None:
        """Delete the others, and what a kill left of one."""
        for path in self.folder.glob("*"):
            if path not in (self._tensors(number), self._facts(number)):
                path.unlink()

    def forget(self, number: int) -> None:
        """Delete this one, if any of it is there."""
        for path in (self._facts(number), self._tensors(number)):
            path.unlink(missing_ok=True)

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tensors(self, number: int) -> Path:
        return self.folder / f"{number:08}.safetensors"

    def _facts(self, number: int) -> Path:
        return self.folder / f"{number:08}.json"


def common_number(runs: list[Checkpoints]) -> int:
    """Of the last batch after which every run has a checkpoint; 0 if there is none, as all can begin anew."""
    there = [set(run.numbers()) for run in runs]
    return max(set.intersection(*there), default=0) if there else 0
