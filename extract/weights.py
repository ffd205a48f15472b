"""Which weights a model name and `pretrained` mean; refuses every way that ends in random ones.

open_clip answers several requests with a model that was never trained and at most a line in the log: no `pretrained`, a
`local-dir:` folder without a weight file, a hub repository whose download failed. Features of such a model look like
features. So the checkpoint is found here, and each of these is an error that says what to pass; tower_weights.py reads it.
"""

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip

LOCAL_DIR = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
# open_clip's own order of preference; transformers' model.safetensors often lies beside these and is another format.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color", "mode")


class BackboneError(ValueError):
    """The backbone that was asked for cannot be had.

    BackboneError
    ├── RandomWeightsRefused   no weights were given, found, downloaded or fitting
    ├── ActivationMismatch     the weights were trained with QuickGELU and the model computes GELU, or the reverse
    ├── UnsupportedBackbone    not a model of open_clip, or an image tower that is not run block by block
    └── NoTextTower            a model or a checkpoint without a text tower, or with one that vcache cannot run
    """


class RandomWeightsRefused(BackboneError):
    """Weights that are not really loaded: the features would be those of a network that was never trained."""


class ActivationMismatch(BackboneError):
    """The weights belong to the other GELU: open_clip warns and goes on, and every feature is slightly wrong."""


class UnsupportedBackbone(BackboneError):
    """A model whose image tower vcache does not tap: other blocks, another pooling, no tokens."""


class NoTextTower(BackboneError):
    """Class names cannot be embedded with this model; its image features are not affected."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An image tower as open_clip's configuration describes it, before any weight."""

    name: str
    """Of open_clip, or for a local folder made of a digest of its configuration: a moved or renamed folder keeps it."""
    embed_dim: int
    quick_gelu: bool
    vision: dict[str, Any]
    preprocess: dict[str, Any]
    """What the configuration or the pretrained tag sets of open_clip's preprocessing."""
    text: dict[str, Any] = field(default_factory=dict)
    """The text tower beside it; empty where the configuration names none. No part of the name: it changes no feature."""


def find_architecture(model: str, pretrained: str | None) -> Architecture:
    """The image tower that `model` names, with the preprocessing that the tag `pretrained` was trained with.

    Raises:
        UnsupportedBackbone: open_clip has no such model.
        BackboneError: a `local-dir:` folder without a readable configuration.
    """
    if model.startswith(LOCAL_DIR):
        return _local_architecture(Path(model.removeprefix(LOCAL_DIR)).expanduser())
    name = model.replace("/", "-")  # ViT-B/16 is OpenAI's spelling of ViT-B-16
    if ":" in name:
        raise UnsupportedBackbone(f"model {model!r}: download that repository and pass local-dir:FOLDER.")
    config = open_clip.get_model_config(name)
    if config is None:
        raise UnsupportedBackbone(
            f"model {model!r}: open_clip has none of that name{_did_you_mean(name, open_clip.list_models())}"
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained or "")
    if not tag and "timm_model_name" in config["vision_cfg"]:
        tag = _tags_agree_on(name)
    return _architecture(name, config, tag)


def find_checkpoint(model: str, pretrained: str | None, architecture: Architecture) -> Path:
    """The file with the weights; downloaded if `pretrained` is a tag whose file is not in the cache yet.

    Raises:
        RandomWeightsRefused: there are none.
        ActivationMismatch: the tag's weights were trained with QuickGELU and the model computes GELU.
    """
    if model.startswith(LOCAL_DIR):
        if pretrained:
            raise RandomWeightsRefused(
                f"model {model!r} brings its own weights: leave --pretrained {pretrained} out, or pass a model's name."
            )
        return _file_in_folder(Path(model.removeprefix(LOCAL_DIR)).expanduser())
    name = architecture.name
    tags = _usable_tags(architecture)
    if not pretrained:
        raise RandomWeightsRefused(
            f"{name} without pretrained weights would be random: pass --pretrained FILE or a tag ({_listed(tags)})."
        )
    if tag := open_clip.get_pretrained_cfg(name, pretrained):
        if _other_gelu(architecture, pretrained):
            raise activation_mismatch(name, f"the {pretrained!r} weights", trained_with_quick_gelu=True)
        return _download(name, pretrained, tag)
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise RandomWeightsRefused(
            f"--pretrained {pretrained}: neither a file nor a tag of {name} ({_listed(tags)})"
            f"{_did_you_mean(pretrained, tags)}"
        )
    return path


def activation_mismatch(name: str, weights: str, *, trained_with_quick_gelu: bool) -> ActivationMismatch:
    """`weights` is how the message names them."""
    base = name.removesuffix("-quickgelu")
    trained, computed = ("QuickGELU", "GELU") if trained_with_quick_gelu else ("GELU", "QuickGELU")
    right = f"{base}-quickgelu" if trained_with_quick_gelu else base
    in_config = f'set "quick_gelu": {str(trained_with_quick_gelu).lower()} in {CONFIG_FILE}'
    mend = f"pass --model {right}" if right in open_clip.list_models() else in_config
    return ActivationMismatch(f"{weights} were trained with {trained}, and {name} computes {computed}: {mend}.")


def _architecture(name: str, config: dict[str, Any], preprocess: dict[str, Any]) -> Architecture:
    return Architecture(
        name=name,
        embed_dim=config["embed_dim"],
        quick_gelu=config.get("quick_gelu", False),
        vision=config["vision_cfg"],
        text=config.get("text_cfg") or {},
        preprocess={key: preprocess[key] for key in _PREPROCESS_KEYS if preprocess.get(key) is not None},
    )


def _tags_agree_on(name: str) -> dict[str, Any]:
    """The preprocessing of a file of weights: SigLIP's is not CLIP's, and all tags of such a model have the same."""
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    first, *others = tags or [{}]
    return {
        key: first[key] for key in _PREPROCESS_KEYS if key in first and all(first[key] == o.get(key) for o in others)
    }


def _local_architecture(folder: Path) -> Architecture:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise BackboneError(f"{LOCAL_DIR}{folder}: there is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content["model_cfg"]
        vision = asdict(open_clip.CLIPVisionCfg(**config["vision_cfg"]))  # with defaults filled in, for the digest
        architecture = _architecture("", config, content.get("preprocess_cfg", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{path} is not a configuration of open_clip: {type(error).__name__} {error}") from error
    told = {"embed_dim": architecture.embed_dim, "quick_gelu": architecture.quick_gelu, "vision": vision}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    kind = vision["timm_model_name"] or f"ViT-{vision['patch_size']}-{vision['image_size']}px"
    name = f"{kind}-{digest[:12]}"
    return Architecture(**{**vars(architecture), "name": name})


def _file_in_folder(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(path.name for path in found)
        raise RandomWeightsRefused(
            f"{LOCAL_DIR}{folder} holds several weight files ({listed}): name the one to use {WEIGHT_FILES[0]}."
        )
    raise RandomWeightsRefused(
        f"{LOCAL_DIR}{folder} holds no weight file, so its model would be random: add {WEIGHT_FILES[0]}."
    )


def _download(name: str, tag: str, config: dict[str, Any]) -> Path:
    try:
        return Path(open_clip.download_pretrained(config))
    except (OSError, RuntimeError, ValueError) as error:
        raise RandomWeightsRefused(
            f"the {tag!r} weights of {name} could not be downloaded: pass a copy of them with --pretrained FILE "
            f"({first_line(error)})."
        ) from error


def _usable_tags(architecture: Architecture) -> list[str]:
    """The model's tags, those of the other GELU only if it has no others."""
    tags = open_clip.list_pretrained_tags_by_model(architecture.name)
    return [tag for tag in tags if not _other_gelu(architecture, tag)] or tags


def _other_gelu(architecture: Architecture, tag: str) -> bool:
    # One direction only: a tag of a model that is QuickGELU by configuration (roberta-ViT-B-32) does not repeat the flag.
    trained = open_clip.get_pretrained_cfg(architecture.name, tag).get("quick_gelu", False)
    return trained and not architecture.quick_gelu


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _listed(tags: list[str]) -> str:
    if not tags:
        return "open_clip lists none"
    return ", ".join(tags[:6]) + (f" and {len(tags) - 6} more" if len(tags) > 6 else "")


def first_line(error: Exception) -> str:
    """What of a message fits into a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
