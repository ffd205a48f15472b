"""model.onnx: head and backbone as one ONNX program, which onnxruntime runs without torch and vcache.

    frames uint8 (B, F, S, S, 3)  ->  logits float32 (B, K)        B is free, the rest fixed

Its metadata hold, as JSON under "vcache", the classes and how frames are chosen and resized. Weights above EXTERNAL_ABOVE bytes
go into model.onnx.data beside it: one file of protobuf holds no more than 2 GB.
"""

import importlib.util
import json
import keyword
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vcache.pipelines.prediction.export_check import Checked, ExportError, check_program
from vcache.pipelines.prediction.export_files import estimated_bytes
from vcache.pipelines.prediction.export_program import ProgramInput, VideoProgram
from vcache.pipelines.prediction.video_model import VideoModel

ONNX = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
EXTERNAL_ABOVE = 1_500_000_000
"""Bytes of weights; below the limit of 2 GB by what else a file holds."""
METADATA = "vcache"
"""Key of the metadata."""
_EXAMPLE_CLIPS = 2
"""Of any number but 0 and 1, which would stay as they are."""


def check_onnx(model: VideoModel) -> None:
    """Whether there is a chance, before anything is computed or written.

    Raises:
        ExportError: a package is missing, or the backbone runs in half precision.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"--format onnx needs {', '.join(missing)}, not installed here. Install with:  pip install {' '.join(missing)}"
        )
    if (dtype := model.extractor.backbone.dtype) != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ExportError(
            f"--format onnx: the features of {model.source} were made in {name}, and products in {name} come out differently in "
            "onnxruntime, by more than can be told from a mistake. Export the folder or --format torch, or train on a store that "
            "was extracted with --precision float32."
        )


def write_onnx(folder: Path, model: VideoModel, metadata: Mapping[str, Any]) -> Checked:
    """Compile the model into folder/model.onnx and compare it with the model.

    Raises:
        ExportError: the head has an operation that ONNX has not, or the program gives other logits.
    """
    import onnxruntime

    program, path = compiled(model), folder / ONNX
    with _only_foreseen_warnings():
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["frames"],
                output_names=["logits"],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(_refusal(model, "--format onnx", error)) from error
        assert onnx_program is not None
        onnx_program.model.metadata_props[METADATA] = json.dumps(metadata)
        onnx_program.save(str(path), external_data=estimated_bytes(model) > EXTERNAL_ABOVE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(frames: np.ndarray) -> np.ndarray:
        (logits,) = session.run(["logits"], {"frames": frames})
        return np.asarray(logits)

    return check_program(ONNX, run, model)


def check_compilable(model: VideoModel) -> None:
    """Whether there is a chance, before anything is computed or written.

    Raises:
        ExportError: torch has no way to write the head down as a program.
    """
    names = [name for name in model.head.state_dict() if any(map(keyword.iskeyword, name.split(".")))]
    if names:
        raise ExportError(
            f"a compiled program cannot be made of head {model.name!r} of {model.source}: torch.export writes programs in "
            f"Python, and its weight {names[0]!r} has a word of that language in its name. Leave out --format: the folder "
            "alone does everything that `vcache predict` needs."
        )


def compiled(model: VideoModel) -> torch.export.ExportedProgram:
    """The operations of torch from frames to logits, for any number of clips.

    Raises:
        ExportError: the head decides by numbers that it computes what it does next.
    """
    program, taken = VideoProgram(model), ProgramInput.of(model)
    example = torch.zeros(_EXAMPLE_CLIPS, *taken.shape, dtype=torch.uint8)
    try:
        with _only_foreseen_warnings():
            return torch.export.export(
                program, (example,), dynamic_shapes={"frames": {0: torch.export.Dim("clips", min=1)}}, strict=False
            )
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, TypeError) as error:
        raise ExportError(_refusal(model, "a compiled program", error)) from error


def program_metadata(model: VideoModel, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What whoever runs a program has to know: classes, how frames are chosen and prepared, where it comes from."""
    taken, extractor = ProgramInput.of(model), model.extractor
    rule = extractor.sampling.to_dict()
    return {
        "class_names": model.class_names,
        "probabilities": "sigmoid" if model.multi_label else "softmax",
        "input": {
            "name": "frames",
            "dtype": "uint8",
            "axes": ["clip", "frame", "row", "column", "red green blue"],
            "shape": [None, *taken.shape],
        },
        "sampling": {**rule, "pixels_per_frame": taken.pixels_per_frame, "every": taken.every},
        "preprocessing": extractor.preprocessing.to_dict(),
        "head": model.name,
        "backbone": extractor.backbone.facts.model,
        "store_key": model.store_key,
        "spec": provenance["store"]["spec"],
        "run": provenance["run"]["name"],
        "versions": {**provenance["versions"], **{name: version(name) for name in PACKAGES if _installed(name)}},
    }


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _refusal(model: VideoModel, asked: str, error: Exception) -> str:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the exporters wrap it in advice to their developers
    first = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return (
        f"{asked} cannot be made of head {model.name!r} of {model.source}: {first.rstrip('.')}. Leave out --format: the folder "
        "alone does everything that `vcache predict` needs."
    )


@contextmanager
def _only_foreseen_warnings() -> Iterator[None]:
    """The exporters' own, of parts of torch that they use and of what they do to an LSTM."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings(
                "ignore", category=category, module=r"(torch|onnxscript|onnx_ir|onnx|copyreg)(\..*)?"
            )
        yield
