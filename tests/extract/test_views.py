"""Views: their numbers, their spatial crops, and that what is recorded makes the images again."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.augment import Augmentation
from vcache.extract.preprocess import Preprocessing
from vcache.extract.randaugment import ColourJitter, RandAugment
from vcache.extract.sampling import StridedSampling, TSNSampling
from vcache.extract.video import DecodedVideo
from vcache.extract.views import (
    EvaluationView,
    TrainingView,
    View,
    assign_view_numbers,
    view_from_dict,
    views_of_request,
)

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PREPROCESSING = Preprocessing(image_size=32, mean=MEAN, std=STD)
SAMPLING = TSNSampling(num_frames=3)

AUGMENTATIONS = {
    "crop-flip": Augmentation(),
    "resized": Augmentation(resize_short=40, scale=(0.4, 1.0), interpolation="bilinear"),
    "multiscale": Augmentation(crop="multiscale"),
    "centre": Augmentation(crop="centre", resize_short=36, flip=0.0),
    "randaugment": Augmentation(randaugment=RandAugment(probability=0.9), grey=0.5),
    "per-frame": Augmentation(
        randaugment=RandAugment(num_ops=2, max_magnitude=30.0, operations="absolute", per_frame=True),
        jitter=ColourJitter(per_frame=True),
        erasing=0.5,
    ),
}
augmentations = st.sampled_from(sorted(AUGMENTATIONS))
grids = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]))


def make_video(height: int = 45, width: int = 61, num_frames: int = 11) -> DecodedVideo:
    """All frames of a video, of which a view may take any."""
    rng = np.random.default_rng(height * 100 + width)
    coarse = rng.integers(0, 256, (num_frames, height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    frames = np.ascontiguousarray(coarse.repeat(5, axis=1).repeat(5, axis=2)[:, :height, :width])
    return DecodedVideo(
        frames=frames, numbers=tuple(range(num_frames)), clips=(), num_video_frames=num_frames, fps=None
    )


def decoded_for(views: list[View], video: DecodedVideo, video_id: str = "a") -> DecodedVideo:
    rules = [view.clip_rule(SAMPLING, video_id) for view in views]
    return replace(video, clips=tuple(rule.indices(video.num_video_frames) for rule in rules))


def test_random_frames_are_others_for_another_seed_video_or_view_and_not_for_another_recipe() -> None:
    def drawn(video_id: str = "a/b", seed: int = 3, view: int = 1, recipe: str = "crop-flip") -> tuple[int, ...]:
        training = TrainingView(seed=seed, view=view, augmentation=AUGMENTATIONS[recipe])
        return training.clip_rule(SAMPLING, video_id).indices(10_000)

    assert len({drawn(), drawn("a/\u00fc"), drawn("b"), drawn(seed=4), drawn(view=2)}) == 5
    assert drawn() == drawn(recipe="per-frame")


def test_view_zero_is_the_evaluation_transform() -> None:
    view, video = EvaluationView(), make_video()
    clip = view.prepare(decoded_for([view], video), 0, PREPROCESSING, "a")
    index = SAMPLING.indices(11)
    assert torch.equal(clip.images, PREPROCESSING.pixels(video.frames[list(index)]))
    assert clip.record["frame_index"].tolist() == list(index) and clip.record["flip"] == 0
    assert clip.record["crop"].tolist() == pytest.approx(PREPROCESSING.crop_box(45, 61))


@pytest.mark.parametrize("height, width", [(45, 61), (61, 45), (40, 40), (33, 90)])
def test_three_crops_are_both_ends_and_the_middle_of_the_resized_frame(height: int, width: int) -> None:
    video = make_video(height, width)
    views: list[View] = [EvaluationView(spatial=(s, 3)) for s in range(3)]
    decoded = decoded_for(views, video)
    clips = [view.prepare(decoded, i, PREPROCESSING, "a") for i, view in enumerate(views)]
    size = (32, int(32 * width / height)) if height <= width else (int(32 * height / width), 32)
    tops, lefts = zip(*[clip.record["crop"][:2] for clip in clips], strict=True)
    along, across = (lefts, tops) if width >= height else (tops, lefts)
    assert along[0] == 0 and along[2] == pytest.approx((1 - 32 / max(size)) * max(height, width), abs=1e-3)
    assert max(across) == 0
    middle = EvaluationView().prepare(decoded, 1, PREPROCESSING, "a")
    assert torch.equal(clips[1].images, middle.images)


def test_spatial_crops_are_cut_from_the_same_resized_frames() -> None:
    video = make_video(40, 100)  # resized to 32 x 80: crops at columns 0, 24 and 48
    views: list[View] = [EvaluationView(spatial=(s, 3)) for s in range(3)]
    decoded = decoded_for(views, video)
    left, centre, right = (view.prepare(decoded, i, PREPROCESSING, "a").images for i, view in enumerate(views))
    assert torch.equal(left[..., 24:], centre[..., :8]) and torch.equal(centre[..., 24:], right[..., :8])


def test_definitions_survive_json() -> None:
    views = views_of_request(3, (4, 3), AUGMENTATIONS["resized"], seed=5)
    assert len(views) == 1 + 2 + 12
    views += [TrainingView(seed=7, view=1, augmentation=augmentation) for augmentation in AUGMENTATIONS.values()]
    assert [view_from_dict(json.loads(json.dumps(view.to_dict()))) for view in views] == views
    assert views[0].to_dict() == {"kind": "evaluation", "temporal": [0, 1], "spatial": [0, 1]}


def test_views_of_a_request_go_to_their_splits() -> None:
    views = views_of_request(2, (2, 3))
    assert sum(view.covers("train") for view in views) == 2
    assert sum(view.covers("val") for view in views) == 1 + 6
    assert views_of_request(1, (1, 1)) == [EvaluationView()]


def test_a_recorded_view_keeps_its_number_and_new_ones_come_after() -> None:
    first = views_of_request(3, None, Augmentation(), seed=5)
    numbers, recorded = assign_view_numbers([], first)
    assert list(numbers.values()) == first and list(numbers) == [0, 1, 2]
    # The same command with another grid and fewer training views, on a store that already went through JSON.
    second = views_of_request(2, (1, 3), Augmentation(), seed=5)
    numbers, extended = assign_view_numbers(json.loads(json.dumps(recorded)), second)
    assert extended[:3] == recorded and list(numbers) == [0, 1, 3, 4, 5]
    assert [view_from_dict(extended[number]) for number in numbers] == second
    # Another seed is another view; without records there is still view 0.
    assert list(assign_view_numbers(extended, views_of_request(2, seed=6))[0]) == [0, 6]
    assert list(assign_view_numbers([], [TrainingView(seed=1, view=1, augmentation=Augmentation())])[0]) == [1]


def test_unknown_definitions_are_refused() -> None:
    with pytest.raises(ValueError, match="a view that this version does not know: {'kind': 'depth'}"):
        view_from_dict({"kind": "depth"})
    training = TrainingView(seed=1, view=1, augmentation=Augmentation()).to_dict()
    training["augmentation"]["mirror"] = True
    with pytest.raises(ValueError, match="an augmentation that this version does not know"):
        view_from_dict(training)
    with pytest.raises(ValueError, match=r"spatial view \(3\) must be at least 0 and below their number \(3\)"):
        EvaluationView(spatial=(3, 3))


@settings(deadline=None, max_examples=40)
@given(augmentations, st.integers(0, 2**40), st.integers(33, 70), st.integers(33, 70), st.sampled_from([0, 1, 3]))
def test_replay_of_the_record_gives_the_images_bit_for_bit(
    name: str, seed: int, height: int, width: int, pixels_per_frame: int
) -> None:
    view = TrainingView(seed=seed, view=1, augmentation=AUGMENTATIONS[name], pixels_per_frame=pixels_per_frame)
    video = decoded_for([view], make_video(height, width))
    clip = view.prepare(video, 0, PREPROCESSING, "a")
    record = {name: np.array(array) for name, array in clip.record.items()}
    again = replace(view, seed=seed + 1)  # a replay draws nothing: another seed changes nothing
    frames = video.frames[record["frame_index"]]
    assert torch.equal(again.replay(frames, record, PREPROCESSING), clip.images)
    specs = {**view.record_specs(3), **view.pixel_specs(3, 32)}
    assert {name: (array.shape, array.dtype) for name, array in record.items()} == {
        name: (shape, np.dtype(dtype)) for name, (_, shape, dtype) in specs.items()
    }
    assert all(len(dims) == len(shape) for dims, shape, _ in specs.values())


@settings(deadline=None, max_examples=40)
@given(augmentations, st.integers(0, 2**40), st.integers(33, 70), st.integers(33, 70))
def test_crop_lies_inside_the_video_and_shows_what_it_says(name: str, seed: int, height: int, width: int) -> None:
    view = TrainingView(seed=seed, view=1, augmentation=AUGMENTATIONS[name])
    video = decoded_for([view], make_video(height, width))
    top, left, box_height, box_width = view.prepare(video, 0, PREPROCESSING, "a").record["crop"].tolist()
    assert top >= 0 and left >= 0
    assert top + box_height <= height + 1e-3 and left + box_width <= width + 1e-3
    # White inside the box and black outside gives a white image, away from the resizer's border.
    frames = np.zeros((1, height, width, 3), dtype=np.uint8)
    frames[:, round(top) : round(top + box_height), round(left) : round(left + box_width)] = 255
    geometry = replace(view.augmentation, randaugment=None, jitter=None, grey=0.0, erasing=0.0)
    record = {"crop": np.array([top, left, box_height, box_width], np.float32), "flip": np.zeros((), np.uint8)}
    assert replace(view, augmentation=geometry).replay(frames, record, PREPROCESSING)[..., 6:-6, 6:-6].min() == 255


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("view_kind", ["training", "evaluation"])
def test_clip_frames_are_among_the_pixels_bit_for_bit(name: str, view_kind: str) -> None:
    view: View = TrainingView(seed=4, view=2, augmentation=AUGMENTATIONS[name])
    if view_kind == "evaluation":
        view = EvaluationView(spatial=(2, 3))
    with_pixels = replace(view, pixels_per_frame=2)
    video = decoded_for([view, with_pixels], make_video())
    plain, full = view.prepare(video, 0, PREPROCESSING, "a"), with_pixels.prepare(video, 1, PREPROCESSING, "a")
    assert torch.equal(plain.images, full.images)
    assert full.record["pixels"].shape == (6, 32, 32, 3)
    np.testing.assert_array_equal(full.record["pixels"][::2], plain.images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(full.record["pixel_index"][::2], plain.record["frame_index"])
    # The frames between are of the same geometry: the whole view of all pixel frames at once.
    between = view.replay(video.frames[full.record["pixel_index"]], full.record, PREPROCESSING)
    np.testing.assert_array_equal(full.record["pixels"], between.permute(0, 2, 3, 1).numpy())


def test_views_depend_on_seed_video_and_view_and_on_nothing_else() -> None:
    def crop(seed: int, video_id: str, view: int) -> tuple[float, ...]:
        made = TrainingView(seed=seed, view=view, augmentation=Augmentation())
        video = decoded_for([EvaluationView(), made], make_video(), video_id)
        return tuple(made.prepare(video, 1, PREPROCESSING, video_id).record["crop"].tolist())

    crops = [crop(1, "a", 1), crop(2, "a", 1), crop(1, "b", 1), crop(1, "a", 2)]
    assert len(set(crops)) == 4
    assert crop(1, "a", 1) == crops[0]
    # Written down once: a change of the stream would give other pixels under the same definition.
    assert crops[0] == pytest.approx((1.0, 8.0, 35.0, 37.0))


def test_a_flip_swaps_left_and_right_of_the_same_crop() -> None:
    views: list[View] = [TrainingView(seed=4, view=2, augmentation=Augmentation(flip=p)) for p in (0.0, 1.0)]
    video = decoded_for(views, make_video())
    plain, flipped = (view.prepare(video, i, PREPROCESSING, "a") for i, view in enumerate(views))
    assert (plain.record["flip"], flipped.record["flip"]) == (0, 1)
    assert torch.equal(plain.images.flip(-1), flipped.images)


def test_training_views_take_other_frames_and_flip_half_of_the_videos() -> None:
    view = TrainingView(seed=3, view=1, augmentation=Augmentation(flip=0.5))
    video = make_video(34, 36, num_frames=30)
    records = [
        view.prepare(decoded_for([view], video, f"video {i}"), 0, PREPROCESSING, f"video {i}").record for i in range(60)
    ]
    assert len({tuple(record["frame_index"]) for record in records}) > 40
    assert 18 <= sum(int(record["flip"]) for record in records) <= 42


@given(
    st.one_of(
        st.builds(StridedSampling, num_frames=st.integers(1, 9), stride_frames=st.integers(1, 20)),
        st.builds(TSNSampling, num_frames=st.integers(1, 9)),
    ),
    st.integers(1, 400),
    st.integers(1, 4),
    st.integers(0, 2**40),
)
def test_pixel_frames_hold_the_clip_and_are_spread_evenly(
    sampling: StridedSampling | TSNSampling, n: int, alpha: int, seed: int
) -> None:
    for view in (EvaluationView(), TrainingView(seed=seed, view=1, augmentation=Augmentation())):
        clip = view.clip_rule(sampling, "a").indices(n)
        pixels = replace(view, pixels_per_frame=alpha).clip_rule(sampling, "a").indices(n)
        assert len(pixels) == alpha * len(clip) and pixels[::alpha] == clip
        assert list(pixels) == sorted(pixels) and pixels[-1] < n
        spacing = sampling.stride_frames if isinstance(sampling, StridedSampling) else Fraction(n, sampling.num_frames)
        for i, start in enumerate(clip):
            step = clip[i + 1] - start if i + 1 < len(clip) else spacing
            exact = [start + step * Fraction(j, alpha) for j in range(alpha)]
            got = pixels[i * alpha : (i + 1) * alpha]
            assert all(p == min(int(e), n - 1) for p, e in zip(got, exact, strict=True))
