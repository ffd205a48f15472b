"""int8 and back: what `--dtype int8` stores, in numpy. Plain arrays, so any Zarr reader can do it by hand.

    tokens   x' = (x - mean) / std by channel, over the dataset      x = q * scale * std + mean
             scale = max |x'| / 127 by token, q = round(x' / scale)
    q, k     scale = max |x| / 127 by token and head                 x = q * scale

CLIP has channels 50 to 100 times the others. With one scale for a token as it is they take all 127 steps and the others become
nearly zero: a standardised error of 0.2. With mean and std taken out first it is 0.008. Queries and keys have no such channels.
CLS, the embedding and maps stay float16: a hundredth of the bytes, or compact already.
"""

from dataclasses import replace

import numpy as np

from vcache.store.errors import NotFinite
from vcache.store.layout import ArraySpec

STEPS = 127
"""The largest absolute value of a quantised number; -128 is not used."""
QUANTISED_KINDS = ("tokens", "block_input", "q", "k")
STANDARDISED_KINDS = ("tokens", "block_input")
"""What has outlier channels, and so a mean and a deviation for each."""


def scale_name(name: str) -> str:
    """Where the scales of an int8 array are: "tokens/8" -> "tokens_scale/8"."""
    kind, _, layer = name.partition("/")
    return f"{kind}_scale/{layer}"


def source_name(name: str) -> str:
    """The array that the scales of this name are of, or the name itself: "tokens_scale/8" -> "tokens/8"."""
    kind, _, layer = name.partition("/")
    source = kind.removesuffix("_scale")
    return f"{source}/{layer}" if source != kind and source in QUANTISED_KINDS else name


def constant_names(name: str) -> tuple[str, ...]:
    """The constants of the store that an int8 array needs: of "tokens/8" ("tokens_mean/8", "tokens_std/8"), of Q/K none."""
    kind, _, layer = name.partition("/")
    return (f"{kind}_mean/{layer}", f"{kind}_std/{layer}") if kind in STANDARDISED_KINDS else ()


def scale_spec(spec: ArraySpec) -> ArraySpec:
    """The array of scales that goes with an int8 array: all its axes but the last, in chunks of as many frames."""
    return replace(
        spec,
        name=scale_name(spec.name),
        dims=spec.dims[:-1],
        shape=spec.shape[:-1],
        chunk=spec.chunk[:-1],
        dtype="float16",
    )


def quantised_specs(spec: ArraySpec) -> tuple[ArraySpec, ...]:
    """What int8 stores of an array: it and its scales, or for the kinds that are not quantised, it as it is."""
    if spec.name.split("/")[0] not in QUANTISED_KINDS:
        return (spec,)
    return replace(spec, dtype="int8"), scale_spec(spec)


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 vectors along the last axis -> (int8 of the same shape, one float16 scale per vector).

    The scale is rounded up, and is what q was made with: |q| <= 127 and |x - q * scale| <= scale / 2, to float32 rounding.

    Raises:
        NotFinite: NaN or infinity, or a number above 127 times the largest float16.
    """
    scale = _scale(np.abs(x).max(axis=-1))
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.rint(x / divisor[..., None]).astype(np.int8), scale


def dequantise(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Back to float32."""
    return q * scale[..., None].astype(np.float32)


def quantise_tokens(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`quantise` of tokens (..., D) less `mean` (D,), divided by `std` (D,); all float32.

    Raises:
        NotFinite: see `quantise`.
    """
    return quantise((x - mean) / std)


def dequantise_tokens(q: np.ndarray, scale: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Back to float32 tokens."""
    return dequantise(q, scale) * std + mean


class ChannelMoments:
    """Mean and standard deviation of every channel, summed up in float64 over any number of arrays (..., D).

    Sums are of the distance to the first vector: a constant channel then has a deviation of exactly 0.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: np.ndarray) -> None:
        vectors = x.reshape(-1, x.shape[-1]).astype(np.float64)
        if self.count == 0:
            self._origin = vectors[0].copy()
            self._sum = np.zeros_like(self._origin)
            self._squares = np.zeros_like(self._origin)
        vectors -= self._origin
        self.count += len(vectors)
        self._sum += vectors.sum(axis=0)
        self._squares += np.einsum("nd,nd->d", vectors, vectors)

    @property
    def mean(self) -> np.ndarray:
        """(D,) float64."""
        return self._origin + self._sum / self.count

    @property
    def variance(self) -> np.ndarray:
        """(D,) float64, of the whole population."""
        shift = self._sum / self.count
        return np.maximum(self._squares / self.count - shift**2, 0)

    def constants(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) in float32, for `quantise_tokens`; a channel that never changes has std 1.

        Raises:
            NotFinite: what was added holds NaN or infinity.
        """
        mean, std = self.mean.astype(np.float32), np.sqrt(self.variance).astype(np.float32)
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise NotFinite("the features to calibrate with hold NaN or infinity, so they have no mean and deviation")
        # Below the normal numbers a quotient may overflow.
        std[std < np.finfo(np.float32).tiny] = 1
        return mean, std


def _scale(largest: np.ndarray) -> np.ndarray:
    """The smallest float16 that is not below largest / 127."""
    wanted = largest / np.float32(STEPS)
    with np.errstate(over="ignore"):
        scale = wanted.astype(np.float16)
    # The float16 after a positive one has the next higher bit pattern.
    scale = np.where(scale < wanted, (scale.view(np.uint16) + np.uint16(1)).view(np.float16), scale)
    if not np.isfinite(scale).all():
        raise NotFinite(
            f"NaN, infinity or a number above {STEPS} x 65504 cannot be stored as int8; the largest here is {largest.max()}"
        )
    return scale
