"""`--frame-step`: every n-th stored frame, which is a clip of another stride, read without the frames between."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vcache.extract.sampling import StridedSampling
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.frame_step import frame_step_problem
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config, match
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run
from vcache.store.reader import FeatureStore

NEEDS = HeadRequirements(tokens=(-1, -2), cls=(-1,), maps=(-1,), embed=True, num_frames=3)


def loader(store: FeatureStore, plans: Any, **options: Any) -> ClipLoader:
    return ClipLoader(store, "val", plans, batch_size=4, device=torch.device("cpu"), **options)


@pytest.mark.parametrize(("dtype", "cross_frame"), [("float32", "qk"), ("int8", "derive")])
def test_it_is_the_store_extracted_with_that_stride(
    config: Callable[..., ExtractionConfig], tmp_path: Path, dtype: str, cross_frame: str
) -> None:
    """Of videos that are not longer than the window: those of the split have 14 and 19 frames."""
    made = config(frames=6, stride=5, dtype=dtype, cross_frame=cross_frame, max_error=1.0)
    own = replace(made, frames=3, stride=10, store=tmp_path / "own.zarr")
    for one in (made, own):
        run_extraction(one)
    with FeatureStore.open(made.store) as stored, FeatureStore.open(own.store) as extracted:
        plan, expected_plan = (
            match("evl", NEEDS, stored, ["val"], frame_step=2),
            match("evl", NEEDS, extracted, ["val"]),
        )
        np.testing.assert_array_equal(
            stored.read("val", "frame_index", range(6))[:, ::2], extracted.read("val", "frame_index", range(6))
        )
        # Two forward passes over clips of different lengths differ in the last bits; int8 rounds them, with other statistics.
        tolerance = 1e-4 if dtype == "float32" else 0.15
        for batch, expected in zip(
            loader(stored, plan).in_order(), loader(extracted, expected_plan).in_order(), strict=True
        ):
            found, wanted = batch.features(), expected.features()
            for name in ("tokens", "cls", "maps"):
                torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=tolerance, atol=tolerance)
            assert found.embed is not None and wanted.embed is not None
            torch.testing.assert_close(found.embed, wanted.embed, rtol=tolerance, atol=tolerance)


@given(frames=st.integers(1, 5), step=st.integers(1, 4), stride=st.integers(1, 9), length=st.integers(1, 200))
def test_how_much_earlier_the_clip_begins(frames: int, step: int, stride: int, length: int) -> None:
    read = StridedSampling(num_frames=frames * step, stride_frames=stride).indices(length)[::step]
    own = StridedSampling(num_frames=frames, stride_frames=stride * step).indices(length)
    earlier = {there - here for here, there in zip(read, own, strict=True)}
    assert min(earlier) >= 0 and max(earlier) <= ((step - 1) * stride + 1) / 2
    window = (frames - 1) * stride * step + 1
    if length <= window:
        assert earlier == {0}
    if length >= window + (step - 1) * stride + 1:
        assert len(earlier) == 1 and min(earlier) >= ((step - 1) * stride - 1) / 2


@pytest.fixture(scope="module")
def six_frames(video_folder: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frames") / "six.zarr"
    words: dict[str, Any] = {"layers": "-2:", "frames": 6, "stride": 3, "pretrained": None, "dtype": "float32"}
    run_extraction(
        ExtractionConfig(dataset=str(video_folder), model=f"local-dir:{tiny_clip}", store=path, device="cpu", **words)
    )
    return path


def test_only_these_frames_are_read(six_frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: dict[str, Any] = {}
    original = FeatureStore.read_many

    def read_many(self: FeatureStore, split: str, names: Any, rows: Any, **options: Any) -> dict[str, np.ndarray]:
        frames.update(dict.fromkeys(names, options["frames"]))
        return original(self, split, names, rows, **options)

    monkeypatch.setattr(FeatureStore, "read_many", read_many)
    with FeatureStore.open(six_frames) as store:
        plan = match("evl", replace(NEEDS, num_frames=2), store, ["val"], frame_step=3)
        batch = next(loader(store, plan).in_order())
    assert {name: None if found is None else [*found] for name, found in frames.items()} == {
        **{name: [0, 3] for name in ("tokens/2", "tokens/1", "q/2", "k/2")},
        **dict.fromkeys(("cls/2", "embed")),  # stored in one piece: a hundredth of the bytes
    }
    assert batch.features().tokens[-1].shape[1] == 2 and batch.features().maps[-1].shape[1] == 1


@pytest.mark.parametrize("resident", ["disk", "ram"])
def test_heads_of_several_steps_share_a_read_and_get_the_bits_of_each_alone(six_frames: Path, resident: Any) -> None:
    with FeatureStore.open(six_frames) as store:
        wanted = {step: replace(NEEDS, num_frames=6 // step) for step in (1, 2, 3)}
        plans = [match("evl", needs, store, ["val"], frame_step=step) for step, needs in wanted.items()]
        for chosen in (plans, plans[1:], plans[2:]):  # frames that all need, or that one or the other needs
            together = loader(store, chosen, resident=resident)
            for batch, *alone in zip(
                together.epoch(1), *(loader(store, plan).epoch(1) for plan in chosen), strict=True
            ):
                for plan, expected in zip(chosen, alone, strict=True):
                    pairs = zip(batch.features(plan)._tensors(), expected.features()._tensors(), strict=True)
                    assert all(torch.equal(found, x) and found.is_contiguous() for found, x in pairs)


def test_it_must_be_asked_for_and_the_refusal_says_how(six_frames: Path) -> None:
    with FeatureStore.open(six_frames) as store:
        with pytest.raises(HeadStoreMismatch) as caught:
            match("evl", NEEDS, store, ["val"])
        message = str(caught.value)
        assert (
            "reads clips of 3 frames; six.zarr holds clips of 6.\nExtract a store of its own with:  vcache " in message
        )
        assert message.endswith("\nor read every 2. of the stored frames, of stride 6, with --frame-step 2.")
        with pytest.raises(HeadStoreMismatch, match=r"holds clips of 6, of which every 3\. frame is read"):
            match("evl", NEEDS, store, ["val"], frame_step=3)
        for call in (
            lambda: match("evl", NEEDS, store, ["val"], frame_step=4),
            lambda: build_head_config("evl", {}, store.manifest, frame_step=4),
        ):
            with pytest.raises(HeadStoreMismatch, match="clips of 6 frames, which --frame-step 4 does not divide"):
                call()
        assert build_head_config("evl", {"layers": "-2:"}, store.manifest, frame_step=2).num_frames == 3


def test_stored_maps_are_of_neighbouring_frames_alone(config: Callable[..., ExtractionConfig]) -> None:
    made = config(frames=4, cross_frame="maps")
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        needs = replace(NEEDS, num_frames=2)
        with pytest.raises(
            HeadStoreMismatch, match=r"reads .* Q/K of layers 2, .*\nExtract the rest with:  vcache extract"
        ):
            match("evl", needs, store, ["val"], frame_step=2)
        assert match("evl", replace(needs, maps=()), store, ["val"], frame_step=2).frame_step == 2


def test_segments_are_not_strided() -> None:
    request = {"frames": 8, "stride": 16, "tsn": True}
    assert "is not one of each of 4 segments. Leave out --frame-step" in str(frame_step_problem(2, request))
    assert frame_step_problem(1, request) is None
    assert "--frame-step 0 does not divide" in str(frame_step_problem(0, {**request, "tsn": False}))


def test_a_run_remembers_it_and_is_evaluated_with_it(
    vcache: Callable[[str], tuple[int, str, str]], six_frames: Path, tmp_path: Path
) -> None:
    line = f"train-head evl --store {six_frames} --out {tmp_path / 'run'} --epochs 1 --set layers=-2: --json"
    status, _, err = vcache(f"{line} --set num_frames=3")
    assert (status, "with --frame-step 2." in err) == (1, True), err
    status, out, err = vcache(f"{line} --frame-step 2")
    assert status == 0, err
    run = Run.open(tmp_path / "run")
    assert (run.config["frame_step"], run.config["head_config"]["num_frames"]) == (2, 3)
    metrics = evaluate_run(tmp_path / "run", device="cpu")
    assert metrics.loss == pytest.approx(json.loads(out)["last"]["val_loss"], rel=1e-5)
