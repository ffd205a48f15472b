"""What the numbers of views mean, and the words that make them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from viewed import DEFINITIONS, evaluation, manifest, training

from vcache.pipelines.stored_views import (
    ViewsError,
    changed_views,
    describe_grid,
    evaluation_grids,
    extraction_words,
    grid_word,
    largest_first,
    parse_grid,
    training_views,
    view_definitions,
)
from vcache.store.manifest import Manifest


def defined(*definitions: dict[str, object]) -> Manifest:
    return manifest({"train": 3}, definitions=definitions)


def test_a_store_that_says_nothing_of_views_has_the_evaluation_view() -> None:
    old = defined()
    assert "views" not in old.facts
    assert view_definitions(old) == (evaluation(0, 1),)
    assert training_views(old) == (0,)
    assert evaluation_grids(old) == {(1, 1): (0,)}
    assert extraction_words(old, (0,)) == {}


def test_training_views_are_view_0_and_those_made_for_training() -> None:
    assert training_views(defined(*DEFINITIONS)) == (0, 1, 2)
    assert training_views(defined(*DEFINITIONS, training()), 3) == (0, 1, 2)
    assert training_views(defined(*DEFINITIONS, training())) == (0, 1, 2, 6)
    assert training_views(defined(*DEFINITIONS), 1) == (0,)


def test_more_training_views_than_defined_get_the_next_numbers() -> None:
    assert training_views(defined(*DEFINITIONS), 5) == (0, 1, 2, 6, 7)
    assert extraction_words(defined(*DEFINITIONS), (0, 1, 2, 6, 7)) == {"views": 5}


def test_the_words_make_the_views_that_were_named() -> None:
    store = defined(*DEFINITIONS, *(evaluation(0, 1, s, 3) for s in range(3)), training())
    assert extraction_words(store, (0, 1)) == {"views": 2}
    assert extraction_words(store, (0, 1, 2, 9)) == {"views": 4}
    assert extraction_words(store, (3, 4, 5)) == {"eval_views": "3x1"}
    assert extraction_words(store, (0, 2, 7)) == {"views": 3, "eval_views": "1x3"}


@given(grids=st.sets(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=4), seed=st.integers(0, 99))
def test_a_grid_is_there_once_all_its_places_are_defined(grids: set[tuple[int, int]], seed: int) -> None:
    """In whatever order they were appended, and in the order of time and crop."""
    grids -= {(1, 1)}
    places = [(t, T, s, S) for T, S in grids for t in range(T) for s in range(S)]
    random.Random(seed).shuffle(places)
    definitions = [evaluation(0, 1), training(), *(evaluation(*place) for place in places)]
    found = evaluation_grids(defined(*definitions))
    assert found.keys() == grids | {(1, 1)}
    for T, S in grids:
        expected = [evaluation(t, T, s, S) for t in range(T) for s in range(S)]
        assert [definitions[view] for view in found[T, S]] == expected
    if places:
        _, T, _, S = places[-1]
        assert (T, S) not in evaluation_grids(defined(*definitions[:-1]))


def test_the_largest_grid_comes_first_and_more_of_the_video_before_more_of_the_frame() -> None:
    assert largest_first({(1, 1), (1, 3), (10, 3), (3, 1), (4, 3)}) == [(10, 3), (4, 3), (3, 1), (1, 3), (1, 1)]


@given(T=st.integers(1, 999), S=st.integers(1, 999))
def test_words_of_grids_are_read_as_they_are_written(T: int, S: int) -> None:
    assert parse_grid(grid_word((T, S))) == (T, S)


@pytest.mark.parametrize(
    "word", ["", "3", "3x", "x3", "0x1", "3x0", "03x1", "3x1x1", "3 x 1", "-3x1", "3X1", "3x1\n", "²x1"]
)
def test_what_is_no_grid_is_refused(word: str) -> None:
    with pytest.raises(ViewsError, match="--views .*: say TxS, .* as 1x1, 3x1"):
        parse_grid(word)


def test_views_that_mean_something_else_are_told_from_those_that_are_not_there() -> None:
    store = defined(evaluation(0, 1), training(seed=0))
    assert changed_views(store, {"0": evaluation(0, 1), "1": training(seed=0), "2": training(seed=0)}) == []
    assert changed_views(store, {"0": evaluation(0, 1), "1": training(seed=8)}) == [1]
    assert changed_views(defined(), {"0": evaluation(0, 1), "1": training()}) == []


def test_one_view_is_not_called_a_mean() -> None:
    assert (describe_grid("1x1"), describe_grid("4x3")) == ("1 view", "mean of 4x3 views")
