"""Layer words mean what Python's indexing means, except that nothing may reach over the ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.layers import (
    LayerError,
    LayerSelection,
    absolute_layer,
    keeps_no_layer,
    resolve_layers,
    select_layers,
)

quick = settings(max_examples=60, deadline=None, database=None)


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        ("-4:", (8, 9, 10, 11)),
        ("0,3,6", (0, 3, 6)),
        ("all", tuple(range(12))),
        ("8:", (8, 9, 10, 11)),
        ("-1", (11,)),
        ("0:12:2", (0, 2, 4, 6, 8, 10)),
        (":2", (0, 1)),
        ("::5", (0, 5, 10)),
        ("0, -2:", (0, 10, 11)),
        ("3,-9,3", (3,)),
        ((-4, -1), (8, 11)),
        ([11, 2, -1], (2, 11)),
        ("none", ()),
        (" none", ()),
    ],
)
def test_selection_of_twelve_blocks(selection: str | tuple[int, ...], layers: tuple[int, ...]) -> None:
    assert resolve_layers(selection, 12) == layers


@quick
@given(st.data())
def test_any_spelling_of_a_set_of_layers_gives_the_set(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 48))
    layers = data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    spelled = [
        data.draw(st.sampled_from((layer, layer - num_layers))) for layer in data.draw(st.permutations(sorted(layers)))
    ]
    expected = tuple(sorted(layers))
    assert resolve_layers(spelled, num_layers) == expected
    assert resolve_layers(",".join(map(str, spelled)), num_layers) == expected
    assert resolve_layers(expected, num_layers) == expected


@quick
@given(st.data())
def test_a_range_within_the_bounds_is_a_python_slice(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 48))
    first = data.draw(st.none() | st.integers(-num_layers, num_layers - 1))
    end = data.draw(st.none() | st.integers(-num_layers, num_layers))
    step = data.draw(st.none() | st.integers(1, 5))
    word = ":".join(
        "" if part is None else str(part) for part in ((first, end) if step is None else (first, end, step))
    )
    expected = tuple(range(num_layers))[first:end:step]
    if expected:
        assert resolve_layers(word, num_layers) == expected
    else:
        with pytest.raises(LayerError, match="selects none"):
            resolve_layers(word, num_layers)


@quick
@given(st.integers(-60, 60), st.integers(1, 48))
def test_a_layer_is_absolute_or_refused(layer: int, num_layers: int) -> None:
    if -num_layers <= layer < num_layers:
        assert absolute_layer(layer, num_layers) == range(num_layers)[layer]
    else:
        with pytest.raises(LayerError, match=f"{num_layers} block"):
            absolute_layer(layer, num_layers)


@pytest.mark.parametrize(
    ("selection", "num_layers", "message"),
    [
        ("12", 12, "layers 12: asked of a backbone with 12 blocks (0-11, or -12 to -1)"),
        ("0,-13", 12, "layers -13: asked of a backbone with 12 blocks (0-11, or -12 to -1)"),
        ((4, 24), 24, "layers 24: asked of a backbone with 24 blocks (0-23, or -24 to -1)"),
        ("-4:", 3, "layers '-4:': asked of a backbone with 3 blocks (0-2, or -3 to -1)"),
        ("0:13", 12, "layers '0:13': asked of a backbone with 12 blocks (0-11, or -12 to -1)"),
        ("1", 1, "layers 1: asked of a backbone with 1 block (0, or -1)"),
        ("last", 12, "layers 'last': 'last' is not a layer (3, -1), a range (-4:, 0:12:2), 'all' or 'none'"),
        ("", 12, "layers '': '' is not a layer (3, -1), a range (-4:, 0:12:2), 'all' or 'none'"),
        ("0,,3", 12, "layers '0,,3': '' is not a layer (3, -1), a range (-4:, 0:12:2), 'all' or 'none'"),
        ("0:12:0", 12, "layers '0:12:0': '0:12:0' is not a layer (3, -1), a range (-4:, 0:12:2), 'all' or 'none'"),
        *(
            (word, 12, f"layers '{word}': 'none' is no layer at all. Say it alone, or name the layers without it")
            for word in ("none,3", "-1, none", "none,none")
        ),
        ("5:3", 12, "layers '5:3': selects none of the 12 blocks (0-11, or -12 to -1)"),
        ((), 12, "layers []: selects none of the 12 blocks (0-11, or -12 to -1)"),
    ],
)
def test_errors_say_what_was_asked_and_what_exists(
    selection: str | tuple[int, ...], num_layers: int, message: str
) -> None:
    with pytest.raises(LayerError) as error:
        resolve_layers(selection, num_layers)
    assert str(error.value) == message


STEM_AND_ALL = ["stem", *range(12)]


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        ("stem", ["stem"]),
        (" stem ,stem", ["stem"]),
        ("-13", ["stem"]),
        ("stem,-4:", ["stem", 8, 9, 10, 11]),
        ("-1, stem", ["stem", 11]),
        ("-13:", STEM_AND_ALL),
        ("stem,all", STEM_AND_ALL),
        ("-13:3", ["stem", 0, 1, 2]),
        ("-13:-1", ["stem", *range(11)]),
        ("-13::4", ["stem", 3, 7, 11]),
        ("-13:0", ["stem"]),
        ("all", [*range(12)]),
        (":2", [0, 1]),
        ("-12:", [*range(12)]),
        ("none", []),
    ],
)
def test_the_stem_is_one_below_the_first_layer_and_in_no_range_that_does_not_begin_with_it(
    selection: str, kept: list[int | str]
) -> None:
    layers = tuple(layer for layer in kept if isinstance(layer, int))
    assert select_layers(selection, 12) == LayerSelection(layers, "stem" in kept)
    if "stem" in kept:  # a head that says such a layer is wrong
        with pytest.raises(LayerError):
            resolve_layers(selection, 12)


@quick
@given(st.data())
def test_a_range_from_the_stem_is_a_slice_of_the_stem_and_all_layers(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 48))
    first = data.draw(st.none() | st.integers(-num_layers - 1, num_layers - 1))
    end = data.draw(st.none() | st.integers(-num_layers, num_layers))
    step = data.draw(st.integers(1, 5))
    word = f"{'' if first is None else first}:{'' if end is None else end}:{step}"

    def place(number: int) -> int:
        return number + 1 if number >= 0 else num_layers + 1 + number

    places = [-1, *range(num_layers)][1 if first is None else place(first) : None if end is None else place(end) : step]
    if places:
        expected = LayerSelection(tuple(layer for layer in places if layer >= 0), -1 in places)
        assert select_layers(word, num_layers) == expected
    else:
        with pytest.raises(LayerError, match="selects none"):
            select_layers(word, num_layers)


def test_of_three_blocks_the_last_four_are_the_stem_and_all_and_the_last_five_are_refused() -> None:
    assert select_layers("-4", 3) == LayerSelection((), True)
    assert select_layers("-4:", 3) == LayerSelection((0, 1, 2), True)
    with pytest.raises(LayerError) as error:
        select_layers("-5:", 3)
    message = "layers '-5:': asked of a backbone with 3 blocks (0-2, or -3 to -1); -4 is the stem"
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("first", "layers 'first': 'first' is not a layer (3, -1), a range (-4:, 0:12:2), 'all', 'stem' or 'none'"),
        ("none,stem", "layers 'none,stem': 'none' is no layer at all. Say it alone, or name the layers without it"),
        ("stem:4", "layers 'stem:4': 'stem:4' is not a layer (3, -1), a range (-4:, 0:12:2), 'all', 'stem' or 'none'"),
        ("0:-13", "layers '0:-13': asked of a backbone with 12 blocks (0-11, or -12 to -1)"),
    ],
)
def test_errors_about_the_stem(selection: str, message: str) -> None:
    with pytest.raises(LayerError) as error:
        select_layers(selection, 12)
    assert str(error.value) == message


def test_none_and_the_stem_alone_keep_no_layer() -> None:
    assert [keeps_no_layer(words) for words in ("none", "stem", "stem, stem", "stem,0", "-4:")] == [True] * 3 + [
        False
    ] * 2
