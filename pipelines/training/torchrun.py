"""What torchrun says to a process that it starts, and what it is told when the process fails."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import torch

GRACE_SECONDS = 10.0
"""So long a process that lost another waits to be ended by torchrun, in silence."""


class WorldError(RuntimeError):
    """The processes cannot start together, or do not train the same."""


def place_from_environment() -> tuple[int, int, int] | None:
    """(rank, size, rank on this machine) as torchrun says, or None."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    there = {name: os.environ[name] for name in names if name in os.environ}
    if not there:
        return None
    lacking = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise WorldError(
            f"the environment has {', '.join(there)} but not {', '.join(lacking)}: a part of what torchrun sets. Start with "
            f"`torchrun --nproc-per-node N --no-python vcache ...`, or, for one process, `unset {' '.join(there)}` before."
        )
    try:
        rank, size, local_rank = (int(there[name]) for name in names)
    except ValueError as error:
        raise WorldError(f"{', '.join(f'{n}={v}' for n, v in there.items())}: not all of them are numbers.") from error
    if not (0 <= rank < size and local_rank >= 0):
        raise WorldError(f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank}: there is no such process.")
    return rank, size, local_rank


def is_first_process() -> bool:
    """Whether this is the one that speaks for all."""
    place = place_from_environment()
    return place is None or place[0] == 0


def num_processes_here(size: int) -> int:
    """Of `size` processes, those on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size))


def own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise WorldError(f"--device {device} is one GPU for all processes. Use --device cuda: each takes its own.")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise WorldError(
            f"--device cuda gives each process a GPU of its own, and process {local_rank} of this machine has none: there are "
            f"{num_gpus}. Start as many with torchrun --nproc-per-node {num_gpus}, or use --device cpu."
        )
    return torch.device("cuda", local_rank)


def wait_to_be_ended() -> None:
    """Torchrun ends this process when it sees the other's end, also where a SIGTERM otherwise asks for a checkpoint."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)


def tell_torchrun(error: Exception) -> None:
    """Into the file whose words torchrun shows as the root cause, after everything else."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        extra = {"py_callstack": f"{type(error).__name__}: {error}", "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}))
