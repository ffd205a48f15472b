"""`vcache info`: a description is a plain dict, printed as a table or as JSON."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from vcache.pipelines.class_text import described_set, set_encoders, stored_sets
from vcache.pipelines.console import out, size
from vcache.pipelines.stored_views import describe_view, failed_in_any, partial_in_any, view_definitions
from vcache.store.layout import ArraySpec
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


def describe_store(path: StorePath) -> dict[str, Any]:
    """Everything `vcache info` says about one store."""
    with FeatureStore.open(path) as store:
        manifest = store.manifest
        return {
            "path": str(path),
            "key": manifest.key,
            "dataset": manifest.dataset,
            "num_classes": len(manifest.class_names),
            "class_names": list(manifest.class_names),
            "size_bytes": store.size_bytes(),
            "format_version": manifest.format_version,
            "created": manifest.created,
            "splits": {split: _describe_split(store, split) for split in store.splits},
            "backbone": manifest.facts["backbone"],
            "spec": manifest.spec,
            "errors": manifest.facts.get("errors", {}),
            "views": list(view_definitions(manifest)),
            "text": {name: None if one is None else list(one) for name, one in stored_sets(manifest).items()},
            "text_encoders": set_encoders(manifest),
        }


def _describe_split(store: FeatureStore, split: str) -> dict[str, Any]:
    parts, failures = store.parts(split), failed_in_any(store, split)
    return {
        "videos": store.splits[split],
        "parts": {part: store.manifest.splits[part] for part in parts},
        "views": {view: _complete_rows(store, split, view) for view in store.views(split)},
        "failed": len(failures),
        "failures": [dataclasses.asdict(failure) for failure in failures],
        "partial": [dataclasses.asdict(row) for row in partial_in_any(store, split)],
        "arrays": {
            name: {
                "shape": list(spec.shape),
                "dims": list(spec.dims),
                "dtype": spec.dtype,
                "stored": int(store.committed_rows(split, [name]).sum()),
                "failed": sum(len(store.view(part).failures(name)) for part in parts),
            }
            for name, spec in sorted(declared_arrays(store, split).items(), key=_in_layer_order)
        },
    }


def _complete_rows(store: FeatureStore, split: str, view: int) -> int:
    """Rows of which the view has every array that it declares."""
    names = {name for part in store.parts(split) for name in store.view(part, view).specs}
    return int(store.committed_rows(split, names, view).sum())


def declared_arrays(store: FeatureStore, split: str) -> dict[str, ArraySpec]:
    """The arrays that any part of the split declares: one that is on its way into a new part is not gone from the others."""
    return {name: spec for part in store.parts(split) for name, spec in store.view(part).specs.items()}


def _in_layer_order(item: tuple[str, Any]) -> tuple[str, int]:
    kind, _, layer = item[0].partition("/")
    return kind, int(layer or -1)


def _first_token(backbone: dict[str, Any]) -> str:
    """What is first where it is no class token; stores that do not say have one."""
    first = backbone.get("class_token", "own")
    return "" if first == "own" else f", the {first} first"


def print_store(store: dict[str, Any]) -> None:
    out.print(f"[bold]{escape(store['path'])}[/bold]  {size(store['size_bytes'])}, key {store['key']}", soft_wrap=True)
    spec, backbone = store["spec"], store["backbone"]
    out.print(
        f"  {escape(store['dataset'])}: {store['num_classes']} classes; {backbone['model']}, {backbone['num_layers']} blocks "
        f"of width {backbone['width']}, {backbone['num_tokens']} tokens a frame{_first_token(backbone)}",
        soft_wrap=True,
        highlight=False,
    )
    out.print(
        "  sampling " + ", ".join(f"{k} {v}" for k, v in spec["sampling"].items()), soft_wrap=True, highlight=False
    )
    if store["text"]:
        encoders = {name: told["encoder"] for name, told in store["text_encoders"].items()}
        sets = ", ".join(described_set(name, given, encoders.get(name)) for name, given in store["text"].items())
        out.print(f"  text embeddings of the class names: {sets}", soft_wrap=True, highlight=False)
    splits = store["splits"]
    for name, split in splits.items():
        for line in _view_lines(store, split):
            out.print(f"  {name}: {line}", highlight=False, soft_wrap=True)
    table = Table(
        "array",
        "of one clip",
        "dtype",
        "error",
        *(_title(name, split["videos"], len(split["parts"])) for name, split in splits.items()),
    )
    for array, facts in {name: facts for split in splits.values() for name, facts in split["arrays"].items()}.items():
        shape = " x ".join(map(str, facts["shape"]))
        stored = (_stored(split["arrays"].get(array), split["videos"]) for split in splits.values())
        table.add_row(array, shape or "one value", facts["dtype"], _error(store["errors"].get(array)), *stored)
    out.print(table)
    if store["errors"]:
        out.print("  error: of the standardised features, measured on a sample; --json has more", highlight=False)
    for name, split in splits.items():
        for kind, number in Counter(failure["kind"] for failure in split["failures"]).most_common():
            out.print(f"  {name}: {number} failed, {kind}", highlight=False)
        for kind, number in Counter(row["kind"] for row in split["partial"]).most_common():
            out.print(f"  {name}: {number} stored from damaged videos, {kind}", highlight=False)


def _view_lines(store: dict[str, Any], split: dict[str, Any]) -> Iterator[str]:
    """The views beyond the first, those of one seed and recipe, or of one grid, together."""
    alike: dict[str, list[int]] = {}
    for view in split["views"]:
        if view and view < len(store["views"]):
            alike.setdefault(describe_view(store["views"][view], store["dataset"]), []).append(view)
    for words, views in alike.items():
        numbers = f"view {views[0]}" if len(views) == 1 else f"views {views[0]} to {views[-1]}"
        stored = min(split["views"][view] for view in views)
        rows = "" if stored == split["videos"] else f", of {stored} of {split['videos']} videos"
        yield f"{numbers}: {words}{rows}"


def _title(split: str, num_videos: int, num_parts: int) -> str:
    return f"{split} ({num_videos}{f', {num_parts} parts' if num_parts > 1 else ''})"


def _error(error: dict[str, float] | None) -> str:
    """Attention maps have no standardised error, and float32 has none at all."""
    return f"{error.get('relative_standardised', error['relative']):.1e}" if error else ""


def _stored(array: dict[str, Any] | None, num_videos: int) -> str:
    """Each array has failures of its own: a video may be broken when layers are added, and not before."""
    if array is None:
        return "[yellow]none[/yellow]"
    stored, wanted = array["stored"], num_videos - array["failed"]
    return f"{stored}" if stored == wanted else f"[yellow]{stored} of {wanted}[/yellow]"
