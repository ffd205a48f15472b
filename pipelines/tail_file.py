"""RUN/tail.safetensors: the top blocks of the backbone that the head of a run was trained on, so that no checkpoint is needed.

The metadata say the shape, the digest of the image tower that they are of, and a checksum of the weights, which safetensors has
none of. Nothing in it is unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_stem import StemShape
from vcache.pipelines.console import count
from vcache.store.checksum import crc32c

TAIL = "tail.safetensors"
"""In a run folder."""


class TailFileError(ValueError):
    """A file that does not hold the blocks that are asked of it; says which file, in whole sentences."""


@dataclass(frozen=True, kw_only=True)
class TailKey:
    """Which blocks a head runs. A tail with more of them will do as well."""

    num_blocks: int
    dtype: str
    """That the weights of products are kept in."""
    weights_sha256: str
    """Of the whole image tower, as in the spec of a store."""
    stem: bool = False
    """Whether the patch embedding below block 0 is run, too."""


def tail_bytes(tail: FrozenTail, num_blocks: int | None = None) -> bytes:
    """A safetensors file of so many of its top blocks, or of all."""
    num_blocks = tail.shape.num_blocks if num_blocks is None else num_blocks
    left_out = [f"blocks.{i}." for i in range(tail.shape.num_layers - num_blocks)]
    left_out += ["stem."] if left_out else []
    weights = {
        name: x.detach().cpu().contiguous()
        for name, x in tail.state_dict().items()
        if not name.startswith(tuple(left_out))
    }
    shape = replace(tail.shape, num_blocks=num_blocks, stem=None if left_out else tail.shape.stem)
    told = {
        "weights_sha256": tail.weights_sha256,
        "crc32c": str(_checksum(weights)),
        "shape": json.dumps(asdict(shape)),
    }
    return save(weights, told)


def read_tail(path: Path, key: TailKey | None = None) -> FrozenTail:
    """On the CPU. `key` is what it has to be.

    Raises:
        TailFileError: it is not there, damaged, of other weights or dtype, or has too few blocks.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except FileNotFoundError as error:
        raise TailFileError(f"{path} is not there: it holds the blocks of the backbone that the head runs.") from error
    except (OSError, SafetensorError) as error:
        raise TailFileError(f"{path} is damaged: {str(error).rstrip('.')}.") from error
    tail = _tail(path, told, weights)
    if key is not None and (difference := unlike(tail, key)):
        raise TailFileError(f"{path} is of another run: {difference}.")
    return tail


def _tail(path: Path, told: Mapping[str, str], weights: Mapping[str, Tensor]) -> FrozenTail:
    if missing := {"shape", "weights_sha256", "crc32c"} - told.keys():
        raise TailFileError(f"{path} is no file of a tail: its metadata do not say {', '.join(sorted(missing))}.")
    if told["crc32c"] != str(_checksum(weights)):
        raise TailFileError(f"{path} is damaged: its weights are not those that were written.")
    try:
        shape = json.loads(told["shape"])
        if stem := shape.get("stem"):
            stem = StemShape(**{**stem, "grid": tuple(stem["grid"])})
        shape = TailShape(**{**shape, "block": BlockShape(**shape["block"]), "stem": stem})
        # Before blocks are made by a number that a file says.
        if shape.num_blocks != len({name.split(".")[1] for name in weights if name.startswith("blocks.")}):
            raise ValueError(f"it says {shape.num_blocks} blocks and holds others")
        tail = FrozenTail.of(shape, weights, dtype=None)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TailFileError(
            f"{path} is damaged: its metadata and its weights do not fit together ({reason.rstrip(':.')})."
        ) from error
    tail.weights_sha256 = told["weights_sha256"]
    return tail


def unlike(tail: FrozenTail, key: TailKey) -> str:
    """Why a head with this key cannot run it, in words; empty where it can."""
    if tail.weights_sha256 != key.weights_sha256:
        return f"it is of weights {tail.weights_sha256[:16]}, and the head was trained on {key.weights_sha256[:16]}"
    if (dtype := kept_in(tail)) != key.dtype:
        return f"its weights are {dtype}, and the head was trained on {key.dtype}"
    if tail.shape.num_blocks < key.num_blocks:
        return f"it has {count(tail.shape.num_blocks, 'block')}, and the head runs {key.num_blocks}"
    if key.stem and tail.shape.stem is None:
        return "it has no patch embedding, and the head runs that too"
    return ""


def kept_in(tail: FrozenTail) -> str:
    """The dtype of the weights of products; those of norms are float32."""
    return str(next(x.dtype for x in tail.parameters() if x.ndim > 1)).removeprefix("torch.")


def _checksum(weights: Mapping[str, Tensor]) -> int:
    """CRC32C of names, dtypes, shapes and bytes, by sorted name."""
    value = 0
    for name in sorted(weights):
        x = weights[name].contiguous()
        value = crc32c(f"{name} {x.dtype} {list(x.shape)}".encode(), value)
        value = crc32c(x.flatten().view(torch.uint8).numpy().data, value)
    return value
