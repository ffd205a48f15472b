"""Whether to shuffle in full or shard by shard: by where the store lies."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vcache.pipelines.loading.epoch_order import Shuffle
from vcache.store.object_path import ObjectPath, StorePath


@dataclass(frozen=True, kw_only=True)
class ShuffleChoice:
    """How epochs are shuffled, and why."""

    kind: Shuffle
    reason: str
    """A sentence for the screen."""


def choose_shuffle(
    wanted: Literal["auto", "full", "shards"], store: StorePath, *, devices: Path = Path("/sys/dev/block")
) -> ShuffleChoice:
    """As asked, or with "auto" by shards for object stores, else in full.

    Of a disk that the kernel calls rotational the reason says what to ask for, and no more: virtual disks call themselves so,
    too, and what a head becomes should not depend on that.

    Args:
        store: where the store lies.
        devices: the kernel's folder of block devices by number.
    """
    if wanted != "auto":
        return ShuffleChoice(kind=wanted, reason=f"Epochs are shuffled {_how(wanted)}, as asked.")
    if isinstance(store, ObjectPath):
        return ShuffleChoice(kind="shards", reason=f"Epochs are shuffled {_how('shards')}: {store} is an object store.")
    reason = "Epochs are shuffled in full."
    if _is_rotational(store, devices):
        reason = (
            f"Epochs are shuffled in full; {store} is on a disk that calls itself rotational: if it spins, --shuffle shards "
            "reads it in order."
        )
    return ShuffleChoice(kind="full", reason=reason)


def _how(kind: Shuffle) -> str:
    return "in full" if kind == "full" else "shard by shard"


def _is_rotational(store: StorePath, devices: Path) -> bool:
    """What the kernel says of the disk of a folder; False where it says nothing, as of network and overlay file systems."""
    try:
        number = Path(str(store)).stat().st_dev
        device = (devices / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True)
        # A partition has no queue of its own: it lies in the folder of its disk.
        queue = next(path for path in (device / "queue", device.parent / "queue") if path.is_dir())
        return (queue / "rotational").read_text().strip() == "1"
    except (OSError, StopIteration):
        return False
