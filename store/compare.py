"""Are two computations of one row the same? Equal bits, or as near as the stored number format lets them be."""

from dataclasses import dataclass

import numpy as np

from vcache.store.layout import BFLOAT16, widened_bfloat16

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-8}
"""Bound on ||a - b|| / ||b|| by stored dtype; values of any other dtype must be equal.

Extraction computes in float32. Another device, thread count or batch size adds the same products in another order: 5e-8 was
measured on one machine, some 1e-6 is usual between devices. What is not the same features lies far above 1e-4: TF32 or half
precision arithmetic near 1e-3, another decoder's pixels at 1e-3 to 1e-2, another frame or video at 1e-1 and more. A stored
half is rounded once, and the two roundings differ only where the float32 values lie on two sides of a rounding step: the bound
is one rounding error, 2^-11 for float16 and 2^-8 for bfloat16. Quantised int8 differs by single steps of 1/127.
"""

# Of the largest value, in units of the bound: norms do not see one changed value among a million.
_LARGEST = 16


@dataclass(frozen=True)
class Difference:
    """How far a stored row is from the recomputed one."""

    equal: bool
    """Bit for bit."""
    relative: float
    """||stored - recomputed|| / ||recomputed||."""
    largest: float
    """Largest absolute difference of two values."""
    tolerance: float
    """Bound on `relative`; 0 where only equal will do."""
    agrees: bool
    """Equal, or within the tolerance: `relative` below it and `largest` below 16 of it times the largest value."""


def compare(stored: np.ndarray, recomputed: np.ndarray, dtype: str) -> Difference:
    """Compare one row of an array of the stored dtype; both arrays have the shape of a row."""
    tolerance = TOLERANCES.get(dtype, 0.0)
    if stored.tobytes() == recomputed.tobytes():
        return Difference(True, 0.0, 0.0, tolerance, True)
    a, b = (_numbers(values, dtype) for values in (stored, recomputed))
    norm, largest = float(np.linalg.norm(b)), float(np.abs(a - b).max())
    relative = float(np.linalg.norm(a - b)) / norm if norm else np.inf
    agrees = relative <= tolerance and largest <= _LARGEST * tolerance * float(np.abs(b).max())
    return Difference(False, relative, largest, tolerance, bool(agrees and tolerance))


def _numbers(values: np.ndarray, dtype: str) -> np.ndarray:
    return (widened_bfloat16(values) if dtype == BFLOAT16 else np.asarray(values)).astype(np.float64)
