"""`vcache export`: a run as one folder that predicts without run, store, videos and checkpoint; and as a compiled program."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from vcache.pipelines import console
from vcache.pipelines.prediction.export_card import model_card
from vcache.pipelines.prediction.export_check import Checked, ExportError
from vcache.pipelines.prediction.export_files import (
    Source,
    estimated_bytes,
    provenance,
    settled_head,
    write_config,
    write_model,
)
from vcache.pipelines.prediction.export_onnx import ONNX, check_compilable, check_onnx, program_metadata, write_onnx
from vcache.pipelines.prediction.export_torch import PT2, write_torch
from vcache.pipelines.prediction.exported_folder import CARD, is_exported
from vcache.pipelines.prediction.video_model import open_video_model
from vcache.pipelines.runs import Run, write_text
from vcache.store.files import published_folder, remove_stale_temporaries
from vcache.store.manifest import read_manifest
from vcache.store.object_path import StorePath

FOLDER, FORMATS = "folder", ("folder", "onnx", "torch")
"""The folder is always written; the others are programs in it."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    num_bytes: int
    head: str
    backbone: str
    num_classes: int
    programs: dict[str, Checked]
    """By the name of the file, how far its logits were from the model's."""
    notes: tuple[str, ...] = ()


def export_run(
    path: Path,
    *,
    out: Path | None = None,
    formats: Sequence[str] = (FOLDER,),
    store: StorePath | None = None,
    which: str = "last",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write the folder of a finished run, default exports/NAME. It is there whole, or not at all.

    Args:
        formats: "onnx" and "torch" add a compiled program, which is compared with the model before it is kept.
        store, which: as for `open_video_model`.
        on_stage: hears what is done next, with the size of what is written.

    Raises:
        ExportError: the place is taken, a program cannot be made of this head, or a package is missing.
        RunError, StoreKeyMismatch, HeadStoreMismatch, CannotRecompute: as for a prediction.
    """
    folder = out or Path("exports") / path.resolve().name
    _check(path, folder, formats)
    on_stage("opening the run and its backbone")
    model = open_video_model(path, store=store, which=which, device="cpu")
    model = replace(model, head=settled_head(model.head))
    if set(formats) - {FOLDER}:
        check_compilable(model)
    if "onnx" in formats:
        check_onnx(model)
    assert model.store is not None, "a run is opened by a store"
    source = Source(run=Run.open(path), which=which, manifest=read_manifest(model.store), model=model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        folder.rmdir()  # empty, which _check saw
    remove_stale_temporaries(folder.parent.glob(f".{escape(folder.name)}.*.tmp"))  # of exports that were killed
    with published_folder(folder) as temporary:
        programs = _programs(temporary, source, formats, on_stage)
        on_stage(f"writing {console.size(estimated_bytes(model))} of weights")
        write_model(temporary, source)
        told = {name: _told(checked, source) for name, checked in programs.items()}
        write_text(temporary / CARD, model_card(source, folder.name, told))
        write_config(temporary, source, told)
        num_bytes = sum(file.stat().st_size for file in temporary.iterdir())
    return Exported(
        folder=folder,
        num_bytes=num_bytes,
        head=model.name,
        backbone=model.extractor.backbone.facts.model,
        num_classes=len(model.class_names),
        programs=programs,
        notes=model.notes,
    )


def _check(path: Path, folder: Path, formats: Sequence[str]) -> None:
    """What can be refused before anything is loaded."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ExportError(f"--format {unknown[0]!r} is not known; choose from: {', '.join(FORMATS)}.")
    if is_exported(path):
        raise ExportError(f"{path} is an exported folder already: copy it, or export the run that it was made of.")
    if folder.name in ("", ".."):
        raise ExportError(f"--out {folder} is the folder that you are in, or one above it: name a new one in it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(
            f"{folder} is there already: an export is never written over. Choose another --out, or delete it."
        )


def _programs(
    folder: Path, source: Source, formats: Sequence[str], on_stage: Callable[[str], None]
) -> dict[str, Checked]:
    """Compiled before the weights are written: what cannot be exported is known first."""
    model, programs = source.model, dict[str, Checked]()
    metadata = program_metadata(model, provenance(source))
    if "onnx" in formats:
        on_stage(f"compiling {ONNX} (about {console.size(estimated_bytes(model))}) and comparing its logits")
        programs[ONNX] = write_onnx(folder, model, metadata)
    if "torch" in formats:
        on_stage(f"compiling {PT2} (about {console.size(estimated_bytes(model))}) and comparing its logits")
        programs[PT2] = write_torch(folder, model, json.dumps(metadata))
    return programs


def _told(checked: Checked, source: Source) -> dict[str, Any]:
    """Of a program, in config.json and in the card."""
    shape = program_metadata(source.model, provenance(source))["input"]["shape"]
    return {**checked.to_dict(), "input": shape}
