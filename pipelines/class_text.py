"""Text embeddings of the class names, as constants of a store: `text/<template set>` and `text/logit_scale`."""

import shlex
from collections.abc import Sequence
from typing import Any

import torch

from vcache.heads.text import OPENAI_LOGIT_SCALE, ClassText
from vcache.pipelines.console import count
from vcache.pipelines.templates import SLOT, TEMPLATE_SETS
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

LOGIT_SCALE = "text/logit_scale"
"""(1,) float32: CLIP's parameter."""


def text_constant(templates: str) -> str:
    """Of a template set, float32 (class, template, E), not normalised."""
    return f"text/{templates}"


def stored_sets(manifest: Manifest) -> dict[str, tuple[str, ...] | None]:
    """The templates of each set that a store holds, by name; None of one that does not say them."""
    told = text_facts(manifest).get("templates", {})
    return {name: tuple(told[name]) if name in told else None for name in _set_names(manifest)}


def text_facts(manifest: Manifest) -> dict[str, Any]:
    """What a store tells of its text embeddings (text_sets.py); nothing where it holds none, as after a killed command."""
    return dict(manifest.facts.get("text", {})) if _set_names(manifest) else {}


def _set_names(manifest: Manifest) -> list[str]:
    prefix = text_constant("")
    return [name.removeprefix(prefix) for name in manifest.constants if name.startswith(prefix) and name != LOGIT_SCALE]


def set_encoders(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What is told of the encoder of each stored set that is of another than CLIP's own text tower, by the set's name.

    Keys: encoder (an absolute path, or a name on the Hugging Face hub), pooling, width, weights_sha256, tokens_sha256.
    """
    told = text_facts(manifest).get("encoders", {})
    return {name: told[name] for name in stored_sets(manifest) if name in told}


def clip_sets(manifest: Manifest) -> tuple[str, ...]:
    """The stored sets that are of CLIP's own text tower, in the space of the videos."""
    return tuple(name for name in _set_names(manifest) if name not in set_encoders(manifest))


def described_set(name: str, templates: Sequence[str] | None, encoder: str | None) -> str:
    """ "text4vis_distilbert (1 template, of distilbert)"; `encoder` is None of CLIP's own text tower."""
    facts = [count(len(templates), "template")] if templates is not None else []
    facts += [f"of {encoder}"] if encoder is not None else []
    return f"{name} ({', '.join(facts)})" if facts else name


def how_to_add(store: FeatureStore, templates: str) -> str:
    """What to do where a store lacks a set. Only vcache's own are known by their names; of another there has to be a file."""
    if templates in TEMPLATE_SETS:
        return f"Add them with:  {_command(store, templates)}"
    of_encoder = [one for one in TEMPLATE_SETS if templates.startswith(f"{one}_")]
    if of_encoder:
        name = templates.removeprefix(f"{max(of_encoder, key=len)}_")
        line = f"{_command(store, max(of_encoder, key=len))} --encoder FOLDER"
        return f"If it is of a text encoder {name!r}, add it with:  {line}"
    held = ", ".join(stored_sets(store.manifest))
    choose = f"It holds {held}: choose with --set templates=NAME. Or write" if held else "Write"
    return (
        f"{choose} templates of your own into a file {templates}.txt, one a line with {SLOT} for the name of the class, and add "
        f"them with:  {_command(store, f'{templates}.txt')}"
    )


def _command(store: FeatureStore, word: str) -> str:
    return shlex.join(["vcache", "text", str(store.path), "--templates", word])


def class_text(store: FeatureStore, templates: str, classes: Sequence[int] | None = None) -> ClassText:
    """What a store holds of a template set, of these of its classes in this order, or of all.

    Where there is no logit scale, as all its text is of other encoders, that of OpenAI's CLIP takes its place.

    Raises:
        ArrayNotFound, CorruptStore: it holds none, or they are damaged.
    """
    embeddings = torch.tensor(store.constant(text_constant(templates)))
    has_scale = LOGIT_SCALE in store.manifest.constants
    return ClassText(
        embeddings=embeddings if classes is None else embeddings[list(classes)],
        logit_scale=float(store.constant(LOGIT_SCALE)[0]) if has_scale else OPENAI_LOGIT_SCALE,
    )


def give_text(head: Any, templates: str | None, store: FeatureStore, classes: Sequence[int] | None = None) -> None:
    """Give a head that classifies by text of these templates the embeddings of these classes of the store, or of all.

    A head that learns prompts, and is on its device, gets those of the classes with the text tower of the store's checkpoint.

    Raises:
        HeadStoreMismatch: that tower is not there, or is another one now.
    """
    if templates is not None:
        head.set_text(class_text(store, templates, classes))
    if num_prompts := head.requires(head.config).prompts:
        from vcache.pipelines.text_tower import class_prompts  # open_clip takes seconds

        device = next(head.parameters()).device
        head.set_prompts(class_prompts(store, num_prompts, device, classes))
