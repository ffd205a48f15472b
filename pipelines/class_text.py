"""Text embeddings of the class names, as constants of a store: `text/<template set>` and `text/logit_scale`."""

from collections.abc import Sequence
from typing import Any

import torch

from vcache.heads.text import ClassText
from vcache.store.reader import FeatureStore

LOGIT_SCALE = "text/logit_scale"
"""(1,) float32: CLIP's parameter."""


def text_constant(templates: str) -> str:
    """Of a template set, float32 (class, template, E), not normalised."""
    return f"text/{templates}"


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
