"""Numbers drawn from names: of a video they are the same whatever else is in the split."""

import hashlib
from collections.abc import Iterable

import numpy as np


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """uint64 (texts,)."""
    return np.array([text_hash(text) for text in texts], dtype=np.uint64)


def mixed(x: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on all bits of uint64 `x`: Stafford's variant 13, the last step of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
