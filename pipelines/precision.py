"""From float32 features on the device to what a store keeps of them, and back: the torch twin of store/quantise.py.

Quantising gives the bits of the NumPy reference: each step is one correctly rounded operation, in the same order. The way back
is equal to it within float32 rounding.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vcache.store.layout import BFLOAT16, ArraySpec
from vcache.store.quantise import STEPS, constant_names, scale_name
from vcache.store.reader import FeatureStore


def channel_constants(store: FeatureStore, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The channel means and deviations that the int8 ones of these arrays need, on the device.

    Raises:
        ArrayNotFound, CorruptStore: the store does not hold them, or they are damaged.
    """
    needed = {constant for name in names for constant in constant_names(name)}
    return {name: torch.tensor(store.constant(name), device=device) for name in sorted(needed)}


def unit_constants(arrays: Iterable[ArraySpec], device: torch.device) -> dict[str, Tensor]:
    """Means of 0 and deviations of 1 for the int8 ones of these arrays: to measure how long quantising takes."""
    values: dict[str, Tensor] = {}
    for spec in (spec for spec in arrays if spec.dtype == "int8"):
        units = torch.zeros(spec.shape[-1], device=device), torch.ones(spec.shape[-1], device=device)
        values |= dict(zip(constant_names(spec.name), units, strict=False))  # queries and keys need none
    return values


def encoded(name: str, x: Tensor, dtype: str, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a store of `dtype` keeps of features: one array, and of int8 its scales.

    NaN and infinity stay what they are; of int8 they show in the scales. The writer refuses them.
    """
    if dtype == "int8":
        q, scale = _quantised(x.float(), [constants[constant] for constant in constant_names(name)])
        return {name: q, scale_name(name): scale}
    if dtype == BFLOAT16:
        return {name: x.to(torch.bfloat16).view(torch.uint16)}
    return {name: x.to(getattr(torch, dtype))}


def dequantised(arrays: Mapping[str, Tensor], name: str, constants: Mapping[str, Tensor]) -> Tensor:
    """The features of that name, whatever the store keeps of them: int8 as float32, bfloat16 as such, others as they are."""
    x = arrays[name]
    if x.dtype == torch.uint16:
        return x.view(torch.bfloat16)
    if x.dtype != torch.int8:
        return x
    # In place: what is mixed in one operation, torch first converts into a tensor of its own (measured on the CPU).
    x = x.float().mul_(arrays[scale_name(name)].float().unsqueeze(-1))
    if needed := constant_names(name):
        mean, std = (constants[constant] for constant in needed)
        torch.addcmul(mean, x, std, out=x)
    return x


def _quantised(x: Tensor, mean_std: list[Tensor]) -> tuple[Tensor, Tensor]:
    if mean_std:
        mean, std = mean_std
        x = (x - mean).div_(std)
    scale = _scale(x.abs().amax(dim=-1))
    divisor = torch.where(scale > 0, scale, 1).float().unsqueeze(-1)
    return x.div(divisor).round_().to(torch.int8), scale


def _scale(largest: Tensor) -> Tensor:
    """The smallest float16 that is not below largest / 127.

    The next one is had by arithmetic and not from its bits, so that exported programs can compute it: 1.25 / 2048 of a number is
    more than half a step of float16 and less than a step and a half, and so are five eighths of the smallest step, near 0.
    """
    # By a tensor, as torch multiplies by the inverse of a number on a GPU, which rounds twice.
    wanted = largest / torch.full_like(largest, STEPS)
    scale = wanted.half()
    nearest = scale.float()
    above = nearest + (nearest * (1.25 / 2048)).clamp(min=0.625 * 2.0**-24)
    return torch.where(nearest < wanted, above.half(), scale)
