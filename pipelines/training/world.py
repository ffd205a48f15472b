"""The processes that train together: one per GPU, or several on a CPU, started by `torchrun`.

Why not DistributedDataParallel: it wraps one module whose backward pass every process runs at every step. Here N heads train in
one process, each with its own step; the last batch of an epoch leaves some processes without a clip; and some parameters never
get a gradient (the last lateral of DiST), which has to stay None: AdamW leaves those alone and lets a zero decay. What is lost:
gradients are exchanged after the backward pass, not during it.

Large tensors of a GPU go through NCCL. All else goes through gloo from the CPU, so that asking the others waits for no device.
"""

import functools
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from vcache.pipelines.training.torchrun import (
    WorldError,
    own_device,
    place_from_environment,
    tell_torchrun,
    wait_to_be_ended,
)

__all__ = ["ALONE", "ProcessLost", "World", "WorldError", "joined_world", "state_digest"]

CPU = torch.device("cpu")
BUCKET_BYTES = 32 * 2**20
"""Gradients that travel together; what the exchange takes in memory."""
TIMEOUT = timedelta(minutes=30)
"""A process that hears nothing for so long gives up: longer than another may check a store or write a checkpoint."""


_WORLDS = itertools.count()


class ProcessLost(WorldError):
    """Another process has ended, and this one cannot go on alone."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of them. Every method but `is_first` is called by all, in the same order; alone it does nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    """Of this process: where its head, features and gradients are."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and draws the screen."""
        return self.rank == 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """`.grad` becomes the sum over the processes, bit for bit the same in all.

        None counts as zero where another process has a gradient, and stays None where none has one.
        """
        if self.size == 1:
            return
        for bucket in _buckets(self._with_gradient_somewhere(parameters)):
            gradients = [_gradient(p) for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._talk(dist.all_reduce, flat)
            for gradient, part in zip(gradients, flat.split([p.numel() for p in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def sum(self, values: Sequence[float | int]) -> list[float]:
        """Element by element over the processes, in float64, bit for bit the same in all."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process: how all of them stop at the same step."""
        return self._reduce([float(flag)], dist.ReduceOp.MAX) == [1.0]

    def barrier(self) -> None:
        """Goes on once all processes are here."""
        self.sum([0.0])

    def gather_batch(self, x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "all_B ..."]:
        """The rows of all processes, rank by rank; they may have different numbers of them, or none.

        Differentiable: with L the sum of what all processes differentiate, the gradient of `x` is dL/dx, so that `sum_gradients`
        then gives dL/dparameters. Backward is an exchange too: a process without rows has to call it as the others do.
        """
        return x if self.size == 1 else _GatherBatch.apply(x, self)

    def gather_rows(self, x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "all_B ..."]:
        """The same without gradient, on the CPU of every process: all of them then decide alike, on the same numbers."""
        return torch.cat(self._gather(x.detach().cpu()))

    def gather_json(self, value: Any) -> list[Any]:
        """One value of each process, rank by rank, through JSON: nothing is unpickled, tuples become lists."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self._gather(text)]

    def broadcast_json(self, value: Any) -> Any:
        """What the first process has; `value` of the others is not looked at."""
        return self.gather_json(value if self.is_first else None)[0]

    def check_same(self, digest: str, what: str) -> None:
        """Refuse to go on with something that differs between the processes.

        Args:
            digest: of what has to be the same, as state_digest gives it.
            what: its name in the message, as "the weights of the head".
        """
        digests = self.gather_json(digest)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise WorldError(
                f"{what} differ between processes: rank {', '.join(map(str, others))} has other ones than rank 0. Start all with "
                "the same command, code, store and seed."
            )

    def _with_gradient_somewhere(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        self._talk(dist.all_reduce, flags, dist.ReduceOp.MAX)
        return [p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag]

    def _reduce(self, values: Sequence[float | int], operation: Any) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        summed = torch.tensor(values, dtype=torch.float64)
        self._talk(dist.all_reduce, summed, operation)
        return summed.tolist()

    def _gather(self, x: Tensor) -> list[Tensor]:
        """`x` of each rank, on the device of `x`."""
        if self.size == 1:
            return [x]
        numbers = self._numbers_of_rows(x)
        # As bytes, which both backends take whatever the dtype, and padded, as they take parts of one size only.
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        padded = torch.zeros(max(numbers) * row_bytes, dtype=torch.uint8, device=x.device)
        padded[: x.nbytes] = _as_bytes(x)
        parts = [torch.empty_like(padded) for _ in numbers]
        self._talk(dist.all_gather, parts, padded)
        return [
            part[: number * row_bytes].view(x.dtype).view(number, *x.shape[1:])
            for part, number in zip(parts, numbers, strict=True)
        ]

    def _numbers_of_rows(self, x: Tensor) -> list[int]:
        """Of each rank. Rows of another shape or dtype would be read as noise, or waited for without end."""
        row = f"{list(x.shape[1:])} {x.dtype}"
        own = torch.tensor([len(x), zlib.crc32(row.encode())])
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._talk(dist.all_gather, parts, own)
        numbers, kinds = zip(*(part.tolist() for part in parts), strict=True)
        if len(set(kinds)) > 1:
            raise WorldError(
                f"rows cannot be gathered: rank {self.rank} has rows of {row}, and another process has rows of another shape or "
                "dtype. An empty share of a batch has them, too."
            )
        return list(numbers)

    def _talk(self, exchange: Callable[..., object], *arguments: Any) -> None:
        """One exchange with the others; where one of them is gone, what ended it has to be the message that is seen."""
        try:
            exchange(*arguments)
        except RuntimeError as error:
            wait_to_be_ended()
            reason = str(error).partition("\n")[0]
            raise ProcessLost(
                f"rank {self.rank} of {self.size} lost the other processes: {reason}. Their messages say why."
            ) from error


ALONE = World()
"""The world of one process."""


class _GatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        parts = world._gather(x)
        start = sum(len(part) for part in parts[: world.rank])
        ctx.world, ctx.own = world, slice(start, start + len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # A copy: the gradient may be another's memory. Half precision is summed in float32.
        summed = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        ctx.world._talk(dist.all_reduce, summed)
        return summed[ctx.own].to(gradient.dtype), None


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and every bit of the values, on whatever device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(_as_bytes(tensor.detach().cpu()).numpy().data)
    return digest.hexdigest()


def _as_bytes(x: Tensor) -> Tensor:
    """A copy, as a slice of one element may keep strides that cannot be seen as bytes."""
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


@contextmanager
def joined_world(device: torch.device, *, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """The world of the processes that `torchrun` started, left at the end; of a process started without it, one of its own.

    Within a world that is joined already it is the same one, which the outer call leaves.

    `world.device` is the device of this process: on GPUs, the one with the number LOCAL_RANK.

    Raises:
        WorldError: the environment names a part of a world only, the machine has too few GPUs, or the others cannot be reached.
    """
    place = place_from_environment()
    if place is None:
        yield World(device=device)
        return
    rank, size, local_rank = place
    world = World(rank=rank, size=size, device=own_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # NCCL speaks from the current device
    if size == 1 or dist.is_initialized():
        yield world
        return
    _join(world, timeout)
    try:
        yield world
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, ProcessLost):
            tell_torchrun(error)
        _leave(world, failed=True)
        raise
    _leave(world, failed=False)


def _join(world: World, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    try:
        # Under a name of its own: what an earlier world of these processes left in the store would be taken for this one's.
        place = _meeting_place(world.rank, world.size)
        store = dist.PrefixStore(f"vcache-{next(_WORLDS)}", place)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WorldError(
            f"rank {world.rank} of {world.size} cannot reach the other processes: {reason}. Where there are several networks, "
            "name the interface that they share: GLOO_SOCKET_IFNAME=eth0, and NCCL_SOCKET_IFNAME=eth0 on GPUs."
        ) from error


@functools.cache
def _meeting_place(rank: int, size: int) -> Any:
    """Where processes find each other, at MASTER_ADDR; open as long as the process runs."""
    return next(rendezvous("env://", rank, size))[0]


def _leave(world: World, *, failed: bool) -> None:
    """After a failure NCCL is not asked to finish what it has begun, which the others will never answer."""
    group = dist.group.WORLD
    if failed and group is not None and world.device.type == "cuda":
        group.abort()
    else:
        dist.destroy_process_group()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one device and dtype, BUCKET_BYTES together and what the last of them has beyond that."""
    kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    for kind in kinds.values():
        starts = itertools.accumulate((p.nbytes for p in kind), initial=0)
        for _, bucket in itertools.groupby(zip(kind, starts, strict=False), key=lambda pair: pair[1] // BUCKET_BYTES):
            yield [p for p, _ in bucket]


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
