"""`--set name=value` pairs onto frozen dataclasses: typed by the field, an unknown name is an error that names the nearest."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

_Config = TypeVar("_Config")


class SettingError(ValueError):
    """A `--set` pair, or a flag that stands for one, that no configuration field can take."""


def parse_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """["lr=1e-3", "layers=-2:"] -> {"lr": "1e-3", "layers": "-2:"}; a pair without "=" or a name given twice is an error."""
    settings: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise SettingError(f"--set {pair!r} is not of the form name=value, as in --set lr=1e-3.")
        if name in settings:
            raise SettingError(f"--set {name} is given twice, as {settings[name]!r} and as {value!r}. Give it once.")
        settings[name] = value.strip()
    return settings


def split_settings(settings: Mapping[str, Any], *configs: type) -> tuple[dict[str, Any], ...]:
    """Share the settings out among dataclasses by field name, one dict for each.

    Where a dataclass has `layers` and no `depth`, depth=N is short for its last N layers: layers="-N:".

    Raises:
        SettingError: a name that none has, or depth and layers at once.
    """
    shares: tuple[dict[str, Any], ...] = tuple({} for _ in configs)
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    if takes_depth(known):
        settings = _depth_as_layers(settings)
        known |= {"depth"}
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise SettingError(f"unknown setting {name!r}. {hint}There are: {', '.join(sorted(known))}.")
        for share, config in zip(shares, configs, strict=True):
            if name in {field.name for field in dataclasses.fields(config)}:
                share[name] = value
    return shares


def takes_depth(names: Collection[str]) -> bool:
    """Whether a head with these fields takes `depth` for its last layers."""
    return "layers" in names and "depth" not in names


def _depth_as_layers(settings: Mapping[str, Any]) -> dict[str, Any]:
    if "depth" not in settings:
        return dict(settings)
    if "layers" in settings:
        raise SettingError(
            f"depth={settings['depth']} and layers={settings['layers']} both say which layers are read. Set one of them."
        )
    depth = str(settings["depth"])
    if not depth.isdecimal() or int(depth) < 1:
        raise SettingError(f"--set depth={depth}: a number of layers expected, 1 or more.")
    return {name: value for name, value in settings.items() if name != "depth"} | {"layers": f"-{int(depth)}:"}


def build(config: type[_Config], settings: Mapping[str, Any]) -> _Config:
    """The dataclass with these fields; text values are read as the field's type, and so are the lists and whole numbers of JSON
    and TOML where the field is a tuple or a float.

    Raises:
        SettingError: a text cannot be read as its field's type, or the dataclass refuses a value.
    """
    values = read_values(config, settings)
    try:
        return config(**values)
    except ValueError as error:
        raise SettingError(str(error)) from error


def read_values(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with text values read as the type of their field.

    Raises:
        SettingError: a text cannot be read as its field's type.
    """
    hints = typing.get_type_hints(config)
    return {
        name: _read(name, value, hints[name]) if isinstance(value, str) else _typed(value, hints[name])
        for name, value in settings.items()
    }


def _typed(value: Any, hint: Any) -> Any:
    """[["a", 1]] of JSON or TOML as (("a", 1.0),) where that is the type; what fits nowhere stays as it is."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, (list, tuple)):
        items = next((typing.get_args(option) for option in options if typing.get_origin(option) is tuple), ())
        each = items[:1] * len(value) if items[1:] == (...,) else items
        return tuple(_typed(item, each[i] if i < len(each) else Any) for i, item in enumerate(value))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and float in options and int not in options else value


def _read(name: str, text: str, hint: Any) -> Any:
    """`text` as a value of the annotated type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        # An empty list is left to the dataclass to refuse: "layers=" must not be all layers.
        nothing = ("none",) if any(typing.get_origin(option) is tuple for option in options) else ("none", "")
        if type(None) in options and text.lower() in nothing:
            return None
        return _read(name, text, next(option for option in options if option is not type(None)))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        parts = [part.strip() for part in _without_brackets(text).split(",") if part.strip()]
        if typing.get_origin(item) is tuple:
            return tuple(_read_pair(name, part, typing.get_args(item)) for part in parts)
        return tuple(_read(name, part, item) for part in parts)
    if typing.get_origin(hint) is typing.Literal:
        return text  # the dataclass checks its own choices
    if hint is bool:
        return _read_bool(name, text)
    try:
        return hint(text)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"--set {name}={text}: {getattr(hint, '__name__', hint)} expected, {text!r} cannot be read as one."
        ) from error


def _read_pair(name: str, text: str, hints: tuple[Any, Any]) -> tuple[Any, Any]:
    """ "visual.*:0.1" -> ("visual.*", 0.1)"""
    first, colon, second = text.rpartition(":")
    if not colon:
        raise SettingError(f"--set {name}={text}: pairs expected, as in --set {name}=NAME:VALUE,NAME:VALUE.")
    return _read(name, first, hints[0]), _read(name, second, hints[1])


def _without_brackets(text: str) -> str:
    """A list may be written as Python does; brackets inside it belong to patterns."""
    text = text.strip()
    return text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text


def _read_bool(name: str, text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise SettingError(f"--set {name}={text}: true or false expected.")
    return words[text.lower()]
