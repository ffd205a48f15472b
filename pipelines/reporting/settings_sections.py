"""With which settings a run was trained, and where everything it was made of comes from."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from vcache.heads.registry import get_head
from vcache.pipelines.matching import STORE_FACTS
from vcache.pipelines.reporting.markup import Content, Markup, tag
from vcache.pipelines.reporting.page import Section, caption, facts
from vcache.pipelines.reporting.run_record import RunRecord
from vcache.pipelines.reporting.tables import Cell, Column, table
from vcache.pipelines.training.config import TrainingConfig
from vcache.store.reader import FeatureStore

_SHOWN_ELSEWHERE = ("head", "settings", "out", "store", "preset")
_UNKNOWN = object()


def settings_section(record: RunRecord, anchor: str) -> Section:
    """Every setting of the head, its recipe and the run; those that are not the default are marked."""
    content: list[Content] = []
    preset = record.config.get("preset")
    content.append(
        caption(
            f"Head {record.run.head}",
            f", preset {preset}" if preset else "",
            ". Coloured values differ from the default of the head, of its paper's recipe or of the command; the default stands "
            "beside them.",
        )
    )
    content.append(
        tag("div", [_group(title, rows) for title, rows in _groups(record) if rows], class_="columns settings")
    )
    return Section(anchor, "Settings", content)


_Row = tuple[str, Any, Any]
"""Name, value, default; _UNKNOWN where there is none."""


def _groups(record: RunRecord) -> list[tuple[str, list[_Row]]]:
    head, config = get_head(record.run.head), record.config
    own = config["head_config"]
    recipe = config.get("recipe")
    defaults = {
        field.name: field.default if field.default is not dataclasses.MISSING else _UNKNOWN
        for field in dataclasses.fields(head.Config)
    }
    groups = [
        (
            "Head",
            [(name, value, defaults.get(name, _UNKNOWN)) for name, value in own.items() if name not in STORE_FACTS],
        ),
        ("Sizes, from the store", [(name, value, _UNKNOWN) for name, value in own.items() if name in STORE_FACTS]),
    ]
    if recipe is not None:
        usual = dataclasses.asdict(head.recipe)
        groups.append(("Recipe", [(name, value, usual.get(name, _UNKNOWN)) for name, value in recipe.items()]))
    if "training" in config:
        groups.append(("Run", _run_rows(config)))
    return groups


def _run_rows(config: Mapping[str, Any]) -> list[_Row]:
    """What was said, or what it came to where config.json says that too ("auto" has become something)."""
    usual = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    rows: list[_Row] = []
    for name, value in config["training"].items():
        if name in _SHOWN_ELSEWHERE:
            continue
        came_to = config.get(name) if name in ("shuffle", "precision") else None
        shown = f"{value}: {came_to}" if value == "auto" and came_to else value
        rows.append((name, shown, _UNKNOWN if shown != value else usual.get(name, _UNKNOWN)))
    return rows


def _group(title: str, rows: Sequence[_Row]) -> Markup:
    cells = []
    for name, value, default in rows:
        differs = default is not _UNKNOWN and _plain(value) != _plain(default)
        shown = tag("b", _word(value)) if differs else _word(value)
        beside = tag("small", f" default {_word(default)}") if differs else None
        cells.append((Cell(tag("code", name)), Cell([shown, beside])))
    columns = (Column("setting"), Column("value"))
    return tag("div", tag("h3", title), table(columns, cells, label=f"Settings: {title}", sortable=False))


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=list))


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_word(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_word(one) for one in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def provenance_section(record: RunRecord, store: FeatureStore | None, anchor: str) -> Section:
    """From the videos to the weights: enough to make the same again, or to say why another run differs."""
    config = record.config
    spec = config.get("store_spec") or (store.manifest.spec if store is not None else {})
    rows: list[tuple[str, Content]] = [("Run", tag("code", str(record.path.resolve())))]
    rows += [("Trained", _when(record))] if record.steps else []
    if imported := config.get("imported"):
        rows.append(("Imported", _word(imported)))
    rows += _store_rows(record, store)
    rows += [(_title(name), tag("code", value) if name.endswith("sha256") else value) for name, value in _flat(spec)]
    rows.append(("Versions in training", _word(config.get("versions", {}))))
    if "device" in config:
        rows.append(("Device", config["device"]))
    if record.finished:
        rows.append(("Head weights sha256", tag("code", _sha256(record))))
    rows.append(("Report", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, vcache {version('vcache')}"))
    return Section(anchor, "Provenance", facts(rows))


def _store_rows(record: RunRecord, store: FeatureStore | None) -> list[tuple[str, Content]]:
    config = record.config
    path = store.path if store is not None else config.get("store")
    rows: list[tuple[str, Content]] = []
    if path is not None:
        gone = "" if store is not None else " (not there now)"
        rows.append(("Store", [tag("code", str(path)), gone]))
    key = config.get("store_key") or (store.manifest.key if store is not None else None)
    rows += [("Store key", tag("code", key))] if key else []
    dataset = config.get("dataset") or (store.manifest.dataset if store is not None else None)
    if dataset:
        splits = config.get("num_videos") or (store.splits if store is not None else {})
        rows.append(("Dataset", f"{dataset}: " + ", ".join(f"{split} {n:,}" for split, n in splits.items())))
    if config.get("num_train") is not None:
        rows.append(("Trained on", f"{config['num_train']:,} videos of {config['train_split']}"))
    if left_out := config.get("left_out"):
        rows.append(("Left out", f"{len(left_out)} classes: {', '.join(left_out)}"))
    for name, split in (("train_digest", "train"), ("val_digest", "validation")):
        rows += [(f"Digest of {split} videos", tag("code", config[name]))] if config.get(name) else []
    return rows


def _flat(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One row for each field of what the key is made of."""
    return [(name, _word(value)) for name, value in spec.items()]


def _title(name: str) -> str:
    return {"weights_sha256": "Backbone weights sha256", "dtype": "Stored as", "view": "View 0"}.get(
        name, name.replace("_", " ").capitalize()
    )


def _when(record: RunRecord) -> str:
    first, last = (datetime.fromtimestamp(record.steps[place]["time"], UTC) for place in (0, -1))
    return f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} UTC"


def _sha256(record: RunRecord) -> str:
    with (record.path / "head.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
