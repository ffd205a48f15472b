"""A folder that `vcache export` wrote: all that a VideoModel is made of, with the digest of every file.

FOLDER/config.json           what the weights do not tell: head, plan, arrays, sampling, preprocessing, backbone, where it comes
                             from; the sha256 of every other file, and of itself without that line
FOLDER/classes.txt           class names, one a line, in the order of the logits
FOLDER/head.safetensors      the head, with the text embeddings that it classifies by
FOLDER/backbone.safetensors  the image tower of the backbone, in the precision in which it ran
FOLDER/tail.safetensors      of a head that runs top blocks of the backbone: those (tail_file.py)
FOLDER/constants.safetensors what features are made with besides: channel statistics of int8, projections of derived maps
FOLDER/README.md             the model card
FOLDER/model.onnx, model.pt2 compiled programs, where they were asked for; nothing here reads them

It is written by export_files.py. Nothing in it is unpickled.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vcache.extract.backbone import FrozenBackbone, backbone_of
from vcache.extract.datasets.base import VideoDataset
from vcache.extract.decode import decoder_versions
from vcache.extract.preprocess import Preprocessing
from vcache.extract.sampling import sampling_from_dict
from vcache.extract.weights import Architecture
from vcache.heads.query_key import QueryKeyProjection
from vcache.heads.registry import get_head
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.device import select_device
from vcache.pipelines.loading.batch import StoreWeights
from vcache.pipelines.prediction.video_model import VideoModel
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.settings import build
from vcache.pipelines.setup import versions_of
from vcache.pipelines.tail_file import TAIL, read_tail
from vcache.store.key import spec_difference
from vcache.store.layout import ArraySpec
from vcache.store.object_path import StorePath

CONFIG, CLASSES, CARD = "config.json", "classes.txt", "README.md"
HEAD, BACKBONE, CONSTANTS = "head.safetensors", "backbone.safetensors", "constants.safetensors"
KIND, FORMAT_VERSION = "vcache export", 1
PROJECTION = ("ln_weight", "ln_bias", "weight", "bias")
"""Tensors of a QueryKeyProjection, in constants.safetensors as projections/LAYER/NAME."""


class ExportedFolderError(ValueError):
    """A folder that is no export, or not as it was written; says which file, and what to do."""


def is_exported(path: Path) -> bool:
    """Whether `vcache export` wrote this folder, as far as its config.json says, or a backbone in it, which no run has: a folder
    with a damaged config.json is named as what it is."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    return (isinstance(config, dict) and config.get("kind") == KIND) or (path / BACKBONE).is_file()


def open_exported(
    path: Path, device: str = "auto", *, store: StorePath | None = None, which: str = "last"
) -> VideoModel:
    """The model of an exported folder, to the bit that of the run it was exported from, on the same machine.

    Every file is read and compared with its digest first: 350 MB of ViT-B take a second.

    Args:
        store, which: what was asked of a run; a folder has no store, and weights of one kind.

    Raises:
        ExportedFolderError: it is no such folder, of a newer version, or a file is missing or not as it was written; or a store
            was named, or the best weights are wanted of a folder that has the last ones.
        DecoderError: the decoder of the features is not installed.
    """
    on = select_device(device)
    config = read_exported_config(path)
    _check_asked(path, config, store, which)
    notes = _check_files(path, config)
    try:
        return _model(path, config, on, notes)
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ExportedFolderError(
            f"{path / CONFIG} and the files beside it do not fit together ({type(error).__name__} {error}): it was written by "
            f"vcache {config.get('versions', {}).get('vcache', '?')}. Open it with that version, or export the run again."
        ) from error


def read_exported_config(path: Path) -> dict[str, Any]:
    """The checked contents of config.json.

    Raises:
        ExportedFolderError: it is not there, of something else, damaged, or of a newer version.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ExportedFolderError(f"{path} has no {CONFIG}. `vcache export RUN --out FOLDER` writes such a folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportedFolderError(_damaged(file)) from error
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise ExportedFolderError(f"{file} was not written by `vcache export`.")
    if config.get("sha256") != config_digest(config):
        raise ExportedFolderError(_damaged(file))
    if config["format_version"] > FORMAT_VERSION:
        raise ExportedFolderError(
            f"{path} has format {config['format_version']}, and this vcache reads up to {FORMAT_VERSION}. Update vcache."
        )
    return config


def _check_asked(path: Path, config: Mapping[str, Any], store: StorePath | None, which: str) -> None:
    """What is asked of runs alone is refused, rather than answered by something else."""
    if store is not None:
        raise ExportedFolderError(
            f"--store {store}: {path} is an exported folder, which has no store. Leave --store out."
        )
    if which not in ("last", held := config["run"]["which"]):  # "last" is also what is asked where nothing is said
        raise ExportedFolderError(
            f"--which {which}: {path} has the {held} weights of its run alone. Export the others to a folder of their own:  "
            f"vcache export RUN --which {which} --out FOLDER"
        )


def config_digest(config: Mapping[str, Any]) -> str:
    """Of everything in it but the digest itself."""
    told = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_to_dict(plan: ReadPlan) -> dict[str, Any]:
    """In types that JSON has."""
    return {name: _pairs(value) if isinstance(value, Mapping) else value for name, value in vars(plan).items()}


def _pairs(layers: Mapping[int, int]) -> list[list[int]]:
    return [[asked, absolute] for asked, absolute in layers.items()]


def _plan(values: Mapping[str, Any]) -> ReadPlan:
    layers = {name: dict(map(tuple, values[name])) for name in ("tokens", "cls", "maps")}
    return ReadPlan(**{**values, **layers})


def _damaged(file: Path) -> str:
    return f"{file} is not as it was exported: a byte has changed. Restore it from a copy, or export the run again."


def _check_files(path: Path, config: Mapping[str, Any]) -> list[str]:
    """A note where the model card was changed, which changes no score."""
    notes = []
    for name, told in config["files"].items():
        file = path / name
        if name == CARD:
            changed = not file.is_file() or file_digest(file) != told["sha256"]
            notes += [f"{file} is not the model card that was exported."] if changed else []
        elif not file.is_file():
            raise ExportedFolderError(f"{file} is missing. Restore it from a copy, or export the run again.")
        elif file_digest(file) != told["sha256"]:
            raise ExportedFolderError(_damaged(file))
    return notes


def _model(path: Path, config: Mapping[str, Any], device: torch.device, notes: list[str]) -> VideoModel:
    class_names = tuple((path / CLASSES).read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    backbone = _backbone(path, config["backbone"]).to(device)
    weights = _weights(path, config, device)
    extractor = _extractor(config, backbone, class_names)
    extractor.constants = weights.constants
    return VideoModel(
        source=path,
        name=config["head"],
        head=_head(path, config).to(device),
        extractor=extractor,
        plan=_plan(config["plan"]),
        arrays=tuple(_array(values) for values in config["arrays"]),
        weights=weights,
        class_names=class_names,
        multi_label=config["multi_label"],
        outputs=None if config["outputs"] is None else tuple(config["outputs"]),
        store_key=config["store"]["key"],
        usual_frames=config["usual_frames"],
        notes=(*notes, *_version_notes(config, extractor)),
    )


def _head(path: Path, config: Mapping[str, Any]) -> Any:
    kind = get_head(config["head"])
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in config["head_config"].items()}
    head = kind(build(kind.Config, settings))
    if TAIL in config["files"]:
        head.set_tail(read_tail(path / TAIL))
    head.load_state_dict(load((path / HEAD).read_bytes()))
    return head.eval()


def _backbone(path: Path, told: Mapping[str, Any]) -> FrozenBackbone:
    """In half precision the weights are those of the products, and the digest is that of the float32 ones."""
    backbone = backbone_of(
        Architecture(**told["architecture"]), load((path / BACKBONE).read_bytes()), told["precision"]
    )
    backbone.weights_sha256 = told["weights_sha256"]
    return backbone


def _weights(path: Path, config: Mapping[str, Any], device: torch.device) -> StoreWeights:
    tensors: dict[str, Tensor] = {}
    if CONSTANTS in config["files"]:
        tensors = {name: x.to(device) for name, x in load((path / CONSTANTS).read_bytes()).items()}
    projections = {
        int(layer): QueryKeyProjection(
            **{name: tensors.pop(f"projections/{layer}/{name}") for name in PROJECTION},
            num_heads=facts["num_heads"],
            ln_eps=facts["ln_eps"],
        )
        for layer, facts in config["projections"].items()
    }
    return StoreWeights(tensors, projections)


def _extractor(config: Mapping[str, Any], backbone: FrozenBackbone, class_names: tuple[str, ...]) -> ClipExtractor:
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in config["preprocessing"].items()
    }
    return ClipExtractor(
        VideoDataset(config["store"]["dataset"], Path("/"), class_names, ()),
        sampling_from_dict(config["sampling"]),
        Preprocessing(**values),
        backbone,
        num_threads=config["num_threads"],
        batch_size=config["batch_size"],
        decoder=config["decoder"],
    )


def _array(values: Mapping[str, Any]) -> ArraySpec:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return ArraySpec(**fields)


def _version_notes(config: Mapping[str, Any], extractor: ClipExtractor) -> Iterator[str]:
    """Of libraries that may change a bit of the features; everything else came with the folder."""
    spec = config["store"]["spec"]
    libraries = versions_of("torch", "open_clip_torch", *extractor.backbone.tower.libraries)
    now = {
        **spec,
        "decoder": decoder_versions(extractor.decoder),
        "versions": {**extractor.preprocessing.versions(), **libraries},
    }
    for name, then, here in spec_difference(spec, now):
        yield f"{name} was {then!r} when the features of the training were made, and is {here!r} here."
