"""The draw of views: uniform, and of each video whatever else there is."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vcache.pipelines.loading.view_draw import ViewDraw

CHI2_2, CHI2_8 = 13.8, 26.1  # exceeded once in a thousand times with 2 and with 8 degrees of freedom


def names(num_rows: int) -> list[str]:
    return [f"video-{row}" for row in range(num_rows)]


def chi2(counts: np.ndarray) -> float:
    """Against equal frequencies."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def drawn(num_rows: int, num_epochs: int, seed: int = 0) -> np.ndarray:
    """Views 0 to 2, (epochs, rows)."""
    draw = ViewDraw(names(num_rows), (0, 1, 2), np.ones((3, num_rows), dtype=np.bool_), seed=seed)
    return np.stack([draw.epoch(number) for number in range(num_epochs)])


readable_views = st.tuples(st.integers(1, 5), st.integers(1, 9)).flatmap(lambda shape: arrays(np.bool_, shape))


@settings(deadline=None)
@given(readable=readable_views, seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_a_video_is_drawn_in_a_view_that_it_has(readable: np.ndarray, seed: int, epoch: int) -> None:
    views = 3 * np.arange(len(readable)) + 2
    chosen = ViewDraw(names(readable.shape[1]), views.tolist(), readable, seed=seed).epoch(epoch)
    for row in np.flatnonzero(readable.any(axis=0)):
        assert chosen[row] in views[readable[:, row]]


@settings(deadline=None)
@given(readable=readable_views, seed=st.integers(0, 99), epoch=st.integers(0, 99), data=st.data())
def test_the_draw_of_a_video_does_not_know_the_others(
    readable: np.ndarray, seed: int, epoch: int, data: st.DataObject
) -> None:
    num_views, num_rows = readable.shape
    ids, views = names(num_rows), list(range(num_views))
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True))
    of_all = ViewDraw(ids, views, readable, seed=seed).epoch(epoch)
    of_some = ViewDraw([ids[row] for row in rows], views, readable[:, rows], seed=seed).epoch(epoch)
    there = readable[:, rows].any(axis=0)
    np.testing.assert_array_equal(of_some[there], of_all[rows][there])


def test_views_are_drawn_equally_often() -> None:
    """Of all videos in an epoch, of one video over the epochs, and whatever was drawn for it before or for its neighbour."""
    views = drawn(600, 300)
    assert chi2(np.bincount(views.ravel(), minlength=3)) < CHI2_2
    over = {axis: [chi2(np.bincount(line, minlength=3)) for line in np.moveaxis(views, axis, 0)] for axis in (0, 1)}
    for values in over.values():
        # The mean of many chi-squares of 2 degrees of freedom is 2, with a variance of 4 / number.
        assert abs(np.mean(values) - 2) < 4 * np.sqrt(4 / len(values))
        assert np.mean(np.array(values) > CHI2_2) < 0.01
    for first, second in ((views[:-1], views[1:]), (views[:, :-1], views[:, 1:])):
        table = np.bincount((3 * first + second).ravel(), minlength=9)
        assert chi2(table) < CHI2_8


def test_the_check_of_frequencies_can_fail() -> None:
    assert chi2(np.bincount(drawn(600, 30).clip(0, 1).ravel(), minlength=3)) > CHI2_2


def test_seeds_and_epochs_draw_differently_and_the_same_again_alike() -> None:
    np.testing.assert_array_equal(drawn(50, 3), drawn(50, 3))
    assert len({drawn(50, 3, seed)[epoch].tobytes() for seed in (0, 1, 2) for epoch in range(3)}) == 9


def test_ids_in_any_script_are_drawn_for() -> None:
    draw = ViewDraw(["vidéo", "视频", "v.mp4"], (0, 7), np.ones((2, 3), dtype=np.bool_), seed=0)
    assert {int(view) for number in range(20) for view in draw.epoch(number)} == {0, 7}
