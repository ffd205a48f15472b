"""Text embeddings written to a store: for each set of templates one constant, made once and never changed.

What they were made of is a fact of the store's manifest, `facts["text"]`:

    weights_sha256    of CLIP's text tower: every set of a store that `encoders` does not name comes from the same one
    class_words       what stands for the name of each class
    templates         {"label": ["{}"]}: the templates of each set, in the order of the axis
    encoders          {"label_distilbert": {"encoder": ..., "pooling": ...}}: the sets of other text encoders, and what gives
                      them again (class_text.set_encoders); absent where there are none
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vcache.extract.backbone import BackboneError
from vcache.extract.text import FrozenTextTower, NoTextTower, check_text_tower, load_text_tower
from vcache.extract.text_encoders import FrozenTextEncoder, TextEncoderError, encoder_name, load_text_encoder
from vcache.pipelines.class_text import LOGIT_SCALE, set_encoders, stored_sets, text_constant, text_facts
from vcache.pipelines.console import count
from vcache.pipelines.device import select_device
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.templates import EVERY_STORE, TEMPLATE_SETS, TemplateSet, class_words
from vcache.store.constants import Constant, write_constants
from vcache.store.errors import CannotRecompute
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore
from vcache.store.writer import record_facts

TextTower = FrozenTextTower | FrozenTextEncoder

_TEXTS_AT_ONCE = 1280  # between two reports: ten batches of the tower, 7 s of ViT-B/16's on two cores


class TextMismatch(ValueError):
    """What is asked for does not go with the text embeddings, or the features, that the store has."""


def missing_sets(
    store: FeatureStore, sets: Iterable[TemplateSet], encoder: FrozenTextEncoder | None = None
) -> list[TemplateSet]:
    """Those of the sets that the store does not hold; they are of CLIP's text tower, or of the `encoder`.

    Raises:
        TextMismatch: it holds one of the name with other templates, or of another text tower.
    """
    stored, encoders = stored_sets(store.manifest), set_encoders(store.manifest)
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
        if one.name in stored and (one.name in encoders) != (encoder is not None):
            other = encoders.get(one.name, {"encoder": "CLIP's text tower"})["encoder"]
            raise TextMismatch(
                f"{store.path} has the set {one.name!r} of {other}, and what is stored is never changed. Give the file or the "
                "encoder another name."
            )
    return missing


def of_encoder(one: TemplateSet, encoder: FrozenTextEncoder) -> TemplateSet:
    """The set under the name that a store keeps its embeddings by: "label_distilbert", or "label_distilbert_cls"."""
    pooling = "" if encoder.pooling == "mean" else f"_{encoder.pooling}"
    return TemplateSet(f"{one.name}_{encoder.name}{pooling}", one.templates)


def check_encoder(store: FeatureStore, encoder: FrozenTextEncoder) -> None:
    """
    Raises:
        TextMismatch: the store has embeddings of another encoder under the same name.
    """
    for name, told in set_encoders(store.manifest).items():
        if encoder_name(told["encoder"]) == encoder.name and told["weights_sha256"] != encoder.weights_sha256:
            raise TextMismatch(
                f"the text encoder {encoder.source} has weights {encoder.weights_sha256[:16]}, and that of {name!r} in "
                f"{store.path}, {told['encoder']}, had {told['weights_sha256'][:16]}. Give its folder another name."
            )


def write_sets(
    store: FeatureStore,
    tower: TextTower,
    sets: Sequence[TemplateSet],
    on_stage: Callable[[str], None] = lambda name: None,
) -> int:
    """Add sets that the store does not hold; returns how many of their texts were cut to the context of the tower.

    Raises:
        TextMismatch: the store's other sets are of another text tower.
    """
    told = text_facts(store.manifest)
    if isinstance(tower, FrozenTextEncoder):
        check_encoder(store, tower)
    elif told.get("weights_sha256", tower.weights_sha256) != tower.weights_sha256:
        raise TextMismatch(
            f"the text tower of {tower.model} has weights {tower.weights_sha256[:16]}, and that of the text embeddings in "
            f"{store.path} had {told['weights_sha256'][:16]}. Name the checkpoint that made them with --pretrained FILE."
        )
    words = told.get("class_words") or [class_words(name) for name in store.manifest.class_names]
    report = _Report(on_stage, sum(len(words) * len(one.templates) for one in sets))
    embeddings = {text_constant(one.name): _embed(tower, one, words, report) for one in sets}
    # First: embeddings of which nobody knows the templates could not be made again.
    record_facts(store, {"text": _facts(told, tower, sets, words)})
    scale = {LOGIT_SCALE: _logit_scale(tower)} if isinstance(tower, FrozenTextTower) else {}
    write_constants(store, {**scale, **embeddings})
    return sum(tower.count_cut(_texts(one, words)) for one in sets)


def _facts(told: dict[str, Any], tower: TextTower, sets: Sequence[TemplateSet], words: Sequence[str]) -> dict[str, Any]:
    templates = {**told.get("templates", {}), **{one.name: list(one.templates) for one in sets}}
    names = {one.name for one in sets}
    encoders = {name: of for name, of in told.get("encoders", {}).items() if name not in names}
    if isinstance(tower, FrozenTextEncoder):
        facts = {"weights_sha256": told["weights_sha256"]} if "weights_sha256" in told else {}
        encoders |= {one.name: _encoder_facts(tower, _texts(one, words)) for one in sets}
    else:
        facts = {"weights_sha256": tower.weights_sha256}
    facts |= {"class_words": list(words), "templates": dict(sorted(templates.items()))}
    return facts | ({"encoders": dict(sorted(encoders.items()))} if encoders else {})


def _encoder_facts(encoder: FrozenTextEncoder, texts: Sequence[str]) -> dict[str, Any]:
    return {
        "encoder": encoder.source,
        "pooling": encoder.pooling,
        "width": encoder.embed_dim,
        "weights_sha256": encoder.weights_sha256,
        "tokens_sha256": encoder.tokens_sha256(texts),
    }


def add_every_set(store: FeatureStore, config: ExtractionConfig, on_stage: Callable[[str], None]) -> str | None:
    """Add those of the sets that every store has which this one lacks; returns what there is to say of them."""
    stored = stored_sets(store.manifest)
    missing = [TEMPLATE_SETS[name] for name in EVERY_STORE if name not in stored]
    if not missing:
        return None
    try:
        _check_tower_of(config)
        on_stage("loading the text tower")
        tower = _tower_of(config, config.device)
        return describe_cut(write_sets(store, tower, missing, on_stage), tower)
    except (NoTextTower, TextMismatch) as error:  # neither touches the features that were asked for
        return f"no text embeddings of the class names: {error}"


def describe_cut(num_cut: int, tower: TextTower) -> str | None:
    """A note of the texts that are longer than the context; None where there are none."""
    if not num_cut:
        return None
    context = tower.context_length if isinstance(tower, FrozenTextEncoder) else tower.clip.context_length
    return f"{count(num_cut, 'text')} of the class names cut to the {context} tokens that the text tower reads"


def text_bytes(config: ExtractionConfig, manifest: Manifest | None, num_classes: int, embed_dim: int) -> int:
    """What `add_every_set` is going to write."""
    stored = stored_sets(manifest) if manifest is not None else {}
    if not (missing := [TEMPLATE_SETS[name] for name in EVERY_STORE if name not in stored]):
        return 0
    try:
        _check_tower_of(config)
    except NoTextTower:
        return 0
    num_scales = 0 if manifest is not None and LOGIT_SCALE in manifest.constants else 1
    num_texts = num_classes * sum(len(one.templates) for one in missing)
    return np.dtype(np.float32).itemsize * (num_texts * embed_dim + num_scales)


def text_constant_again(manifest: Manifest, name: str, config: ExtractionConfig, device: str) -> dict[str, Constant]:
    """A constant of a store's text, made again of what the manifest says; none if it does not say it.

    Raises:
        CannotRecompute: the text tower cannot be loaded, or is another one now.
    """
    told = manifest.facts.get("text", {})
    sets = [TemplateSet(one, tuple(templates)) for one, templates in told.get("templates", {}).items()]
    if name not in {LOGIT_SCALE, *(text_constant(one.name) for one in sets)}:
        return {}
    one = next((one for one in sets if text_constant(one.name) == name), None)
    if one is not None and one.name in told.get("encoders", {}):
        return {name: _encoded_again(told["encoders"][one.name], one, told["class_words"], device)}
    try:
        tower = _tower_of(config, device)
    except (BackboneError, OSError) as error:
        raise CannotRecompute(f"the text tower that {name} was made with cannot be loaded: {error}") from error
    if tower.weights_sha256 != told["weights_sha256"]:
        raise CannotRecompute(
            f"the text tower of {tower.model} has weights {tower.weights_sha256[:16]} now, and {name} was made with "
            f"{told['weights_sha256'][:16]}. Restore its folder from a copy"
        )
    return {name: _logit_scale(tower) if one is None else _embed(tower, one, told["class_words"])}


def _encoded_again(told: dict[str, Any], one: TemplateSet, words: Sequence[str], device: str) -> Constant:
    try:
        encoder = load_text_encoder(told["encoder"], pooling=told["pooling"], device=select_device(device))
    except (TextEncoderError, OSError) as error:
        raise CannotRecompute(f"the text encoder that {one.name!r} was made with cannot be loaded: {error}") from error
    now = _encoder_facts(encoder, _texts(one, words))
    if other := [what for what in ("weights", "tokens") if now[f"{what}_sha256"] != told[f"{what}_sha256"]]:
        raise CannotRecompute(
            f"the text encoder {told['encoder']} has other {' and '.join(other)} now than {one.name!r} was made with. Restore "
            "the folder of one of them from a copy"
        )
    return _embed(encoder, one, words)


def _check_tower_of(config: ExtractionConfig) -> None:
    check_text_tower(config.model, None if config.random_weights else config.pretrained)


def _tower_of(config: ExtractionConfig, device: str) -> FrozenTextTower:
    return load_text_tower(
        config.model, config.pretrained, random_weights=config.random_weights, device=select_device(device)
    )


class _Report:
    """Says how many of all the texts are encoded."""

    def __init__(self, on_stage: Callable[[str], None], total: int) -> None:
        self.on_stage, self.done, self.total = on_stage, 0, total
        self.add(0)

    def add(self, num_texts: int) -> None:
        self.done += num_texts
        self.on_stage(f"encoding the class names: {self.done} of {self.total} texts")


def _embed(tower: TextTower, one: TemplateSet, words: Sequence[str], report: _Report | None = None) -> Constant:
    texts = _texts(one, words)
    embedded = np.empty((len(texts), tower.embed_dim), dtype=np.float32)
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[first : first + _TEXTS_AT_ONCE]
        embedded[first : first + len(some)] = tower.encode(some).numpy()
        if report is not None:
            report.add(len(some))
    shaped = embedded.reshape(len(words), len(one.templates), tower.embed_dim)
    return Constant(("class", "template", "channel"), shaped, exact=False)


def _texts(one: TemplateSet, words: Sequence[str]) -> list[str]:
    """Class by class."""
    return [text for name in words for text in one.fill(name)]


def _logit_scale(tower: FrozenTextTower) -> Constant:
    return Constant(("scale",), np.array([tower.logit_scale], dtype=np.float32))
