"""Writes what exported_folder.py reads: the files of a model, and the config.json with their digests."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vcache.pipelines.prediction.exported_folder import (
    BACKBONE,
    CLASSES,
    CONFIG,
    CONSTANTS,
    FORMAT_VERSION,
    HEAD,
    KIND,
    PROJECTION,
    config_digest,
    file_digest,
    plan_to_dict,
)
from vcache.pipelines.prediction.video_model import VideoModel
from vcache.pipelines.runs import Run, as_safetensors, write_bytes, write_text
from vcache.pipelines.setup import versions_of
from vcache.pipelines.tail_file import TAIL, tail_bytes
from vcache.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported, and where it comes from."""

    run: Run
    which: str
    """The weights, one of WEIGHTS."""
    manifest: Manifest
    """Of the store by which the model was opened."""
    model: VideoModel
    """Its head is a `settled_head`."""


def settled_head(head: Any) -> Any:
    """The head for the classes that it was given, without what made them: of learnt prompts, which need the text tower of the
    backbone, stay the embeddings of the classes; and it is one for as many classes as it has text of."""
    needs = requirements_of(head)
    if not needs.by_name and not needs.prompts:
        return head
    rows = head.class_embeddings().detach()
    config = replace(head.config, num_classes=len(rows))
    if not needs.prompts:
        return _rebuilt(head, config, head.state_dict())
    state = {name: x for name, x in head.state_dict().items() if not name.startswith("classifier.")}
    text = {"classifier.embeddings": rows, "classifier.logit_scale": head.classifier.logit_scale.detach()}
    return _rebuilt(head, replace(config, classifier="text", frozen=True), {**state, **text})


def requirements_of(head: Any) -> Any:
    """What the head reads, by its config."""
    return type(head).requires(head.config)


def _rebuilt(head: Any, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    other: Any = type(head)(config)
    if requirements_of(head).tail:
        other.set_tail(head.tail)
    other.load_state_dict(state)
    moved: nn.Module = other.to(next(iter(state.values())).device).eval()
    return moved


def estimated_bytes(model: VideoModel) -> int:
    """Of the folder without compiled programs."""
    modules = [model.head, model.extractor.backbone]
    modules += [model.head.tail] if requirements_of(model.head).tail else []
    return sum(x.numel() * x.element_size() for module in modules for x in module.state_dict().values())


def write_model(folder: Path, source: Source) -> None:
    """The weights and the class names; what is there is whole."""
    model, needs = source.model, requirements_of(source.model.head)
    write_text(folder / CLASSES, "\n".join(model.class_names) + "\n")
    write_bytes(folder / HEAD, as_safetensors(model.head.state_dict()))
    write_bytes(folder / BACKBONE, as_safetensors(model.extractor.backbone.visual.state_dict()))
    if needs.tail:
        write_bytes(folder / TAIL, tail_bytes(model.head.tail, needs.tail))
    if constants := _constants(model):
        write_bytes(folder / CONSTANTS, as_safetensors(constants))


def write_config(folder: Path, source: Source, exported: Mapping[str, Any]) -> None:
    """config.json, last, with the digests of all that is there; `exported` says how the programs were checked."""
    files = sorted(path for path in folder.iterdir() if path.name != CONFIG and not path.name.endswith(".part"))
    config = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        **_model_config(source.model),
        **provenance(source),
        "programs": dict(exported),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in files},
    }
    config = json.loads(json.dumps(config))
    write_text(folder / CONFIG, json.dumps({**config, "sha256": config_digest(config)}, indent=2) + "\n")


def provenance(source: Source) -> dict[str, Any]:
    """Which run, store and versions the model comes from; nothing of it changes a score. Paths of this machine are left out."""
    run, manifest = source.run.config, source.manifest
    told = ("preset", "recipe", "train_split", "seed", "num_train", "num_videos", "left_out", "views", "imported")
    return {
        "run": {
            "name": source.run.path.resolve().name,
            "which": source.which,
            **{name: run[name] for name in told if name in run},
        },
        "store": {"key": manifest.key, "dataset": manifest.dataset, "spec": manifest.spec},
        "weights": _weights_named(manifest),
        "versions": {"vcache": version("vcache"), **versions_of("torch", "open_clip_torch", "safetensors")},
    }


def _weights_named(manifest: Manifest) -> dict[str, str | None]:
    """The backbone as it was asked for, without folders of this machine."""
    pretrained = manifest.facts["request"].get("pretrained")
    return {"model": manifest.spec["model"], "pretrained": Path(pretrained).name if pretrained else None}


def _model_config(model: VideoModel) -> dict[str, Any]:
    extractor, backbone = model.extractor, model.extractor.backbone
    projections = model.weights.projections.items()
    return {
        "head": model.name,
        "head_config": asdict(model.head.config),
        "multi_label": model.multi_label,
        "outputs": model.outputs,
        "plan": plan_to_dict(model.plan),
        "arrays": [asdict(spec) for spec in model.arrays],
        "usual_frames": model.usual_frames,
        "sampling": extractor.sampling.to_dict(),
        "preprocessing": extractor.preprocessing.to_dict(),
        "decoder": extractor.decoder,
        "batch_size": extractor.batch_size,
        "num_threads": extractor.num_threads,
        "backbone": {
            "architecture": {**asdict(backbone.architecture), "text": {}},
            "precision": str(backbone.dtype).removeprefix("torch."),
            "weights_sha256": backbone.weights_sha256,
            "facts": asdict(backbone.facts),
        },
        "projections": {str(i): {"num_heads": p.num_heads, "ln_eps": p.ln_eps} for i, p in projections},
    }


def _constants(model: VideoModel) -> dict[str, Tensor]:
    made = {
        f"projections/{layer}/{name}": getattr(projection, name)
        for layer, projection in model.weights.projections.items()
        for name in PROJECTION
    }
    return {**model.weights.constants, **made}
