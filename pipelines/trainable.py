"""What a training needs of a store beside the features that the head reads."""

from collections.abc import Mapping
from typing import Any

from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.class_text import how_to_add, set_encoders, text_constant
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.targets import is_multi_label
from vcache.store.reader import FeatureStore


def check_trainable(head: str, requirements: HeadRequirements, store: FeatureStore) -> None:
    """
    Raises:
        HeadStoreMismatch: videos may have several classes and the head takes one each, or there is no text of the templates that
            training draws from, or it is of another encoder than what classifies; names the heads that can be trained, or the
            command that adds the text, or both encoders.
    """
    if is_multi_label(store.manifest) and _takes_one_class(get_head(head)):
        others = ", ".join(name for name, other in list_heads().items() if not _takes_one_class(other))
        raise HeadStoreMismatch(
            f"head {head!r} is trained on videos of one class each; those of {store.path.name} may have several. Heads that can "
            f"be trained on it: {others}."
        )
    templates = requirements.training_text
    if templates is not None and text_constant(templates) not in store.manifest.constants:
        raise HeadStoreMismatch(
            f"head {head!r} draws from text embeddings of the class names in training, and {store.path.name} holds none of the "
            f"templates {templates!r}.\n{how_to_add(store, templates)}"
        )
    if templates is not None and requirements.text is not None:
        _check_same_encoder(head, requirements.text, templates, store)


def _check_same_encoder(head: str, text: str, training_text: str, store: FeatureStore) -> None:
    """Embeddings of two encoders may be of one width, as those of DistilBERT and ViT-L/14, and have nothing else in common."""
    encoders = set_encoders(store.manifest)
    of_text, of_training = (_encoder(encoders.get(name)) for name in (text, training_text))
    if of_text != of_training:
        raise HeadStoreMismatch(
            f"head {head!r} would be trained on text {training_text!r} of {of_training} and classify by {text!r} of {of_text}: "
            "they are in different spaces. Name sets of one encoder with --set templates=NAME and --set training_templates=NAME."
        )


def _encoder(told: Mapping[str, Any] | None) -> str:
    return "CLIP's text tower" if told is None else f"{told['encoder']} (pooling {told['pooling']})"


def _takes_one_class(head: type) -> bool:
    return getattr(head, "one_class", False)
