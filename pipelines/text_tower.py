"""The text tower that goes with a store's features, loaded and checked: for its texts, and for heads that learn prompts."""

import shlex
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from vcache.extract.text import FrozenTextTower, load_text_tower, text_width
from vcache.extract.tower_weights import read_checkpoint
from vcache.extract.weights import LOCAL_DIR, BackboneError, NoTextTower, find_architecture, find_checkpoint
from vcache.heads.prompt_learning import ClassPrompts
from vcache.pipelines.class_text import clip_sets, text_facts
from vcache.pipelines.device import select_device
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.settings import SettingError
from vcache.pipelines.templates import class_words
from vcache.pipelines.text_sets import TextMismatch
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

_IN_USE: WeakValueDictionary[tuple[Any, ...], FrozenTextTower] = WeakValueDictionary()
"""By checkpoint and device. Heads that are trained side by side share a tower, which goes with the last of them."""


def tower_of_store(
    store: FeatureStore, again: Sequence[str], model: str | None, pretrained: str | None, device: str
) -> FrozenTextTower:
    """From the checkpoint that the store was made with; `again` is the command that asks for it.

    Args:
        model, pretrained: where that checkpoint lies, if not where it was.

    Raises:
        TextMismatch: the checkpoint is another than the store's.
        BackboneError: it has no text tower, or is not there.
    """
    tower = _load(store.manifest, select_device(device), model, pretrained)
    if difference := _difference(tower, store.manifest):
        was, now = difference
        name = model or store.manifest.facts["request"]["model"]
        option = ["--model", "local-dir:FOLDER"] if name.startswith(LOCAL_DIR) else ["--pretrained", "FILE"]
        raise TextMismatch(
            f"{store.path} was made with {was}, and {_source(store.manifest, model, pretrained)} has {now}: text and features "
            f"must be of one checkpoint. Name the store's with:  {shlex.join(['vcache', *again, *option])}"
        )
    return tower


def _load(
    manifest: Manifest, device: torch.device, model: str | None = None, pretrained: str | None = None
) -> FrozenTextTower:
    named = _checkpoint(manifest, model, pretrained)
    return load_text_tower(named[0], named[1], random_weights=named[2], device=device)


def _difference(tower: FrozenTextTower, manifest: Manifest) -> tuple[str, str] | None:
    """What the store was made with and what this is, where it is not the store's tower.

    Texts of the store are known by the digest of the tower that made them. Without any there is the image tower, which has to be
    read for that; where its checkpoint has no text tower, that of another checkpoint of its model is taken.
    """
    spec, told = manifest.spec, text_facts(manifest).get("weights_sha256") if clip_sets(manifest) else None
    if told is not None:
        ours = f"a text tower of weights {told[:16]}"
        return (ours, f"one of {tower.weights_sha256[:16]}") if tower.weights_sha256 != told else None
    if tower.model == spec["model"] and (
        tower.visual_sha256 == spec["weights_sha256"] or _saved_without_text(manifest.facts["request"])
    ):
        return None
    was, now = ((spec["model"], spec["weights_sha256"]), (tower.model, tower.visual_sha256))
    ours, theirs = (f"the image tower {name} of weights {sha256[:16]}" for name, sha256 in (was, now))
    return ours, theirs


def _saved_without_text(request: dict[str, Any]) -> bool:
    """Whether the store's own checkpoint holds no text tower, as where the image tower alone was tuned."""
    if request["random_weights"]:
        return False
    try:
        architecture = find_architecture(request["model"], request["pretrained"])
        file = find_checkpoint(request["model"], request["pretrained"], architecture)
        return not any(name.startswith("transformer.") for name in read_checkpoint(file, "text").weights)
    except NoTextTower:
        return True
    except (BackboneError, OSError):  # it is not there any more
        return False


def context_width(manifest: Manifest) -> int:
    """Channels of the tokens that the text tower reads, without reading weights.

    Raises:
        HeadStoreMismatch: there is none that vcache can run.
    """
    model, pretrained, random_weights = _checkpoint(manifest)
    try:
        return text_width(model, None if random_weights else pretrained)
    except BackboneError as error:
        raise _not_there(manifest, manifest.dataset, error) from error


def class_prompts(
    store: FeatureStore, num_places: int, device: torch.device, classes: Sequence[int] | None = None
) -> ClassPrompts:
    """Prompts of these of the store's classes in this order, or of all, and the tower that reads them, on the device.

    Raises:
        HeadStoreMismatch: the tower cannot be loaded, or is another one now.
        SettingError: it has no room for so many places.
    """
    tower = _shared_tower(store, device)
    told = text_facts(store.manifest)
    words = told.get("class_words") or [class_words(name) for name in store.manifest.class_names]
    try:
        prompts = tower.embed_prompts(words if classes is None else [words[k] for k in classes], num_places)
    except ValueError as error:
        raise SettingError(f"--set context_length={num_places}: {error}.") from error
    return ClassPrompts(prompts.tokens, prompts.ends, tower.encode_embedded, tower.logit_scale)


def _shared_tower(store: FeatureStore, device: torch.device) -> FrozenTextTower:
    key = (*_checkpoint(store.manifest), str(device))
    tower = _IN_USE.get(key)
    if tower is None:
        try:
            tower = _load(store.manifest, device)
        except (BackboneError, OSError) as error:
            raise _not_there(store.manifest, str(store.path), error) from error
    if difference := _difference(tower, store.manifest):
        was, now = difference
        raise HeadStoreMismatch(
            f"{store.path} was made with {was}, and {_source(store.manifest)} has {now}: learnt prompts are read by the store's "
            "own checkpoint. Put that back."
        )
    _IN_USE[key] = tower
    return tower


def _checkpoint(
    manifest: Manifest, model: str | None = None, pretrained: str | None = None
) -> tuple[str, str | None, bool]:
    """(model, pretrained, whether its weights are random) as `load_text_tower` takes them."""
    request = manifest.facts["request"]
    name = model or request["model"]
    if pretrained is None and not name.startswith(LOCAL_DIR):  # a folder has its weights
        pretrained = request["pretrained"]
    return name, pretrained, request["random_weights"] and pretrained == request["pretrained"] and model is None


def _source(manifest: Manifest, model: str | None = None, pretrained: str | None = None) -> str:
    name, weights, _ = _checkpoint(manifest, model, pretrained)
    return f"{name} ({weights})" if weights else name


def _not_there(manifest: Manifest, store: str, error: Exception) -> HeadStoreMismatch:
    return HeadStoreMismatch(
        f"a head that learns prompts runs the text tower beside the image tower of {store}, {_source(manifest)}, and there is "
        f"none: {error}"
    )
