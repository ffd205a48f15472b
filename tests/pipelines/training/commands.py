"""`vcache ...` in a process of its own that has everything imported: a fork of a server that does the importing once."""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["vcache.pipelines.cli", "vcache.pipelines.training.train_head"])


def start(line: str, log: Path) -> BaseProcess:
    """With one thread as the tests have; what it says goes to `log`, where nobody needs a terminal."""
    process = _FORKS.Process(target=_run, args=(line, str(log)), daemon=True)
    process.start()
    return process


def status(process: BaseProcess, timeout: float | None = None) -> int | None:
    """Its exit status once it has ended; None after so many seconds."""
    process.join(timeout)
    return process.exitcode


def _run(line: str, log: str) -> None:
    import torch

    from vcache.pipelines.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    sys.argv = ["vcache", *line.split()]
    main()
