"""`vcache import-head`: a checkpoint of a head's official code becomes a run, which `vcache eval` takes as any other."""

import dataclasses
import hashlib
import importlib
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from vcache.heads.registry import get_head
from vcache.pipelines.checkpoint_file import CheckpointError
from vcache.pipelines.console import out
from vcache.pipelines.runs import Run, check_free, next_run_folder
from vcache.pipelines.settings import split_settings
from vcache.pipelines.upkeep.register import note_run

IMPORTERS = {name: f"vcache.pipelines.import_{name}" for name in ("actionclip", "aim", "dist", "evl", "text4vis")}
"""Heads with official checkpoints, and the module whose `read(file, settings, classes) -> ImportedHead` reads one."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """One `vcache import-head` command."""

    head: str
    file: Path
    classes: Path | None = None
    """Names of the classes (class_file.py); None: the run has none, and takes those of the store it is evaluated on."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Fields of the head's Config that the file does not tell, as text."""
    out: Path | None = None
    """None: the next free `runs/HEAD-n`."""


@dataclass(frozen=True, kw_only=True)
class ImportedHead:
    """What an importer reads in a file."""

    head: Any
    """With the weights of the file."""
    class_names: tuple[str, ...] | None
    num_classes: int | None
    """None: the head classifies by text, and the file does not tell of which classes."""
    source: str
    """The official repository and its commit."""
    reads: str
    """What the head reads, in words."""
    extract: str
    notes: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the run is to record of the file."""


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    run: str
    file: str
    head: str
    head_config: dict[str, Any]
    num_parameters: int
    class_names: bool
    """Whether the run has names for its classes."""
    reads: str
    extract: str
    """The `vcache extract` line of what it reads; words in capitals are for the user to fill in."""
    notes: tuple[str, ...]


def import_head(config: ImportConfig) -> ImportSummary:
    """Read an official checkpoint and write a run folder, all of it or nothing. No code of the file is run.

    Raises:
        UnknownHead, SettingError: no such head, or a setting that it does not have.
        LayerError: layers are set that the backbone does not have.
        CheckpointError: the file is not a checkpoint of the head, is damaged, or does not tell a field; names `--set` for it.
        ClassFileError: the class file does not give each class one name.
        RunError: `out` is not empty.
    """
    head_class = get_head(config.head)
    if config.head not in IMPORTERS:
        raise CheckpointError(
            f"head {config.head!r} has no official checkpoints. Those of {', '.join(IMPORTERS)} can be imported."
        )
    (settings,) = split_settings(config.settings, head_class.Config)
    folder = config.out or next_run_folder(config.head)
    check_free(folder)
    read: ImportedHead = importlib.import_module(IMPORTERS[config.head]).read(config.file, settings, config.classes)
    run_config = _run_config(config, read)
    with _whole_or_not(folder) as part:
        run = Run.create(part, run_config, read.class_names)
        if run.requirements().tail:  # the tower in the file
            run.save_tail(read.head.tail)
        run.save_head(read.head.state_dict())
    note_run(folder, run_config)
    return ImportSummary(
        run=str(folder),
        file=str(config.file),
        head=config.head,
        head_config=run_config["head_config"],
        num_parameters=sum(parameter.numel() for parameter in read.head.parameters()),
        class_names=read.class_names is not None,
        reads=read.reads,
        extract=read.extract,
        notes=read.notes,
    )


def print_import(summary: ImportSummary) -> None:
    out.print(f"[bold]{escape(summary.run)}[/bold]", soft_wrap=True)
    lines = [
        f"{summary.head} of {summary.file}: {summary.num_parameters:,} parameters, {_classes(summary)}",
        f"reads {summary.reads}",
        *summary.notes,
        f"extract with:   {summary.extract}",
        f"evaluate with:  {shlex.join(['vcache', 'eval', summary.run])} --store STORE",
    ]
    for line in lines:
        out.print(f"  {escape(line)}", soft_wrap=True, highlight=False)


def _classes(summary: ImportSummary) -> str:
    if (number := summary.head_config["num_classes"]) is None:
        return "whose classes are those of the store that it is evaluated on, compared by their text"
    return f"{number} classes" + (
        "" if summary.class_names else ", whose names are those of the store that it is evaluated on"
    )


def _run_config(config: ImportConfig, read: ImportedHead) -> dict[str, Any]:
    with config.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "head": config.head,
        "head_config": {**dataclasses.asdict(read.head.config), "num_classes": read.num_classes},
        "recipe": None,
        "train_split": None,
        "views": {},
        "seed": None,
        "dataset": None,
        "store": None,
        "store_key": None,
        "store_spec": None,
        "versions": {"torch": torch.__version__},
        "imported": {
            "file": str(config.file.resolve()),
            "sha256": digest,
            "source": read.source,
            "settings": dict(config.settings),
            "extract": read.extract,
            **read.facts,
        },
    }


@contextmanager
def _whole_or_not(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end, and is gone after an error."""
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        yield part
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
