"""`vcache heads`: what can be trained, one head with its presets, and what it costs; plain dicts, printed or as JSON."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.padding import Padding

from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import Recipe
from vcache.pipelines.console import count, out, print_sentence
from vcache.pipelines.head_presets import OURS, HeadPreset, find_preset, frames_of, presets_of
from vcache.pipelines.matching import SETTABLE_FACTS, STORE_FACTS
from vcache.pipelines.settings import takes_depth

_AUGMENT_REMARKS = {
    "evl": "--augment evl has no flip, as the official code; the paper names one: --augment evl-flip.",
    "aim": "--augment aim never flips Something-Something; RandAugment of the official code, imgaug's, flips half of its clips.",
    "dist": "--augment dist does not flip where left and right are part of the class; the official code swaps the classes then.",
}
"""What is to be said of a preset's augmentation."""


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
    return {**dataclasses.asdict(preset), "extract": preset.extract_line, "text": preset.text_lines}


def _depth(layers: tuple[int, ...] | None) -> int | None:
    """How many they are where they are the last ones, in order."""
    return len(layers) if layers is not None and layers == tuple(range(-len(layers), 0)) else None


def _meanings(config: type) -> dict[str, str]:
    """The text under each field of a dataclass, as one line; of a field that it inherits, the one that is there."""
    meanings = {}
    for base in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
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
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("None" if option is type(None) else _type(option) for option in typing.get_args(hint))
    if hint is bool:
        return "true | false"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _reads(requirements: Any) -> str:
    words = []
    for kind, label in (("tokens", "tokens"), ("cls", "CLS"), ("maps", "Q/K")):
        if layers := getattr(requirements, kind):
            words.append(f"{label} of layers {_layers(layers)}")
    words += ["what enters the first block, all tokens"] if requirements.stem else []
    words += ["the embedding"] if requirements.embed else []
    words += [f"pixels of {count(requirements.pixels, 'frame')} for each"] if requirements.pixels else []
    words += ["text of the classes"] if requirements.text else []
    words += ["the text tower"] if requirements.prompts else []
    words += [f"the top {count(requirements.tail, 'block')} of the backbone"] if requirements.tail else []
    return "; ".join(words)


def _layers(layers: tuple[int, ...]) -> str:
    """ "-2, -1", and of many in a row "0-11"."""
    if len(layers) > 4 and layers == tuple(range(layers[0], layers[0] + len(layers))) and layers[0] >= 0:
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def print_heads(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        _print_summary(row)
        settings = {key: value for key, value in row["settings"].items() if key not in STORE_FACTS}
        line("settings", pairs(settings))
        line("recipe", pairs(_switched_on(row["recipe"])))
        if row["num_presets"]:
            line("presets", f"{row['num_presets']}, see:  vcache heads {row['head']}")
    print_sentence(out, "Set any of these with --set name=value; sizes and the number of classes come from the store.")


def print_head(row: dict[str, Any]) -> None:
    _print_summary(row)
    shown = _switched_on(row["recipe"])
    line("recipe", pairs(shown))
    line("off", ", ".join(name for name in row["recipe_fields"] if name not in {*shown, "steps", "epochs"}))
    line("", f"what these are for:  vcache heads {row['head']} --json")
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
    print_sentence(out, f"  always the store's: {fixed}")
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
            f"{preset['name']:<{width}}  {preset['top1'] or '-':>5}  {preset['source']}",
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
        f"[bold]{row['name']}[/bold]  {_where_from(row)}",
        highlight=False,
        soft_wrap=True,
    )
    if row["note"]:
        line("note", row["note"])
    settings = {**frames_of(row["head"], row["frames"]), **row["settings"]}
    line("settings", pairs(settings) or "the defaults")
    line("recipe", pairs(_switched_on(row["recipe"])))
    line("extract", row["extract"])
    for text in row["text"]:
        line("text", text)
    line("train", f"vcache train-head {row['head']} --preset {row['name']}")
    line("count", f"vcache heads {row['head']} --count --preset {row['name']}")
    out.print(
        "A store that holds more does, too. Its views are fixed where the paper draws one in every epoch; "
        f"{row['views']} is our choice.",
        *([_AUGMENT_REMARKS[row["augment"]]] if row["augment"] in _AUGMENT_REMARKS else []),
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _where_from(row: Mapping[str, Any]) -> str:
    """Its row of the paper, with the accuracy."""
    if row["source"] == OURS:
        return "ours, no row of the paper"
    return f"{row['source']} of the paper, " + (
        f"top-1 {row['top1']}% there" if row["top1"] else "without a number there"
    )


def _print_summary(row: dict[str, Any]) -> None:
    out.print(f"[bold]{row['head']}[/bold]  {row['summary']}", highlight=False, soft_wrap=True)
    line("reads", row["reads"])


def line(title: str, text: str) -> None:
    """On a terminal broken between words; a command stays one line, as it is to be pasted."""
    words = f"  {title:<11}{text}"
    if out.is_terminal and not text.startswith("vcache "):
        words = textwrap.fill(
            words, out.width, subsequent_indent=" " * 13, break_on_hyphens=False, break_long_words=False
        )
    out.print(words, highlight=False, markup=False, soft_wrap=True)


def _switched_on(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is off; the betas and the schedule are never off."""
    off = {field.name: field.default for field in dataclasses.fields(Recipe) if field.name not in ("betas", "schedule")}
    return {name: value for name, value in recipe.items() if name not in off or value != off[name]}


def pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in values.items())


def _word(value: Any) -> str:
    """As --set takes it; the last layers in short, as "-12:"."""
    if isinstance(value, tuple) and len(value) > 4 and value == tuple(range(-len(value), 0)):
        return f"-{len(value)}:"
    if isinstance(value, (tuple, list)):
        return ",".join(":".join(map(str, item)) if isinstance(item, (tuple, list)) else str(item) for item in value)
    return str(value)
