"""`vcache heads`: what can be trained, one head with its presets, and what it costs; plain dicts, printed or as JSON."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.padding import Padding

from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import Recipe
from vcache.pipelines.console import out
from vcache.pipelines.counting import REMARKS
from vcache.pipelines.head_presets import HeadPreset, find_preset, presets_of
from vcache.pipelines.matching import SETTABLE_FACTS, STORE_FACTS
from vcache.pipelines.settings import takes_depth


def describe_heads() -> list[dict[str, Any]]:
    """One row a head: what it reads with its defaults, its recipe, and every setting with its default."""
    return [_describe(name) for name in list_heads()]


def describe_head(name: str) -> dict[str, Any]:
    """The same of one head, with the type and the meaning of each setting, and its presets.

    Raises:
        UnknownHead: names the nearest head and lists all.
    """
    head = get_head(name)
    hints, meanings = typing.get_type_hints(head.Config), _meanings(head.Config)
    fields: dict[str, dict[str, Any]] = {
        field.name: {
            "type": _type(hints[field.name]),
            "default": None if field.name in STORE_FACTS else field.default,
            "from_store": field.name in STORE_FACTS,
            "meaning": meanings.get(field.name, ""),
        }
        for field in dataclasses.fields(head.Config)
    }
    if takes_depth(fields):
        fields["depth"] = {
            "type": "int",
            "default": _depth(fields["layers"]["default"]),
            "from_store": False,
            "meaning": "So many layers, the last ones: depth=2 is short for layers=-2:.",
        }
    return {
        **_describe(name),
        "fields": fields,
        "recipe_fields": _recipe_fields(head.recipe),
        "presets": [_preset_row(preset) for preset in presets_of(name).values()],
    }


def _describe(name: str) -> dict[str, Any]:
    head = get_head(name)
    config = head.Config(num_classes=400)
    return {
        "head": name,
        "summary": head.summary,
        "reads": _reads(head.requires(config)),
        "settings": {key: value for key, value in dataclasses.asdict(config).items() if key != "num_classes"},
        "recipe": {key: value for key, value in dataclasses.asdict(head.recipe).items() if value is not None},
        "num_presets": len(presets_of(name)),
    }


def _recipe_fields(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every field, also those that are off."""
    hints, meanings = typing.get_type_hints(Recipe), _meanings(Recipe)
    return {
        name: {"type": _type(hints[name]), "default": value, "meaning": meanings.get(name, "")}
        for name, value in dataclasses.asdict(recipe).items()
    }


def _preset_row(preset: HeadPreset) -> dict[str, Any]:
    return {**dataclasses.asdict(preset), "extract": preset.extract_line}


def _depth(layers: tuple[int, ...]) -> int | None:
    """How many they are where they are the last ones, in order."""
    return len(layers) if layers == tuple(range(-len(layers), 0)) else None


def _meanings(config: type) -> dict[str, str]:
    """The text under each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings = {}
    for node, after in itertools.pairwise(body.body):
        match node, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                meanings[name] = " ".join(text.split())
    return meanings


def _type(hint: Any) -> str:
    """ "int", "zero | normal", "list of int"."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return "list of NAME:NUMBER" if typing.get_origin(item) is tuple else f"list of {_type(item)}"
    if hint is bool:
        return "true | false"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _reads(requirements: Any) -> str:
    words = []
    for kind, label in (("tokens", "tokens"), ("cls", "CLS"), ("maps", "Q/K")):
        if layers := getattr(requirements, kind):
            words.append(f"{label} of layers {', '.join(map(str, layers))}")
    return "; ".join(words + (["the embedding"] if requirements.embed else []))


def print_heads(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        _print_summary(row)
        settings = {key: value for key, value in row["settings"].items() if key not in STORE_FACTS}
        _line("settings", _pairs(settings))
        _line("recipe", _pairs(_switched_on(row["recipe"])))
        if row["num_presets"]:
            _line("presets", f"{row['num_presets']}, see:  vcache heads {row['head']}")
    out.print(
        "Set any of these with --set name=value; sizes and the number of classes come from the store.", highlight=False
    )


def print_head(row: dict[str, Any]) -> None:
    _print_summary(row)
    shown = _switched_on(row["recipe"])
    _line("recipe", _pairs(shown))
    _line("off", ", ".join(name for name in row["recipe_fields"] if name not in {*shown, "steps", "epochs"}))
    _line("", f"what these are for:  vcache heads {row['head']} --json")
    out.print("[bold]--set name=value[/bold]", highlight=False)
    for name, field in row["fields"].items():
        if name not in STORE_FACTS or name in SETTABLE_FACTS:
            default = "the store's" if field["from_store"] else _word(field["default"])
            out.print(f"  {name}={default}  ({field['type']})", highlight=False, markup=False, soft_wrap=True)
            if field["meaning"]:
                out.print(Padding(escape(field["meaning"]), (0, 0, 0, 6)), style="dim", highlight=False)
    fixed = ", ".join(
        name for name, field in row["fields"].items() if field["from_store"] and name not in SETTABLE_FACTS
    )
    out.print(f"  always the store's: {fixed}", highlight=False)
    if row["presets"]:
        _print_presets(row["head"], row["presets"])


def describe_preset(head: str, name: str) -> dict[str, Any]:
    """One preset: its row of the paper, its settings, its whole recipe, and the `vcache extract` line of its store.

    Raises:
        UnknownHead, UnknownPreset: names the nearest.
    """
    recipe = {key: value for key, value in dataclasses.asdict(get_head(head).recipe).items() if value is not None}
    preset = find_preset(head, name)
    return {**_preset_row(preset), "recipe": recipe | dict(preset.recipe)}


def _print_presets(head: str, presets: list[dict[str, Any]]) -> None:
    """One line each, whole at 80 columns; what else there is to say of one is said by `print_preset`."""
    name, width = "--preset NAME", max(len(preset["name"]) for preset in presets)
    out.print(f"[bold]{name:<{width}}  top-1  of the paper[/bold]", highlight=False)
    for preset in presets:
        out.print(
            f"{preset['name']:<{width}}  {preset['top1']:>5}  {preset['source']}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    out.print(
        f"Settings, recipe and store of one:  vcache heads {head} --preset {presets[0]['name']}\n"
        f"What each costs, and in the paper:  vcache heads {head} --count",
        highlight=False,
        soft_wrap=True,
    )


def print_preset(row: dict[str, Any]) -> None:
    out.print(
        f"[bold]{row['name']}[/bold]  {row['source']} of the paper, top-1 {row['top1']}% there",
        highlight=False,
        soft_wrap=True,
    )
    if row["note"]:
        _line("note", row["note"])
    settings = {"num_frames": row["frames"], **row["settings"]}
    _line("settings", _pairs(settings))
    _line("recipe", _pairs(_switched_on(row["recipe"])))
    _line("extract", row["extract"])
    _line("train", f"vcache train-head {row['head']} --preset {row['name']}")
    _line("count", f"vcache heads {row['head']} --count --preset {row['name']}")
    out.print(
        "A store that holds more does, too. Its views are fixed where the paper draws one in every epoch; "
        f"{row['views']} is our choice.\n"
        "--augment evl has no flip, as the official code; the paper names one: --augment evl-flip.",
        highlight=False,
        soft_wrap=True,
    )


def print_counts(rows: list[dict[str, Any]]) -> None:
    if "with_tca" in rows[0]:
        _print_paper(rows)
        return
    for row in rows:
        out.print(f"[bold]{escape(row['name'])}[/bold]", highlight=False)
        _line("config", _pairs(row["config"]))
        _line("parameters", f"{row['parameters']:,}")
        _line(
            "head",
            f"{_giga(row['head_macs'])} GMACs a clip as the paper has it, {_giga(row['absorbed_macs'])} as it is computed here",
        )
        _line("backbone", f"{_giga(row['backbone_macs'])} GMACs a clip")
        _line("together", f"{row['total_gmacs']:,.1f} GMACs, views: {row['num_views']}")


def _print_paper(rows: list[dict[str, Any]]) -> None:
    """Two lines a preset, its own variant first: the paper's numbers stand beside the one that they are of."""
    _columns("preset", "T-CA", "parameters", "paper", "GMACs", "paper", "off", "head", "computed")
    for row in rows:
        own, other = ("on", "off") if row["config"]["temporal_cross_attention"] else ("off", "on")
        millions, gmacs, off = row["paper_millions"], row["paper_gmacs"], row["deviation"]
        _columns(
            row["name"],
            own,
            f"{row['parameters']:,}",
            f"{millions:.2f} M" if millions else "",
            f"{row['total_gmacs']:,.1f}",
            f"{gmacs:,}" if gmacs else "",
            f"{off:+.1%}" if off is not None else "",
            _giga(row["head_macs"]),
            _giga(row["absorbed_macs"]),
        )
        variant = row["with_tca" if other == "on" else "without_tca"]
        _columns("", other, f"{variant['parameters']:,}", "", f"{variant['total_gmacs']:,.1f}")
    for line in (
        "GMACs: 10^9 multiply-adds of backbone and head over all views; the paper calls them GFLOPs.",
        "head, computed: of the head alone for one clip, by the paper's formulas, and as vcache computes the same.",
        *REMARKS,
    ):
        out.print(f"  {line}", highlight=False, soft_wrap=True)


def _columns(name: str, tca: str, *numbers: str) -> None:
    """One line of the counts. A table would cut numbers on a narrow terminal, and a number that is cut tells nothing."""
    widths = (12, 9, 10, 8, 7, 10, 10)
    cells = (f"{number:>{width}}" for number, width in zip(numbers, widths, strict=False))
    out.print(f"{name:<19}{tca:<4}{''.join(cells)}".rstrip(), highlight=False, markup=False, soft_wrap=True)


def _giga(macs: int) -> str:
    return f"{macs / 1e9:,.2f}"


def _print_summary(row: dict[str, Any]) -> None:
    out.print(f"[bold]{row['head']}[/bold]  {row['summary']}", highlight=False, soft_wrap=True)
    _line("reads", row["reads"])


def _line(title: str, text: str) -> None:
    out.print(f"  {title:<11}{text}", highlight=False, markup=False, soft_wrap=True)


def _switched_on(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is off; the betas and the schedule are never off."""
    off = {field.name: field.default for field in dataclasses.fields(Recipe) if field.name not in ("betas", "schedule")}
    return {name: value for name, value in recipe.items() if name not in off or value != off[name]}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in values.items())


def _word(value: Any) -> str:
    """As --set takes it; the last layers in short, as "-12:"."""
    if isinstance(value, tuple) and len(value) > 4 and value == tuple(range(-len(value), 0)):
        return f"-{len(value)}:"
    if isinstance(value, (tuple, list)):
        return ",".join(":".join(map(str, item)) if isinstance(item, (tuple, list)) else str(item) for item in value)
    return str(value)
