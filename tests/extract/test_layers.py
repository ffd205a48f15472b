"""Layer words mean what Python's indexing means, except that nothing may reach over the ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.layers import LayerError, absolute_layer, resolve_layers

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
