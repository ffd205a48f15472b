"""Text of names that are no classes of a store, by the store's own text tower. Importing this loads open_clip."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vcache.extract.text import FrozenTextTower
from vcache.pipelines.class_text import stored_sets
from vcache.pipelines.templates import TemplateSet, class_words
from vcache.pipelines.text_sets import TextMismatch
from vcache.store.reader import FeatureStore


def encode_others(
    store: FeatureStore, tower: FrozenTextTower, names: Sequence[str], templates: str
) -> Float[Tensor, "other M E"]:
    """What the text tower of a store (text_tower.tower_of_store) makes of names in the templates of one of its sets.

    Raises:
        TextMismatch: the store does not say its templates.
    """
    known = stored_sets(store.manifest)[templates]
    if known is None:
        raise TextMismatch(
            f"{store.path} does not say what the templates {templates!r} are, so other names than its classes cannot be put into "
            "them. Name classes of the store alone."
        )
    texts = [text for name in names for text in TemplateSet(templates, known).fill(class_words(name))]
    return torch.as_tensor(tower.encode(texts)).reshape(len(names), len(known), -1)
