"""Pixels beside features, and tokens that are made one layer at a time."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.heads.requirements import HeadRequirements, OnDemand
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import HeadStoreMismatch, completing_command, match
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.request import ExtractionConfig
from vcache.store.reader import FeatureStore

FRAMES, PIXEL_FRAMES = 4, 16


@pytest.fixture(scope="session")
def pixels_store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 3 layers in int8, 4 frames of stride 3, and the pixels of 4 frames for each of them; read only."""
    path = tmp_path_factory.mktemp("pixels") / "pixels.zarr"
    wanted = {"frames": FRAMES, "pixels": PIXEL_FRAMES, "dtype": "int8", "cross_frame": "none", "max_error": 1.0}
    run_extraction(tiny_extraction(store=path, layers="0:", **wanted))
    return path


@pytest.fixture
def store(pixels_store: Path) -> Iterator[FeatureStore]:
    with FeatureStore.open(pixels_store) as opened:
        yield opened


def plan_of(store: FeatureStore, frame_step: int = 1, **asked: object) -> ReadPlan:
    return match("some", HeadRequirements(**asked), store, ["train"], frame_step=frame_step)  # type: ignore[arg-type]


def loader_of(store: FeatureStore, *plans: ReadPlan, batch_size: int = 3, **options: object) -> ClipLoader:
    return ClipLoader(store, "train", plans, batch_size=batch_size, device=torch.device("cpu"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gamma", "frame_step", "step"), [(4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 4), (4, 2, 2), (8, 2, 1)]
)
@pytest.mark.parametrize("resident", ["disk", "ram", "shards"])
def test_as_many_pixel_frames_for_each_frame_as_the_head_asks_for(store, gamma, frame_step, step, resident):
    """Beside tokens, also those of which every second frame is read, as of the pixels, and fewer frames than of these."""
    asked = plan_of(store, frame_step, pixels=gamma, tokens=(1,), streamed=True)
    order = EpochOrder(shuffle="shards" if resident == "shards" else "full")
    loader = loader_of(store, asked, resident="ram" if resident == "ram" else "disk", order=order)
    stored = store.read("train", "pixels", range(12))
    (whole, *_) = loader_of(store, plan_of(store, tokens=(1,)), batch_size=99).in_order()
    tokens = whole.features().tokens[1]
    for batch in (*loader.in_order(), *loader.epoch(0)):
        np.testing.assert_array_equal(batch.features().pixels, stored[batch.rows][:, ::step])
        assert batch.features().pixels.shape[1] == FRAMES // frame_step * gamma
        places = np.searchsorted(whole.rows, batch.rows)
        torch.testing.assert_close(batch.features().tokens[1], tokens[places, ::frame_step], rtol=0, atol=0)


def test_plans_with_other_numbers_of_pixel_frames_share_a_read(store):
    plans = [plan_of(store, pixels=4), plan_of(store, pixels=1)]
    (all_of_them, every_fourth), *_ = [
        tuple(batch.features(plan).pixels for plan in plans) for batch in loader_of(store, *plans).in_order()
    ]
    assert torch.equal(all_of_them[:, ::4], every_fourth)


@pytest.mark.parametrize(("gamma", "wanted"), [(3, 12), (8, 32)])
def test_pixel_frames_between_those_that_are_stored_are_refused_with_a_store_of_their_own(store, gamma, wanted):
    with pytest.raises(HeadStoreMismatch, match="those of 16 for 4 frames") as refused:
        plan_of(store, tokens=(0,), pixels=gamma)
    assert f"--pixels {wanted}" in str(refused.value)
    assert f"pixels-{wanted}-pixel-frames.zarr" in str(refused.value)


def test_a_store_without_pixels_is_refused_with_the_command_that_adds_them(float32_store):
    with FeatureStore.open(float32_store) as store, pytest.raises(HeadStoreMismatch) as refused:
        plan_of(store, tokens=(1, 2), pixels=2)
    assert "reads tokens of layers 1-2, pixels" in str(refused.value)
    assert "--pixels 10 " in str(refused.value) and f"--store {float32_store}" in str(refused.value)


def test_a_store_is_completed_with_as_many_pixel_frames_as_it_keeps(store):
    """It keeps one number of them, and `vcache extract` refuses another."""
    plan = plan_of(store, tokens=(0,), pixels=2)
    assert f" --pixels {PIXEL_FRAMES} " in completing_command(store, plan, eval_views="3x1")
    with pytest.raises(HeadStoreMismatch, match=f" --pixels {PIXEL_FRAMES} .*\n.adds 49.2 kB"):
        match("some", HeadRequirements(pixels=1), store, ["train"], views={"train": (0, 1)})


def test_streamed_tokens_have_the_bits_of_those_that_are_made_at_once(store):
    at_once, streamed = plan_of(store, tokens=(0, -1)), plan_of(store, tokens=(0, -1), streamed=True)
    for batch in loader_of(store, at_once, streamed).in_order():
        # Streamed first: later it would be given what the other plan has had made.
        made = {layer: x.clone() for layer, x in batch.features(streamed).tokens.items()}
        torch.testing.assert_close(made, dict(batch.features(at_once).tokens), rtol=0, atol=0)


def test_nothing_is_kept_of_a_streamed_layer_and_it_can_be_had_again(store):
    (batch, *_) = loader_of(store, plan_of(store, tokens=(0, 1, 2), streamed=True)).in_order()
    tokens = batch.features().tokens
    assert isinstance(tokens, OnDemand) and list(tokens) == [0, 1, 2]
    first = tokens[1]
    assert first.dtype == torch.float32
    copy, gone = first.clone(), weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    assert torch.equal(tokens[1], copy)
    with pytest.raises(KeyError):
        tokens[3]


def test_a_streamed_plan_is_given_what_another_head_has_had_made(store):
    at_once, streamed = plan_of(store, tokens=(0, 1)), plan_of(store, tokens=(1,), streamed=True)
    (batch, *_) = loader_of(store, at_once, streamed).in_order()
    kept = batch.features(at_once).tokens[1]
    assert batch.features(streamed).tokens[1] is kept
