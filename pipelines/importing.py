"""`vcache import-head`: a checkpoint of a head's official code becomes a run, which `vcache eval` takes as any other."""

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from vcache.heads.evl import EVL
from vcache.heads.official import (
    CheckpointMismatch,
    InferredConfig,
    check_evl_config,
    evl_state_dict,
    infer_evl_config,
    load_evl_state_dict,
)
from vcache.heads.registry import get_head
from vcache.pipelines.checkpoint_file import CheckpointError, read_checkpoint_file
from vcache.pipelines.class_file import read_class_names
from vcache.pipelines.console import count, out
from vcache.pipelines.runs import Run, check_free, next_run_folder
from vcache.pipelines.settings import build, split_settings

SOURCE = "OpenGVLab/efficient-video-recognition at b282e8b"

# Width and grid of OpenAI's towers: open_clip's name of each.
_BACKBONES = {
    (768, (14, 14)): "ViT-B-16-quickgelu",
    (768, (7, 7)): "ViT-B-32-quickgelu",
    (1024, (16, 16)): "ViT-L-14-quickgelu",
    (1024, (24, 24)): "ViT-L-14-336-quickgelu",
}
_RELEASED = re.compile(r"k400_vit[bl]\d+_(\d+)f_dec(\d+)x(\d+)")
# Of the released files, by their frames: the stride, and the views that the evaluation scripts average (scripts/eval_*.sh).
_STRIDES = {8: 16, 16: 16, 32: 8}
_VIEWS = {8: "3x1", 16: "1x3", 32: "1x3"}


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
class ImportSummary:
    run: str
    file: str
    head: str
    head_config: dict[str, Any]
    num_parameters: int
    class_names: bool
    """Whether the run has names for its classes."""
    extract: str
    """The `vcache extract` line of what it reads; words in capitals are for the user to fill in."""
    notes: tuple[str, ...]


def import_head(config: ImportConfig) -> ImportSummary:
    """Read an official checkpoint and write a run folder, all of it or nothing. No code of the file is run.

    Raises:
        UnknownHead, SettingError: no such head, or a setting that it does not have.
        CheckpointError: the file is not a checkpoint of the head, is damaged, or does not tell a field; names `--set` for it.
        ClassFileError: the class file does not give each class one name.
        RunError: `out` is not empty.
    """
    if get_head(config.head) is not EVL:
        raise CheckpointError(
            f"head {config.head!r} has no official checkpoints. Of those that have, evl can be imported."
        )
    (settings,) = split_settings(config.settings, EVL.Config)
    folder = config.out or next_run_folder(config.head)
    check_free(folder)
    head, notes = read_evl(config.file, settings)
    class_names = read_class_names(config.classes, head.config.num_classes) if config.classes else None
    extract = extract_line(head.config, config.file.name)
    run_config = _run_config(config, head.config, extract)
    with _whole_or_not(folder) as part:
        Run.create(part, run_config, class_names).save_head(head.state_dict())
    return ImportSummary(
        run=str(folder),
        file=str(config.file),
        head=config.head,
        head_config=dataclasses.asdict(head.config),
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        class_names=class_names is not None,
        extract=extract,
        notes=notes,
    )


def read_evl(file: Path, settings: Mapping[str, Any]) -> tuple[EVL, tuple[str, ...]]:
    """The head in an official EVL checkpoint, and what is to be said of how it was read."""
    checkpoint = read_checkpoint_file(file)
    try:
        state = evl_state_dict(checkpoint)
        inferred = infer_evl_config(state)
        _check_told(file, inferred, settings)
        config = build(EVL.Config, {**inferred.fields, **settings})
        check_evl_config(config, state)
        head = EVL(config)
        load_evl_state_dict(head, state, advice="The official code writes no such file.")
    except CheckpointMismatch as error:
        raise CheckpointError(f"{file} is not an EVL checkpoint that fits: {str(error).rstrip('.')}.") from error
    return head, _notes(file.name, config, settings)


def extract_line(config: EVL.Config, file_name: str) -> str:
    """The `vcache extract` command that makes what the head reads; words in capitals where neither weights nor name tell."""
    model, frames, released = _model(config), config.num_frames, _is_released(config, file_name)
    last = config.layers == tuple(range(-len(config.layers), 0))
    line = ["vcache", "extract", "k400" if released else "DATASET", "--split", "val", "--model", model]
    line += ["--layers", f"{-len(config.layers)}:" if last else ",".join(map(str, config.layers))]
    line += ["--frames", str(frames), "--stride", str(_STRIDES[frames]) if released else "STRIDE"]
    line += ["--eval-views", _VIEWS[frames]] if released else []
    line += [] if config.temporal_cross_attention else ["--cross-frame", "none"]
    return shlex.join(line)


def print_import(summary: ImportSummary) -> None:
    config = summary.head_config
    rows, columns = config["grid"]
    out.print(f"[bold]{escape(summary.run)}[/bold]", soft_wrap=True)
    lines = [
        f"{summary.head} of {summary.file}: {summary.num_parameters:,} parameters, {config['num_classes']} classes"
        + ("" if summary.class_names else ", whose names are those of the store that it is evaluated on"),
        f"reads {count(len(config['layers']), 'layer')} ({', '.join(map(str, config['layers']))}) of {config['num_frames']} "
        f"frames, {rows}x{columns} patches of width {config['width']}; {config['num_heads']} heads",
        *summary.notes,
        f"extract with:   {summary.extract}",
        f"evaluate with:  {shlex.join(['vcache', 'eval', summary.run])} --store STORE",
    ]
    for line in lines:
        out.print(f"  {escape(line)}", soft_wrap=True, highlight=False)


def _check_told(file: Path, inferred: InferredConfig, settings: Mapping[str, Any]) -> None:
    for name, why in inferred.unknown.items():
        if name not in settings:
            example = {"grid": "14,14", "num_frames": "8", "num_heads": "12"}[name]
            raise CheckpointError(f"{file} does not tell {name}: {why}. Say it as in  --set {name}={example}")


def _notes(file_name: str, config: EVL.Config, settings: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if "num_heads" not in settings:
        notes.append("heads are taken to have 64 channels, as CLIP's; no checkpoint says it (--set num_heads=N)")
    if (named := _RELEASED.match(file_name)) and not _is_released(config, file_name):
        frames, layers, width = named.groups()
        notes.append(
            f"the name of the file says {frames} frames, {layers} layers and width {width}, its weights say "
            f"{config.num_frames}, {len(config.layers)} and {config.width}"
        )
    # dataset.py normalises, then resizes bilinearly without antialiasing; --fp16 is the default of main.py.
    notes.append(
        "trained on OpenAI's CLIP in float16 and frames resized bilinearly; vcache resizes as CLIP does, and a GPU extracts in "
        "float16 by default: the accuracy may differ a little from the published one"
    )
    return tuple(notes)


def _is_released(config: EVL.Config, file_name: str) -> bool:
    """Whether the name is one of the released files', and the weights are what it says."""
    named = _RELEASED.match(file_name)
    told = (config.num_frames, len(config.layers), config.width)
    return named is not None and tuple(map(int, named.groups())) == told and config.num_frames in _STRIDES


def _model(config: EVL.Config) -> str:
    return _BACKBONES.get((config.width, config.grid), "MODEL")


def _run_config(config: ImportConfig, head_config: EVL.Config, extract: str) -> dict[str, Any]:
    with config.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "head": config.head,
        "head_config": dataclasses.asdict(head_config),
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
            "source": SOURCE,
            "settings": dict(config.settings),
            "extract": extract,
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
