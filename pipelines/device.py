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


def device_name(device: torch.device) -> str:
    """For a record of what something ran on: "cuda (NVIDIA H100 80GB HBM3)", "cpu (8 threads)"."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({what})" if device.type in ("cuda", "cpu") else device.type
