"""Layer selections -> absolute layers; the only place that knows what layer i means.

Layer i is the output of block i, counted from 0, before ln_post; the input of block i is layer i-1. A negative layer
counts from the end: of 12 blocks, -1 is layer 11.

    "-4:"     the last four            of 12 blocks: 8 9 10 11
    "0,3,6"   just these               0 3 6
    "8:"      from layer 8 on          8 9 10 11
    "0:12:2"  every second one         0 2 4 6 8 10      (the end is not included, as in Python)
    "0,-2:"   ranges and layers mixed  0 10 11
    "all"     every one
    "none"    none of them: the embedding alone, which needs no layer
"""

import re
from collections.abc import Iterable, Sequence

NO_LAYERS = "none"

_RANGE = re.compile(r"([+-]?\d+)?:([+-]?\d+)?(?::(\d+)?)?")


class LayerError(ValueError):
    """A layer that the backbone does not have, or words that name no layer."""


def absolute_layer(layer: int, num_layers: int) -> int:
    """`layer` of a backbone with `num_layers` blocks, counted from 0.

    Raises:
        LayerError: it has no such block.
    """
    if not -num_layers <= layer < num_layers:
        raise _not_there(str(layer), num_layers)
    return layer % num_layers


def resolve_layers(selection: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The selected layers, absolute, ascending, each once; none where the selection is "none".

    Unlike a Python slice, a range may not reach over the ends: "-4:" of a backbone with 3 blocks is an error.

    Raises:
        LayerError: a layer that is not there, words that cannot be read, or nothing selected.
    """
    if isinstance(selection, str):
        if selects_none(selection):
            return ()
        words = [word.strip() for word in selection.split(",")]
        layers = {layer for word in words for layer in _resolve_word(word, selection, num_layers)}
    else:
        layers = {absolute_layer(layer, num_layers) for layer in selection}
    if not layers:
        raise LayerError(f"layers {_shown(selection)}: selects none of the {num_layers} blocks {_bounds(num_layers)}")
    return tuple(sorted(layers))


def selects_none(selection: str) -> bool:
    """Whether the words are those for no layer at all."""
    return selection.strip() == NO_LAYERS


def _resolve_word(word: str, selection: str, num_layers: int) -> Iterable[int]:
    if word == "all":
        return range(num_layers)
    if re.fullmatch(r"[+-]?\d+", word):
        return (absolute_layer(int(word), num_layers),)
    if word == NO_LAYERS:
        raise LayerError(
            f"layers {_shown(selection)}: 'none' is no layer at all. Say it alone, or name the layers without it"
        )
    match = _RANGE.fullmatch(word)
    if match is None or match[3] == "0":
        raise LayerError(
            f"layers {_shown(selection)}: {word!r} is not a layer (3, -1), a range (-4:, 0:12:2), 'all' or 'none'"
        )
    first, end, step = (int(part) if part else None for part in match.groups())
    reaches_over = (first is not None and not -num_layers <= first < num_layers) or (
        end is not None and not -num_layers <= end <= num_layers
    )
    if reaches_over:
        raise _not_there(word, num_layers)
    return range(num_layers)[slice(first, end, step)]


def _not_there(asked: str, num_layers: int) -> LayerError:
    quoted = repr(asked) if ":" in asked else asked  # else "layers -4::"
    return LayerError(
        f"layers {quoted}: asked of a backbone with {num_layers} block{'s' * (num_layers != 1)} {_bounds(num_layers)}"
    )


def _bounds(num_layers: int) -> str:
    return f"(0-{num_layers - 1}, or -{num_layers} to -1)" if num_layers > 1 else "(0, or -1)"


def _shown(selection: str | Sequence[int]) -> str:
    return repr(selection) if isinstance(selection, str) else str(list(selection))
