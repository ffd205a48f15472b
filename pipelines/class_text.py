"""Text embeddings of the class names, as constants of a store: `text/<template set>` and `text/logit_scale`."""

from collections.abc import Sequence
from typing import Any

import torch

from vcache.heads.text import ClassText
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

LOGIT_SCALE = "text/logit_scale"
"""(1,) float32: CLIP's parameter."""


def text_constant(templates: str) -> str:
    """Of a template set, float32 (class, template, E), not normalised."""
    return f"text/{templates}"


def stored_sets(manifest: Manifest) -> dict[str, tuple[str, ...] | None]:
    """The templates of each set that a store holds, by name; None of one that does not say them."""
    told = manifest.facts.get("text", {}).get("templates", {})
    prefix = text_constant("")
    names = [
        name.removeprefix(prefix) for name in manifest.constants if name.startswith(prefix) and name != LOGIT_SCALE
    ]
    return {name: tuple(told[name]) if name in told else None for name in names}


def class_text(store: FeatureStore, templates: str, classes: Sequence[int] | None = None) -> ClassText:
    """What a store holds of a template set, of these of its classes in this order, or of all.

    Raises:
        ArrayNotFound, CorruptStore: it holds none, or they are damaged.
    """
    embeddings = torch.tensor(store.constant(text_constant(templates)))
    return ClassText(
        embeddings=embeddings if classes is None else embeddings[list(classes)],
        logit_scale=float(store.constant(LOGIT_SCALE)[0]),
    )


def give_text(head: Any, templates: str | None, store: FeatureStore) -> None:
    """Give a head that classifies by text of these templates the embeddings of all classes of the store."""
    if templates is not None:
        head.set_text(class_text(store, templates))
