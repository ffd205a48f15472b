"""Which device `--device` means."""

import torch


class DeviceError(ValueError):
    """The device that was asked for is not there."""


def select_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU; anything else is a torch device name. DeviceError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"--device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here. Use --device cpu."
        )
    return device
