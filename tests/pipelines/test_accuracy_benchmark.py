"""benchmarks/accuracy.py compares training online with training from a store: that the two differ in nothing but freshness."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vcache.extract.decode import decode_video
from vcache.extract.video import DecodedVideo, DecodeRequest
from vcache.extract.views import TrainingView
from vcache.heads.registry import get_head
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.loading.epoch_order import EpochOrder
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.matching import build_head_config, match
from vcache.pipelines.presets import recipe
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import prepare_extraction
from vcache.store.reader import FeatureStore


def load(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


online, tables = load("accuracy_online"), load("accuracy_report")
RECIPE = recipe("evl", "world")


@pytest.fixture(scope="module")
def viewed(
    tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory
) -> ExtractionConfig:
    """Three views with maps, rounded to float16; read only."""
    store = tmp_path_factory.mktemp("viewed") / "store.zarr"
    config = tiny_extraction(store=store, views=3, augment="evl", cross_frame="maps", dtype="float16")
    run_extraction(config)
    return config


@pytest.fixture
def loader(viewed: ExtractionConfig) -> Iterator[Callable[..., ClipLoader]]:
    """loader(view): the training split in that view, shuffled, as EVL reads it."""
    with FeatureStore.open(viewed.store) as store:
        head = build_head_config("evl", {"layers": (-2, -1)}, store.manifest)
        plan = match("evl", get_head("evl").requires(head), store, ["train"])
        yield lambda view: ClipLoader(
            store, "train", plan, batch_size=3, device=torch.device("cpu"), order=EpochOrder(5), views=(view,)
        )


def seen(batches: Iterator[Batch]) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Rows in their order, and the features of each batch one after the other."""
    rows, features = [], []
    for batch in batches:
        of_batch = batch.features()
        rows.append(batch.rows)
        features += [x.clone() for x in (*of_batch.tokens.values(), *of_batch.maps.values())]
    return np.concatenate(rows), features


def test_online_gives_what_a_store_has_of_the_same_view(
    viewed: ExtractionConfig, loader: Callable[..., ClipLoader]
) -> None:
    extractor = prepare_extraction(viewed).extractor(decode=online.KeptFrames())
    stored_rows, stored = seen(loader(2).epoch(4))
    with online.online(extractor, lambda epoch: TrainingView(seed=0, view=epoch - 2, augmentation=RECIPE)):
        fresh_rows, fresh = seen(loader(0).epoch(4))
        _, next_epoch = seen(loader(0).epoch(5))
    np.testing.assert_array_equal(fresh_rows, stored_rows)
    assert len(fresh) == len(stored) > 4
    for a, b in zip(fresh, stored, strict=True):
        # The last bit of a product may depend on the batch, and then the last of float16.
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)
    assert all((a != b).any() for a, b in zip(fresh, next_epoch, strict=True))


def test_kept_frames_are_those_that_the_decoder_gives_and_each_file_is_opened_once(
    tiny_extraction: Callable[..., ExtractionConfig],
) -> None:
    opened: list[Path] = []

    def decode(request: DecodeRequest) -> DecodedVideo:
        opened.append(request.path)
        return decode_video(request)

    setup = prepare_extraction(tiny_extraction())
    kept, plain = setup.extractor(decode=online.KeptFrames(decode)), setup.extractor(decode=decode_video)
    videos = setup.dataset.videos[:3]
    for view in (None, *(TrainingView(seed=7, view=number, augmentation=RECIPE) for number in (1, 2))):
        for video in videos:
            a, b = kept.prepare(video, view), plain.prepare(video, view)
            torch.testing.assert_close(a.images, b.images, rtol=0, atol=0)
            np.testing.assert_array_equal(a.record["frame_index"], b.record["frame_index"])
    assert len(opened) == 2 * len(videos)  # once for the number of frames, once for all of them


def test_what_a_head_was_right_about_survives_the_line_of_its_result() -> None:
    bits = np.random.default_rng(0).random(37) < 0.6
    result = {"right": np.packbits(bits).tobytes().hex(), "val": 37}
    np.testing.assert_array_equal(tables.right(result), bits)


def test_the_interval_is_that_of_the_normal_distribution_where_only_videos_vary() -> None:
    """Seeds that agree about every video add nothing to the standard error of a mean."""
    of_videos = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=500, p=[0.1, 0.7, 0.2])
    low, high = tables.interval(np.stack([of_videos] * 3))
    half = 1.96 * of_videos.std(ddof=1) / np.sqrt(500)
    assert (low, high) == pytest.approx((of_videos.mean() - half, of_videos.mean() + half), abs=0.1 * half)


def test_the_interval_grows_with_what_seeds_disagree_about() -> None:
    rng = np.random.default_rng(2)
    alike = rng.choice([-1.0, 1.0], size=(1, 400)) * np.ones((3, 1))
    apart = alike + np.array([[-0.3], [0.0], [0.3]])
    (low, high), (far_low, far_high) = tables.interval(alike), tables.interval(apart)
    assert far_high - far_low > 2 * (high - low)
