"""What the numbers of views mean, and the words that make them."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from viewed import DEFINITIONS, evaluation, manifest, training

from vcache.extract.augment import Augmentation
from vcache.extract.views import assign_view_numbers, view_from_dict, views_of_request
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
    assert training_views(old, "train") == (0,)
    assert evaluation_grids(old) == {(1, 1): (0,)}
    assert extraction_words(old, (0,)) == {}


def test_training_views_are_view_0_and_those_made_for_training() -> None:
    assert training_views(defined(*DEFINITIONS), "train") == (0, 1, 2)
    assert training_views(defined(*DEFINITIONS, training(3)), "train", 3) == (0, 1, 2)
    assert training_views(defined(*DEFINITIONS, training(3)), "train") == (0, 1, 2, 6)
    assert training_views(defined(*DEFINITIONS), "train", 1) == (0,)


def test_a_split_to_evaluate_on_has_no_training_views() -> None:
    """As extraction has it."""
    for split in ("train", "val", "validation", "test", "rest"):
        covered = [view for view, values in enumerate(DEFINITIONS) if _covers(values, split)]
        expected = [view for view in covered if view == 0 or DEFINITIONS[view]["kind"] == "training"]
        assert training_views(defined(*DEFINITIONS), split) == (*expected,)
    assert training_views(defined(*DEFINITIONS), "val", 1) == (0,)
    with pytest.raises(ViewsError, match="--views 2: 'val' is a split to evaluate on"):
        training_views(defined(*DEFINITIONS), "val", 2)


def _covers(values: dict[str, Any], split: str) -> bool:
    return view_from_dict({**values, "augmentation": Augmentation().to_dict()} if "seed" in values else values).covers(
        split
    )


def test_more_training_views_than_defined_get_the_next_numbers() -> None:
    assert training_views(defined(*DEFINITIONS), "train", 5) == (0, 1, 2, 6, 7)
    assert extraction_words(defined(*DEFINITIONS), (6, 7)) == {"views": 5}
    assert extraction_words(defined(), (1,)) == {"views": 2}


def test_the_words_make_the_views_that_were_named() -> None:
    store = defined(*DEFINITIONS, *(evaluation(0, 1, s, 3) for s in range(3)), training(3))
    assert extraction_words(store, (0, 1)) == {"views": 2}
    assert extraction_words(store, (0, 1, 2, 9)) == {"views": 4}
    assert extraction_words(store, (3, 4, 5)) == {"eval_views": "3x1"}
    assert extraction_words(store, (0, 2, 7)) == {"views": 3, "eval_views": "1x3"}


def test_training_views_of_another_seed_are_counted_apart() -> None:
    store = defined(*DEFINITIONS, *(training(view, seed=8) for view in (1, 2, 3)))
    assert extraction_words(store, (0, 6, 7)) == {"views": 3}
    assert extraction_words(store, (2,)) == {"views": 3}
    assert extraction_words(store, (8, 9)) == {"views": 5}


@given(num_views=st.integers(1, 5), grid=st.tuples(st.integers(1, 4), st.integers(1, 3)), data=st.data())
def test_the_words_say_what_extraction_calls_the_views(
    num_views: int, grid: tuple[int, int], data: st.DataObject
) -> None:
    """Against extract/views.py: a request for these words has the views, and no more training views than are needed."""
    numbers, definitions = assign_view_numbers([], views_of_request(num_views, grid))
    store = defined(*definitions)
    assert training_views(store, "train") == tuple(view for view, made in numbers.items() if made.covers("train"))
    assert evaluation_grids(store)[grid] == tuple(
        definitions.index(values.to_dict())
        for values in views_of_request(1, grid)
        if grid == (1, 1) or values != numbers[0]
    )
    wanted = data.draw(st.sets(st.sampled_from(sorted(numbers))))
    words = extraction_words(store, wanted)
    asked = views_of_request(words.get("views", 1), parse_grid(words.get("eval_views", "1x1")))
    again, unchanged = assign_view_numbers(definitions, asked)
    assert unchanged == definitions
    assert again.keys() >= wanted
    assert {view for view in again if view and definitions[view]["kind"] == "training"} == set(
        range(1, max([view for view in wanted if definitions[view]["kind"] == "training"], default=0) + 1)
    )


@given(grids=st.sets(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=4), seed=st.integers(0, 99))
def test_a_grid_is_there_once_all_its_places_are_defined(grids: set[tuple[int, int]], seed: int) -> None:
    """In whatever order they were appended, and in the order of time and crop."""
    grids -= {(1, 1)}
    places = [(t, T, s, S) for T, S in grids for t in range(T) for s in range(S)]
    random.Random(seed).shuffle(places)
    definitions = [evaluation(0, 1), training(1), *(evaluation(*place) for place in places)]
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
    store = defined(evaluation(0, 1), training(1))
    assert changed_views(store, {"0": evaluation(0, 1), "1": training(1), "2": training(2)}) == []
    assert changed_views(store, {"0": evaluation(0, 1), "1": training(1, seed=8)}) == [1]
    assert changed_views(defined(), {"0": evaluation(0, 1), "1": training(1)}) == []


def test_one_view_is_not_called_a_mean() -> None:
    assert (describe_grid("1x1"), describe_grid("4x3")) == ("1 view", "mean of 4x3 views")
