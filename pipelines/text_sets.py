"""Text embeddings written to a store: for each set of templates one constant, made once and never changed.

What they were made of is a fact of the store's manifest, `facts["text"]`:

    weights_sha256    of the text tower: every set of a store comes from the same one
    class_words       what stands for the name of each class
    templates         {"label": ["{}"]}: the templates of each set, in the order of the axis
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vcache.extract.backbone import BackboneError
from vcache.extract.text import FrozenTextTower, NoTextTower, check_text_tower, load_text_tower
from vcache.pipelines.class_text import LOGIT_SCALE, stored_sets, text_constant
from vcache.pipelines.console import count
from vcache.pipelines.device import select_device
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.templates import TEMPLATE_SETS, TemplateSet, class_words
from vcache.store.constants import Constant, write_constants
from vcache.store.errors import CannotRecompute
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore
from vcache.store.writer import record_facts

EVERY_STORE = "label"
"""The set that `vcache extract` adds."""


class TextMismatch(ValueError):
    """What is asked for does not go with the text embeddings, or the features, that the store has."""


def missing_sets(store: FeatureStore, sets: Iterable[TemplateSet]) -> list[TemplateSet]:
    """Those of the sets that the store does not hold.

    Raises:
        TextMismatch: it holds one of the name with other templates.
    """
    stored = stored_sets(store.manifest)
    missing = [one for one in dict.fromkeys(sets) if one.name not in stored]
    if twice := [one.name for one in missing if [other.name for other in missing].count(one.name) > 1]:
        raise TextMismatch(f"two sets of templates are called {twice[0]!r}. Give one of the files another name.")
    for one in sets:
        there = stored.get(one.name)
        if there is not None and there != one.templates:
            raise TextMismatch(
                f"{store.path} has other templates under the name {one.name!r} ({count(len(there), 'template')}, the first is "
                f"{there[0]!r}), and what is stored is never changed. Give the file another name."
            )
    return missing


def write_sets(store: FeatureStore, tower: FrozenTextTower, sets: Sequence[TemplateSet]) -> int:
    """Add sets that the store does not hold; returns how many of their texts were cut to the context of the tower.

    Raises:
        TextMismatch: the store's other sets are of another text tower.
    """
    # What a killed command left says nothing of embeddings that are there.
    told = store.manifest.facts.get("text", {}) if stored_sets(store.manifest) else {}
    if told and told["weights_sha256"] != tower.weights_sha256:
        raise TextMismatch(
            f"the text tower of {tower.model} has weights {tower.weights_sha256[:16]}, and that of the text embeddings in "
            f"{store.path} had {told['weights_sha256'][:16]}. Name the checkpoint that made them with --pretrained FILE."
        )
    words = told.get("class_words") or [class_words(name) for name in store.manifest.class_names]
    embeddings = {text_constant(one.name): _embed(tower, one, words) for one in sets}
    templates = {**told.get("templates", {}), **{one.name: list(one.templates) for one in sets}}
    # First: embeddings of which nobody knows the templates could not be made again.
    facts = {"weights_sha256": tower.weights_sha256, "class_words": words, "templates": dict(sorted(templates.items()))}
    record_facts(store, {"text": facts})
    write_constants(store, {LOGIT_SCALE: _logit_scale(tower), **embeddings})
    return sum(tower.count_cut(_texts(one, words)) for one in sets)


def add_label_text(store: FeatureStore, config: ExtractionConfig, on_stage: Callable[[str], None]) -> str | None:
    """Add the set that every store has, if this one has none; returns what there is to say of it."""
    label = TEMPLATE_SETS[EVERY_STORE]
    if label.name in stored_sets(store.manifest):
        return None
    try:
        _check_tower_of(config)
        on_stage("encoding the class names")
        tower = _tower_of(config, config.device)
        return describe_cut(write_sets(store, tower, [label]), tower)
    except (NoTextTower, TextMismatch) as error:  # neither touches the features that were asked for
        return f"no text embeddings of the class names: {error}"


def describe_cut(num_cut: int, tower: FrozenTextTower) -> str | None:
    """A note of the texts that are longer than the context; None where there are none."""
    if not num_cut:
        return None
    context = tower.clip.context_length
    return f"{count(num_cut, 'text')} of the class names cut to the {context} tokens that the text tower reads"


def text_bytes(config: ExtractionConfig, manifest: Manifest | None, num_classes: int, embed_dim: int) -> int:
    """What `add_label_text` is going to write."""
    if manifest is not None and EVERY_STORE in stored_sets(manifest):
        return 0
    try:
        _check_tower_of(config)
    except NoTextTower:
        return 0
    return np.dtype(np.float32).itemsize * (num_classes * embed_dim + 1)


def text_constant_again(manifest: Manifest, name: str, config: ExtractionConfig, device: str) -> dict[str, Constant]:
    """A constant of a store's text, made again of what the manifest says; none if it does not say it.

    Raises:
        CannotRecompute: the text tower cannot be loaded, or is another one now.
    """
    told = manifest.facts.get("text", {})
    sets = [TemplateSet(one, tuple(templates)) for one, templates in told.get("templates", {}).items()]
    if name not in {LOGIT_SCALE, *(text_constant(one.name) for one in sets)}:
        return {}
    try:
        tower = _tower_of(config, device)
    except (BackboneError, OSError) as error:
        raise CannotRecompute(f"the text tower that {name} was made with cannot be loaded: {error}") from error
    if tower.weights_sha256 != told["weights_sha256"]:
        raise CannotRecompute(
            f"the text tower of {tower.model} has weights {tower.weights_sha256[:16]} now, and {name} was made with "
            f"{told['weights_sha256'][:16]}. Restore its folder from a copy"
        )
    if name == LOGIT_SCALE:
        return {name: _logit_scale(tower)}
    one = next(one for one in sets if text_constant(one.name) == name)
    return {name: _embed(tower, one, told["class_words"])}


def _check_tower_of(config: ExtractionConfig) -> None:
    check_text_tower(config.model, None if config.random_weights else config.pretrained)


def _tower_of(config: ExtractionConfig, device: str) -> FrozenTextTower:
    return load_text_tower(
        config.model, config.pretrained, random_weights=config.random_weights, device=select_device(device)
    )


def _embed(tower: FrozenTextTower, one: TemplateSet, words: Sequence[str]) -> Constant:
    embedded = tower.encode(_texts(one, words)).numpy().reshape(len(words), len(one.templates), tower.embed_dim)
    return Constant(("class", "template", "channel"), embedded, exact=False)


def _texts(one: TemplateSet, words: Sequence[str]) -> list[str]:
    """Class by class."""
    return [text for name in words for text in one.fill(name)]


def _logit_scale(tower: FrozenTextTower) -> Constant:
    return Constant(("scale",), np.array([tower.logit_scale], dtype=np.float32))
