"""Checkpoints of a training: what it needs to go on as if it had not been stopped.

RUN/checkpoint/STEP.safetensors    tensors: weights, optimiser, averages, random states
RUN/checkpoint/STEP.json           the rest, with size and CRC32C of the other file; written last

A checkpoint without its JSON is not there, so a kill while one is written leaves the one before.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from vcache.pipelines.runs import RunError, write_text
from vcache.store.checksum import crc32c


@dataclass(frozen=True)
class Checkpoint:
    """`step` is how many optimiser steps are in it."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpoints:
    """Those of one run."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoint"

    def save(self, checkpoint: Checkpoint) -> None:
        """Durable when it returns; earlier ones stay."""
        self.folder.mkdir(exist_ok=True)
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()})
        _write(self._tensors(checkpoint.step), data)
        facts = {**checkpoint.facts, "size": len(data), "crc32c": crc32c(data)}
        write_text(self._facts(checkpoint.step), json.dumps(facts, indent=2) + "\n")

    def steps(self) -> list[int]:
        """Of those that are whole, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal())

    def load(self, step: int) -> Checkpoint:
        """
        Raises:
            RunError: the file is not the one that was written.
        """
        facts, path = json.loads(self._facts(step).read_text()), self._tensors(step)
        data = path.read_bytes() if path.exists() else b""
        if (len(data), crc32c(data)) != (facts.pop("size"), facts.pop("crc32c")):
            raise RunError(
                f"{path} is damaged: its bytes are not those that were written. Restore it from a copy, or delete the run "
                "and train again."
            )
        return Checkpoint(step, load(data), facts)

    def keep_only(self, step: int) -> None:
        """Delete the others, and what a kill left of one."""
        for path in self.folder.glob("*"):
            if path not in (self._tensors(step), self._facts(step)):
                path.unlink()

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tensors(self, step: int) -> Path:
        return self.folder / f"{step:08}.safetensors"

    def _facts(self, step: int) -> Path:
        return self.folder / f"{step:08}.json"


def common_step(runs: list[Checkpoints]) -> int:
    """The last step of which every run has a checkpoint; 0 if there is none, as all can begin anew."""
    there = [set(run.steps()) for run in runs]
    return max(set.intersection(*there), default=0) if there else 0


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
