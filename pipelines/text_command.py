"""`vcache text`: text embeddings of the class names, added to a store that is there."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape

from vcache.extract.text_encoders import FrozenTextEncoder, load_text_encoder
from vcache.pipelines.class_text import described_set, set_encoders, stored_sets
from vcache.pipelines.console import count, out
from vcache.pipelines.device import select_device
from vcache.pipelines.templates import template_sets
from vcache.pipelines.text_sets import (
    TextMismatch,
    check_encoder,
    describe_cut,
    missing_sets,
    of_encoder,
    write_sets,
)
from vcache.pipelines.text_tower import tower_of_store
from vcache.store.locks import sole_writer
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


def add_text(
    path: StorePath,
    words: Sequence[str],
    *,
    model: str | None = None,
    pretrained: str | None = None,
    encoder: str | None = None,
    pooling: str = "mean",
    device: str = "auto",
    on_stage: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Add the sets of templates that `words` name, each a set of vcache's or a file; a dict of what was added and what is there.

    Args:
        model, pretrained: where the store's own checkpoint lies, if not where it was.
        encoder: a text model of Hugging Face in place of CLIP's text tower, a folder or a name: its sets are called SET_ENCODER.
        pooling: "mean" or "cls"; what the embedding of a text is of the hidden states of that encoder.

    Raises:
        TemplateError: a word names no templates.
        TextMismatch: the checkpoint is not the store's, or a set of that name has other templates or another encoder; nothing is
            changed then.
        NoTextTower, RandomWeightsRefused, TextEncoderError: the checkpoint has no text tower, or is not there.
        StoreBusy: an extraction is running.
    """
    sets = template_sets(words)
    if encoder is not None and (model or pretrained):
        raise TextMismatch("--encoder stands in the place of CLIP's text tower: leave --model and --pretrained out.")
    with FeatureStore.open(path) as store:
        # Another encoder is loaded also where nothing seems to be missing: one of the same name may be another.
        other = _encoder_of(store, encoder, pooling, device, on_stage) if encoder is not None else None
        sets = sets if other is None else [of_encoder(one, other) for one in sets]
        missing, note = missing_sets(store, sets, other), None
        if missing:
            on_stage("loading the text tower")
            again = ["text", str(path), *(part for word in words for part in ("--templates", word))]
            tower = other or tower_of_store(store, again, model, pretrained, device)
            with sole_writer(path):
                store.refresh()
                missing = missing_sets(store, sets, other)  # of what is there now that no other process changes it
                note = describe_cut(write_sets(store, tower, missing, on_stage), tower)
        return {
            "store": str(path),
            "num_classes": len(store.manifest.class_names),
            "added": [one.name for one in missing],
            "sets": {name: templates and list(templates) for name, templates in stored_sets(store.manifest).items()},
            "encoders": set_encoders(store.manifest),
            "note": note,
        }


def _encoder_of(
    store: FeatureStore, encoder: str, pooling: str, device: str, on_stage: Callable[[str], None]
) -> FrozenTextEncoder:
    on_stage("loading the text encoder")
    loaded = load_text_encoder(encoder, pooling=pooling, device=select_device(device))
    check_encoder(store, loaded)
    return loaded


def print_text(result: dict[str, Any]) -> None:
    """What was added, and all that the store holds now."""
    added, store = ", ".join(result["added"]), escape(result["store"])
    what = f"text embeddings of {count(result['num_classes'], 'class name')}"
    encoders = {name: told["encoder"] for name, told in result["encoders"].items()}
    held = ", ".join(described_set(name, given, encoders.get(name)) for name, given in result["sets"].items())
    out.print(
        f"[bold]{store}[/bold]  {what}: added {escape(added)}"
        if added
        else f"[bold]{store}[/bold]  {what}: nothing to add",
        soft_wrap=True,
        highlight=False,
    )
    out.print(f"  it holds {escape(held)}", soft_wrap=True, highlight=False)
    if result["note"]:
        out.print(f"  {escape(result['note'])}", soft_wrap=True, highlight=False)
