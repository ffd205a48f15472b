"""Layer selections -> absolute layers; the only place that knows what layer i means.

Layer i is the output of block i, counted from 0, before ln_post; the input of block i is layer i-1. A negative layer
counts from the end: of 12 blocks, -1 is layer 11. What enters block 0, after ln_pre, is the output of no block: it is the stem.

    "-4:"     the last four            of 12 blocks: 8 9 10 11
    "0,3,6"   just these               0 3 6
    "8:"      from layer 8 on          8 9 10 11
    "0:12:2"  every second one         0 2 4 6 8 10      (the end is not included, as in Python)
    "0,-2:"   ranges and layers mixed  0 10 11
    "all"     every one
    "none"    none of them: the embedding alone, which needs no layer

Only where features are stored, `select_layers`:

    "stem"    what enters block 0      stem              (in no other word's range, so not in "all" nor ":2")
    "-13"     the same: one below -12  stem
    "stem,8:" beside layers            stem 8 9 10 11
    "-13:3"   a range from it on       stem 0 1 2
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NO_LAYERS = "none"
STEM = "stem"

_STEM_PLACE = -1  # below layer 0

_RANGE = re.compile(r"([+-]?\d+)?:([+-]?\d+)?(?::(\d+)?)?")


class LayerError(ValueError):
    """A layer that the backbone does not have, or words that name no layer."""


@dataclass(frozen=True)
class LayerSelection:
    """What `vcache extract --layers` keeps the tokens of."""

    layers: tuple[int, ...]
    """Absolute, ascending, each once."""
    stem: bool
    """Whether what enters block 0 is kept, too."""


def absolute_layer(layer: int, num_layers: int) -> int:
    """`layer` of a backbone with `num_layers` blocks, counted from 0.

    Raises:
        LayerError: it has no such block.
    """
    return _place(layer, num_layers, str(layer), lowest=0)


def resolve_layers(selection: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The selected layers, absolute, ascending, each once; none where the selection is "none".

    Unlike a Python slice, a range may not reach over the ends: "-4:" of a backbone with 3 blocks is an error.

    Raises:
        LayerError: a layer that is not there, words that cannot be read, or nothing selected.
    """
    if isinstance(selection, str):
        return _places(selection, num_layers, lowest=0)
    if not selection:
        raise _nothing(selection, num_layers)
    return tuple(sorted({absolute_layer(layer, num_layers) for layer in selection}))


def select_layers(selection: str, num_layers: int) -> LayerSelection:
    """`resolve_layers` of words that may also name the stem: "-4:" of a backbone with 3 blocks is the stem and all of them.

    Raises:
        LayerError: as `resolve_layers`.
    """
    places = _places(selection, num_layers, lowest=_STEM_PLACE)
    return LayerSelection(tuple(place for place in places if place >= 0), _STEM_PLACE in places)


def selects_none(selection: str) -> bool:
    """Whether the words are those for no layer at all."""
    return selection.strip() == NO_LAYERS


def keeps_no_layer(selection: str) -> bool:
    """Whether the words are those for nothing that a block puts out: "none", or "stem" alone."""
    return selects_none(selection) or {word.strip() for word in selection.split(",")} == {STEM}


def _places(selection: str, num_layers: int, *, lowest: int) -> tuple[int, ...]:
    """The selected layers, ascending, the stem as _STEM_PLACE; `lowest` is that, or 0 where there is no stem to select."""
    if selects_none(selection):
        return ()
    words = [word.strip() for word in selection.split(",")]
    places = {place for word in words for place in _resolve_word(word, selection, num_layers, lowest)}
    if not places:
        raise _nothing(selection, num_layers)
    return tuple(sorted(places))


def _resolve_word(word: str, selection: str, num_layers: int, lowest: int) -> Iterable[int]:
    if word == "all":
        return range(num_layers)
    if word == STEM and lowest == _STEM_PLACE:
        return (_STEM_PLACE,)
    if re.fullmatch(r"[+-]?\d+", word):
        return (_place(int(word), num_layers, str(int(word)), lowest),)
    if word == NO_LAYERS:
        raise LayerError(
            f"layers {_shown(selection)}: 'none' is no layer at all. Say it alone, or name the layers without it"
        )
    match = _RANGE.fullmatch(word)
    if match is None or match[3] == "0":
        names = "'all', 'stem' or 'none'" if lowest == _STEM_PLACE else "'all' or 'none'"
        raise LayerError(f"layers {_shown(selection)}: {word!r} is not a layer (3, -1), a range (-4:, 0:12:2), {names}")
    first, end, step = (int(part) if part else None for part in match.groups())
    start = 0 if first is None else _place(first, num_layers, word, lowest)
    # One past the last layer is an end, and no layer.
    stop = num_layers if end is None or end == num_layers else _place(end, num_layers, word, lowest=0)
    return range(start, stop, step or 1)


def _place(layer: int, num_layers: int, asked: str, lowest: int) -> int:
    """Counted from 0; the stem is _STEM_PLACE."""
    place = layer if layer >= 0 else num_layers + layer
    if not lowest <= place < num_layers:
        raise _not_there(asked, num_layers, lowest)
    return place


def _not_there(asked: str, num_layers: int, lowest: int) -> LayerError:
    quoted = repr(asked) if ":" in asked else asked  # else "layers -4::"
    stem = f"; {-num_layers - 1} is the stem" if lowest == _STEM_PLACE else ""
    return LayerError(
        f"layers {quoted}: asked of a backbone with {num_layers} block{'s' * (num_layers != 1)} {_bounds(num_layers)}{stem}"
    )


def _nothing(selection: str | Sequence[int], num_layers: int) -> LayerError:
    return LayerError(f"layers {_shown(selection)}: selects none of the {num_layers} blocks {_bounds(num_layers)}")


def _bounds(num_layers: int) -> str:
    return f"(0-{num_layers - 1}, or -{num_layers} to -1)" if num_layers > 1 else "(0, or -1)"


def _shown(selection: str | Sequence[int]) -> str:
    return repr(selection) if isinstance(selection, str) else str(list(selection))
