"""`--precision` of training: in which dtype the products of a head are computed.

Parameters, optimiser, loss and metrics are float32 whatever it is, and so are validation and `vcache eval`: what a run
reports does not depend on the machine that evaluates it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

TRAINING_PRECISIONS = ("auto", "float32", "bfloat16", "float16")


class PrecisionError(ValueError):
    """The precision that was asked for is none, or not one of the device."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Autocast to a dtype on a device; "float32" is none."""

    name: str
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """Around the forward pass of a head."""
        if self.name == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.name))

    @property
    def item_bytes(self) -> int:
        """Of a number that products read and give."""
        dtype: torch.dtype = getattr(torch, self.name)
        return dtype.itemsize

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where float16 would round small gradients to 0; of other dtypes it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "float16")


def training_precision(name: str, device: torch.device) -> MixedPrecision:
    """What `--precision NAME` means: "auto" is float32 on a CPU, on a GPU bfloat16 if it computes in it, else float16.

    Raises:
        PrecisionError: there is no such precision, or it is float16 on a CPU.
    """
    if name not in TRAINING_PRECISIONS:
        raise PrecisionError(f"--precision {name!r} is none of {', '.join(TRAINING_PRECISIONS)}.")
    if name == "float16" and device.type == "cpu":
        raise PrecisionError(
            "--precision float16 is for a GPU: a CPU computes it no faster, and float16 loses small gradients. "
            "Use --precision bfloat16, which has the range of float32, or float32."
        )
    return MixedPrecision(name=_automatic(device) if name == "auto" else name, device=device)


def _automatic(device: torch.device) -> str:
    if device.type != "cuda":
        return "float32"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
