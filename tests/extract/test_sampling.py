"""Frame indices against brute-force restatements of the upstream rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.extract.sampling import Sampling, StridedSampling, TSNSampling, sampling_from_dict

lengths = st.integers(1, 700)
frames = st.integers(1, 33)
strides = st.integers(1, 20)
seeds = st.integers(0, 2**31)
views = st.integers(1, 5).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))
samplings = st.one_of(
    st.builds(StridedSampling, num_frames=frames, stride_frames=strides), st.builds(TSNSampling, num_frames=frames)
)


def test_three_views_of_300_frames_begin_where_evl_begins_them() -> None:
    sampling = StridedSampling(num_frames=8, stride_frames=16)
    assert [sampling.indices(300, view=v, num_views=3)[0] for v in range(3)] == [0, 94, 187]
    assert sampling.indices(300) == (93, 109, 125, 141, 157, 173, 189, 205)


def test_one_frame_video_gives_that_frame_every_time() -> None:
    for sampling in (StridedSampling(), TSNSampling()):
        assert sampling.indices(1) == sampling.random_indices(1, seed=3) == (0,) * 8


def test_video_shorter_than_the_window_repeats_its_last_frame() -> None:
    assert StridedSampling(num_frames=4, stride_frames=2).indices(4) == (0, 2, 3, 3)
    # In training it is the last frame on the stride.
    assert StridedSampling(num_frames=4, stride_frames=2).random_indices(4, seed=0) == (0, 2, 2, 2)


def test_segments_are_read_in_the_middle() -> None:
    assert TSNSampling(num_frames=3).indices(9) == (1, 4, 7)
    assert TSNSampling(num_frames=3).indices(2) == (0, 0, 1)


@given(lengths, frames, strides, views)
def test_strided_windows_are_those_of_the_padded_video(n: int, t: int, r: int, view: tuple[int, int]) -> None:
    v, num_views = view
    window = (t - 1) * r + 1
    video = list(range(n))
    while len(video) < window:
        video.append(n - 1)
    slack = len(video) - window
    start = slack // 2 if num_views == 1 else round(slack / (num_views - 1) * v)
    expected = tuple(video[start : start + window : r])
    assert StridedSampling(num_frames=t, stride_frames=r).indices(n, view=v, num_views=num_views) == expected


@given(lengths, frames)
def test_tsn_takes_segment_centres(n: int, t: int) -> None:
    assert TSNSampling(num_frames=t).indices(n) == tuple(int(i * n / t + (n / t - 1) / 2) for i in range(t))


@given(lengths, frames)
def test_middle_of_three_tsn_views_is_the_single_view(n: int, t: int) -> None:
    sampling = TSNSampling(num_frames=t)
    assert sampling.indices(n, view=1, num_views=3) == sampling.indices(n)
    assert sampling.indices(n, view=0, num_views=3) == tuple(int(i * n / t) for i in range(t))


@given(lengths, frames, strides, seeds)
def test_random_window_fits_or_begins_at_zero(n: int, t: int, r: int, seed: int) -> None:
    drawn = StridedSampling(num_frames=t, stride_frames=r).random_indices(n, seed=seed)
    if n <= r * (t - 1) + 1:
        valid = [r * i for i in range(t) if r * i < n]
        assert drawn == tuple(valid + [valid[-1]] * (t - len(valid)))
    else:
        assert 0 <= drawn[0] < n - r * (t - 1)
        assert drawn == tuple(range(drawn[0], drawn[0] + r * t, r))


@given(lengths, frames, seeds)
def test_random_segments_hold_one_frame_each(n: int, t: int, seed: int) -> None:
    segment = (n - 1) / t
    drawn = TSNSampling(num_frames=t).random_indices(n, seed=seed)
    assert all(round(segment * i) <= index <= round(segment * (i + 1)) for i, index in enumerate(drawn))


@given(samplings, lengths, views, seeds)
def test_indices_are_ascending_in_range_and_repeatable(
    sampling: Sampling, n: int, view: tuple[int, int], seed: int
) -> None:
    for indices in (sampling.indices(n, view=view[0], num_views=view[1]), sampling.random_indices(n, seed=seed)):
        assert len(indices) == sampling.num_frames
        assert list(indices) == sorted(indices)
        assert all(type(i) is int and 0 <= i < n for i in indices)
    assert sampling.random_indices(n, seed=seed) == sampling.random_indices(n, seed=seed)


def test_every_random_start_is_reached() -> None:
    sampling = StridedSampling(num_frames=3, stride_frames=2)
    assert {sampling.random_indices(9, seed=seed)[0] for seed in range(200)} == {0, 1, 2, 3, 4}


@given(samplings)
def test_dict_round_trip(sampling: Sampling) -> None:
    assert sampling_from_dict(sampling.to_dict()) == sampling


def test_errors_say_the_value_and_its_bound() -> None:
    with pytest.raises(ValueError, match=r"stride_frames \(0\) must be at least 1"):
        StridedSampling(stride_frames=0)
    with pytest.raises(ValueError, match=r"num_video_frames \(0\) must be at least 1"):
        TSNSampling().indices(0)
    with pytest.raises(ValueError, match=r"view \(3\) must be at least 0 and below num_views \(3\)"):
        StridedSampling().indices(9, view=3, num_views=3)
    with pytest.raises(ValueError, match="'dense' is not known; there are: strided, tsn"):
        sampling_from_dict({"rule": "dense"})
