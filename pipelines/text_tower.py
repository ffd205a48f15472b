"""The text tower beside the image tower that a store's features are of: for its texts, and for heads that learn prompts."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from vcache.extract.text import FrozenTextTower, load_text_tower, text_width
from vcache.extract.weights import LOCAL_DIR, BackboneError
from vcache.heads.prompt_learning import ClassPrompts
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.settings import SettingError
from vcache.pipelines.templates import class_words
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

_IN_USE: WeakValueDictionary[tuple[Any, ...], FrozenTextTower] = WeakValueDictionary()
"""By checkpoint and device. Heads that are trained side by side share a tower, which goes with the last of them."""


def load_tower_of(
    store: FeatureStore, device: torch.device, *, model: str | None = None, pretrained: str | None = None
) -> FrozenTextTower:
    """From the checkpoint that the store was made with; `model`, `pretrained`: where it lies, if not where it was.

    Raises:
        BackboneError: it has no text tower, or is not there.
    """
    named = _checkpoint(store.manifest, model, pretrained)
    return load_text_tower(named[0], named[1], random_weights=named[2], device=device)


def is_beside(tower: FrozenTextTower, manifest: Manifest) -> bool:
    """Whether its checkpoint has the image tower that the features are of, which is read for that."""
    return (tower.model, tower.visual_sha256) == (manifest.spec["model"], manifest.spec["weights_sha256"])


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
    told = store.manifest.facts.get("text", {})
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
            tower = load_tower_of(store, device)
        except (BackboneError, OSError) as error:
            raise _not_there(store.manifest, str(store.path), error) from error
    _check_same(tower, store)
    _IN_USE[key] = tower
    return tower


def _check_same(tower: FrozenTextTower, store: FeatureStore) -> None:
    """By the text tower that made the store's texts, or without texts by the image tower, which has to be read for that."""
    told = store.manifest.facts.get("text", {}).get("weights_sha256")
    if tower.weights_sha256 == told if told else is_beside(tower, store.manifest):
        return
    was, now = (
        (f"the text tower {told[:16]}", tower.weights_sha256[:16])
        if told
        else (f"the image tower {store.manifest.spec['weights_sha256'][:16]}", tower.visual_sha256[:16])
    )
    raise HeadStoreMismatch(
        f"{store.path} was made with {was}, and {_source(store.manifest)} has {now} now: learnt prompts are read by the store's "
        "own checkpoint. Put that back."
    )


def _checkpoint(
    manifest: Manifest, model: str | None = None, pretrained: str | None = None
) -> tuple[str, str | None, bool]:
    """(model, pretrained, whether its weights are random) as `load_text_tower` takes them."""
    request = manifest.facts["request"]
    name = model or request["model"]
    if pretrained is None and not name.startswith(LOCAL_DIR):  # a folder has its weights
        pretrained = request["pretrained"]
    return name, pretrained, request["random_weights"] and pretrained == request["pretrained"] and model is None


def _source(manifest: Manifest) -> str:
    model, pretrained, _ = _checkpoint(manifest)
    return f"{model} ({pretrained})" if pretrained else model


def _not_there(manifest: Manifest, store: str, error: Exception) -> HeadStoreMismatch:
    return HeadStoreMismatch(
        f"a head that learns prompts runs the text tower beside the image tower of {store}, {_source(manifest)}, and there is "
        f"none: {error}"
    )
