"""Which heads of a sweep are trained side by side: those that read the same batches, as many as fit into memory.

A group needs, beside what is taken already:

    of each head    weights, gradients, two moments of AdamW and, with EMA, the averages: 4 or 5 x 4 bytes a parameter
    of the largest  its activations, as heads take turns: estimated as twice its features of a batch in float32, and what blocks
                    of the backbone that it runs keep for the backward pass
    of each dtype   blocks of the backbone that heads run, as many as the head has that runs the most
    once            three batches as stored (one in use, two being read), and the features of all heads of one, in float32
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vcache.pipelines.console import count, size
from vcache.pipelines.loading.residency import free_ram

ACTIVATIONS = 2
"""Times a head's features of a batch in float32."""
USABLE = 0.9
"""Of the memory that is free: allocators keep some of it, and the estimate is one."""


@dataclass(frozen=True, kw_only=True)
class HeadDemand:
    """What one head of a sweep asks of memory, and which batches it is trained on."""

    name: str
    stream: Mapping[str, Any]
    """Heads with the same one are trained on the same batches."""
    num_parameters: int
    averaged: bool
    """Whether an average of the weights is kept beside them (EMA)."""
    arrays: Mapping[str, int]
    """Bytes of a batch as stored, by array."""
    features: Mapping[str, int]
    """Bytes of a batch in float32, by feature."""
    frozen: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the blocks of the backbone that it runs, by what they are kept in."""
    kept: int = 0
    """Bytes that these keep for the backward pass."""

    @property
    def state(self) -> int:
        """Weights, gradients, the two moments of AdamW, averages; in float32 whatever the precision of the products."""
        return 4 * (5 if self.averaged else 4) * self.num_parameters

    @property
    def activations(self) -> int:
        return ACTIVATIONS * sum(self.features.values()) + self.kept


@dataclass(frozen=True, kw_only=True)
class SweepGroup:
    """Heads that are trained side by side."""

    demands: tuple[HeadDemand, ...]

    @property
    def num_bytes(self) -> int:
        arrays: dict[str, int] = {}
        features: dict[str, int] = {}
        frozen: dict[str, int] = {}
        for demand in self.demands:
            arrays |= demand.arrays
            features |= demand.features
            frozen |= {kept: max(size, frozen.get(kept, 0)) for kept, size in demand.frozen.items()}
        once = 3 * sum(arrays.values()) + sum(features.values()) + max(demand.activations for demand in self.demands)
        return once + sum(frozen.values()) + sum(demand.state for demand in self.demands)


def plan_groups(demands: Iterable[HeadDemand], free_bytes: int, together: int | None = None) -> tuple[SweepGroup, ...]:
    """Stream after stream, the heads of each in their order: a group is closed where the next head does not fit any more.

    `together` is how many heads a group has at most, in place of the memory. A head that fits nowhere is a group of its own.
    """
    streams: dict[tuple[Any, ...], list[SweepGroup]] = {}
    for demand in demands:
        groups = streams.setdefault(tuple(demand.stream.values()), [])
        joined = SweepGroup(demands=(*(groups.pop().demands if groups else ()), demand))
        if len(joined.demands) > 1 and not _fits(joined, free_bytes, together):
            groups.append(SweepGroup(demands=joined.demands[:-1]))
            joined = SweepGroup(demands=(demand,))
        groups.append(joined)
    return tuple(group for groups in streams.values() for group in groups)


def _fits(group: SweepGroup, free_bytes: int, together: int | None) -> bool:
    if together is not None:
        return len(group.demands) <= together
    return group.num_bytes <= USABLE * free_bytes


def describe_groups(groups: Sequence[SweepGroup], free_bytes: int, together: int | None = None) -> list[str]:
    """Lines for the screen: how many groups, why more than one, and what each has and needs."""
    demands = [demand for group in groups for demand in group.demands]
    heads = count(len(demands), "head")
    if len(groups) == 1:
        needed = f"about {size(groups[0].num_bytes)} of {size(free_bytes)} of free memory"
        once = "every batch is read once for all" if len(demands) > 1 else "alone on its batches"
        return [f"{heads} in 1 group, {once}; {needed}", *_too_large(groups, free_bytes)]
    lines = [f"{heads} in {len(groups)} groups, one after the other; each reads its batches once"]
    lines += [f"  because {reason}" for reason in _reasons(groups, free_bytes, together)]
    for number, group in enumerate(groups, start=1):
        names = ", ".join(demand.name for demand in group.demands[:2])
        more = f" ... {group.demands[-1].name}" if len(group.demands) > 2 else ""
        lines.append(f"  {number}  {count(len(group.demands), 'head')}, about {size(group.num_bytes)}: {names}{more}")
    return lines + _too_large(groups, free_bytes)


def _reasons(groups: Sequence[SweepGroup], free_bytes: int, together: int | None) -> list[str]:
    streams = {tuple(group.demands[0].stream.values()): group.demands[0].stream for group in groups}
    reasons = []
    if len(streams) > 1:
        names = [name for name in groups[0].demands[0].stream if len({str(s[name]) for s in streams.values()}) > 1]
        reasons.append(f"heads share batches only with the same {' and '.join(names)}")
    if len(groups) > len(streams):
        reasons.append(
            f"--together allows {together} at once"
            if together is not None
            else f"more heads do not fit into {USABLE:.0%} of the {size(free_bytes)} of memory that are free"
        )
    return reasons


def _too_large(groups: Sequence[SweepGroup], free_bytes: int) -> list[str]:
    """A head alone that may not fit is tried all the same: the need is an estimate."""
    return [
        f"  {group.demands[0].name} alone needs about {size(group.num_bytes)}, and {size(free_bytes)} are free: it may fail. "
        "A smaller batch_size or fewer layers need less."
        for group in groups
        if len(group.demands) == 1 and not _fits(group, free_bytes, None)
    ]


def free_memory(device: torch.device) -> int:
    """Bytes that a training may still take: of its GPU, or of the machine within the limit of the process."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram()
