"""Where the features of a training lie between epochs: on disk, in memory, or on the device. Chosen by what is free now."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vcache.pipelines.console import size

ResidencyKind = Literal["disk", "ram", "gpu"]
_SHARE = 2
"""Unasked, features take less than one part in so many of what is free: others need memory too, and later."""
_NO_LIMIT = 2**60  # what cgroup v1 writes for "none" is a little below 2**63


class DoesNotFit(RuntimeError):
    """The features are to be kept where there is no room for them."""


@dataclass(frozen=True, kw_only=True)
class Residency:
    """Where features are kept, and why."""

    kind: ResidencyKind
    needed_bytes: int
    free_bytes: int
    """Of the memory that was chosen; of "disk", of that which was too small."""
    reason: str
    """A sentence for the screen."""


def choose_residency(
    wanted: Literal["auto", "disk", "ram", "gpu"], needed_bytes: int, device: torch.device, reserve_bytes: int = 0
) -> Residency:
    """Keep features as asked, or with "auto" on the GPU, else in memory, if they take less than half of what is free there.

    Each rank keeps all of them: in a shuffled epoch any row may come up on any rank. Ranks on one machine share its memory.

    Args:
        needed_bytes: of all loaders of this rank.
        reserve_bytes: what heads, optimisers and activations will take on the device.

    Raises:
        DoesNotFit: they were asked for where they have no room; says both numbers.
    """
    if wanted == "disk":
        free = free_ram() // _local_ranks()
        return Residency(
            kind="disk", needed_bytes=needed_bytes, free_bytes=free, reason="Features are read from disk, as asked."
        )
    free_of = _free_memories(device, reserve_bytes)
    if wanted != "auto":
        return _as_asked(wanted, needed_bytes, free_of)
    takes = f"All features take {size(needed_bytes)}"
    for kind, free in free_of.items():
        if needed_bytes * _SHARE < free:
            reason = f"{takes} and are kept {_where(kind)}: less than half of the {size(free)} free there."
            return Residency(kind=kind, needed_bytes=needed_bytes, free_bytes=free, reason=reason)
    kind, free = max(free_of.items(), key=lambda item: item[1])
    reason = f"{takes}, half or more of the {size(max(free, 0))} free {_where(kind)}, and are read from disk."
    return Residency(kind="disk", needed_bytes=needed_bytes, free_bytes=free, reason=reason)


def _as_asked(kind: ResidencyKind, needed_bytes: int, free_of: dict[ResidencyKind, int]) -> Residency:
    if kind not in free_of:
        raise DoesNotFit(
            "--resident gpu: the heads are trained on the CPU. Use --resident ram, or a GPU with --device cuda."
        )
    free = free_of[kind]
    if needed_bytes > free:
        raise DoesNotFit(
            f"--resident {kind}: all features take {size(needed_bytes)}, and {size(max(free, 0))} are free {_where(kind)}. Use "
            "--resident auto, or train on fewer videos, views or layers."
        )
    reason = (
        f"All features take {size(needed_bytes)} and are kept {_where(kind)}, as asked; {size(free)} are free there."
    )
    return Residency(kind=kind, needed_bytes=needed_bytes, free_bytes=free, reason=reason)


def _free_memories(device: torch.device, reserve_bytes: int) -> dict[ResidencyKind, int]:
    """What is free of each kind of memory for features, the faster first; the reserve is on the device of the heads."""
    ram = free_ram() // _local_ranks()
    if device.type != "cuda":
        return {"ram": ram - reserve_bytes}
    return {"gpu": torch.cuda.mem_get_info(device)[0] - reserve_bytes, "ram": ram}


def _where(kind: ResidencyKind) -> str:
    if kind == "gpu":
        return "on the GPU"
    ranks = _local_ranks()
    return "in memory" if ranks == 1 else f"in the memory of each of {ranks} processes"


def _local_ranks() -> int:
    """Processes of this training on this machine, as torchrun says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_ram(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the kernel calls available, and what the limits of its cgroup leave."""
    lines = (root / "proc" / "meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([available, *_left_by_cgroups(root)]))


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Of every limit that holds for this process: it less what is used, without file pages that can be dropped."""
    for folder, limit_name, used_name, cache_name in _cgroup_folders(root):
        try:
            limit = (folder / limit_name).read_text().strip()
            if limit == "max" or int(limit) > _NO_LIMIT:
                continue
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield int(limit) - int((folder / used_name).read_text()) + int(statistics.get(cache_name, 0))
        except (OSError, ValueError):  # no controller here, or another version of the kernel
            continue


def _cgroup_folders(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The folders of the process's cgroup and those above it, with the names of the files in them."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys" / "fs" / "cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        group = Path(path.lstrip("/"))
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            yield from ((mount / above, *names) for above in (group, *group.parents))
        elif "memory" in controllers.split(","):
            old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from ((mount / "memory" / above, *old) for above in (group, *group.parents))
