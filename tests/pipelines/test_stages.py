"""The stages of an extraction: bounded, stopped by any error, decoding once for all, and in slots that keep a row's bits."""

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract.augment import Augmentation
from vcache.extract.backbone import load_backbone
from vcache.extract.datasets.base import VideoDataset
from vcache.extract.preprocess import from_open_clip_config
from vcache.extract.sampling import TSNSampling
from vcache.extract.video import DecodedVideo, DecodeRequest
from vcache.extract.views import PreparedClip, views_of_request
from vcache.pipelines import decoding
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.extraction import run_extraction, run_extractions
from vcache.pipelines.progress import ExtractionProgress, LimitClock
from vcache.pipelines.repairing import repair
from vcache.pipelines.request import ExtractionConfig, ExtractionError, per_model
from vcache.pipelines.stages import MAX_BATCHES
from vcache.pipelines.verification import verify
from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter

MakeConfig = Callable[..., ExtractionConfig]
B, T, S, N, D = 4, 5, 32, 17, 48


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    ours = ("decode", "calibrate", "shard-writer")  # zarr's own live on
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)] == []


def contents(store: Path) -> dict[str, bytes]:
    """Every file but the manifest, which has the time of creation in it."""
    files = (file for file in store.rglob("*") if file.is_file() and file != store / "zarr.json")
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def extractor(tiny_clip: Path) -> ClipExtractor:
    backbone = load_backbone(f"local-dir:{tiny_clip}", None)
    preprocessing = from_open_clip_config(backbone.preprocess_config)
    dataset = VideoDataset("none", Path(), ("a",), ())
    return ClipExtractor(dataset, TSNSampling(num_frames=T), preprocessing, backbone, num_threads=1, batch_size=B)


def make_clip(seed: int) -> PreparedClip:
    images = torch.randint(0, 256, (T, 3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return PreparedClip(images, {"flip": np.zeros((), dtype=np.uint8)})


@settings(max_examples=12, deadline=None)
@given(missing=st.sets(st.integers(0, B - 1), max_size=B - 1), num_threads=st.sampled_from([1, 2]))
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(
    extractor: ClipExtractor, missing: set[int], num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    specs = [
        ArraySpec(name="tokens/2", dims=("frame", "token", "channel"), shape=(T, N, D), chunk=(1, N, D), dtype="float32"),
        ArraySpec(name="q/1", dims=("frame", "head", "token", "dim"), shape=(T, 4, N, 12), chunk=(1, 4, N, 12), dtype="float32"),
        ArraySpec(name="flip", dims=(), shape=(), chunk=(), dtype="uint8"),
    ]  # fmt: skip
    clips = [make_clip(i) for i in range(B)]
    whole = extractor.start(clips, specs).rows()
    slots = [None if i in missing else clip for i, clip in enumerate(clips)]
    rows = extractor.start(slots, specs).rows()
    assert [i for i, row in enumerate(rows) if row is None] == sorted(missing)
    for expected, row in zip(whole, rows, strict=True):
        assert expected is not None
        if row is not None:
            assert row.keys() == expected.keys() == {"tokens/2", "q/1", "flip"}
            assert all(np.array_equal(row[name], expected[name]) for name in row)


def test_failed_videos_leave_the_bits_of_the_others(config: MakeConfig, video_folder: Path, tmp_path: Path) -> None:
    """Alone in their batch or not, at its beginning or end; a batch of failures only is skipped."""
    copy, broken = tmp_path / "videos", ("c1", "c2", "j2", "j3", "w0")
    shutil.copytree(video_folder, copy)
    run_extraction(config(split=("train",), store=tmp_path / "whole.zarr"))
    for name in broken:
        next(copy.glob(f"train/*/{name}.mp4")).write_bytes(b"")
    summary = run_extraction(config(dataset=str(copy), split=("train",), store=tmp_path / "holes.zarr"))
    assert sorted(Path(failure.path).stem for failure in summary.failures) == sorted(broken)
    with FeatureStore.open(tmp_path / "whole.zarr") as whole, FeatureStore.open(tmp_path / "holes.zarr") as holes:
        for name in whole.arrays("train"):
            rows = np.flatnonzero(holes.committed_rows("train", [name]))
            assert len(rows) == 12 - len(broken)
            np.testing.assert_array_equal(holes.read("train", name, rows), whole.read("train", name, rows))


def test_memory_is_bounded_when_the_writer_is_slow(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos that are decoded and not yet written, at any moment; the bound is the one that stages.py states."""
    num_threads, batch_size = 3, 2
    counts, most, lock = {"decoded": 0, "written": 0}, 0, threading.Lock()
    decode, write = decoding.decode_video, ShardWriter.write

    def counted(request: DecodeRequest) -> DecodedVideo:
        nonlocal most
        with lock:
            counts["decoded"] += 1
            most = max(most, counts["decoded"] - counts["written"])
        return decode(request)

    def slow(self: ShardWriter, *args: object, **options: object) -> None:
        time.sleep(0.1)
        write(self, *args, **options)  # type: ignore[arg-type]
        with lock:
            counts["written"] += 1

    monkeypatch.setattr(decoding, "decode_video", counted)
    monkeypatch.setattr(ShardWriter, "write", slow)
    summary = run_extraction(config(decode_workers=num_threads, batch_size=batch_size))
    assert counts == {"decoded": 18, "written": 18}
    # The calibration of float32 decodes nothing. Read ahead, in the batch that is filled, in batches on their way to the disk.
    assert most <= num_threads + 2 * batch_size + batch_size + MAX_BATCHES * batch_size
    assert max(summary.progress.limits, key=summary.progress.limits.__getitem__) == "disk"
    assert sum(summary.progress.limits.values()) == pytest.approx(1)


@pytest.mark.parametrize("stage", ["decode", "device"])
def test_the_slow_stage_is_named(config: MakeConfig, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def slowed(function: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: (time.sleep(seconds), function(*args))[1]

    seconds = {"decode": 0.1, "device": 0.3}[stage]  # of each of 18 videos, of each of 6 batches

    if stage == "decode":
        monkeypatch.setattr(decoding, "decode_video", slowed(decoding.decode_video))
    else:
        monkeypatch.setattr(ClipExtractor, "start", slowed(ClipExtractor.start))
    seen: list[dict[str, float]] = []
    summary = run_extraction(config(decode_workers=1), lambda progress: seen.append(progress.recent_limits))
    assert summary.progress.limits[stage] > 0.5
    assert seen[0] == {}
    assert seen[-1][stage] > 0.5


def test_shares_of_the_last_seconds_forget_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("vcache.pipelines.progress.time.perf_counter", lambda: now)
    clock, progress = LimitClock(), ExtractionProgress()
    for second in range(20):
        with clock.waiting_for("disk" if second < 10 else "decode"):
            now += 0.75
        now += 0.25
        clock.update(progress)
    assert progress.limits == pytest.approx({"decode": 0.375, "device": 0.25, "disk": 0.375})
    assert progress.recent_limits == pytest.approx({"decode": 0.75, "device": 0.25, "disk": 0.0})


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed() -> list[dict[str, bytes]]:
    """Trees that have to be equal, whatever came in between; `test_an_error_...[nowhere]` adds the first."""
    return []


def _break(*args: object) -> None:
    raise Broken("planted")


@pytest.mark.parametrize("stage", ["nowhere", "decode", "prepare", "device", "write", "commit", "report"])
def test_an_error_in_any_stage_ends_all_of_them(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, stage: str, undisturbed: list[dict[str, bytes]]
) -> None:
    """It surfaces as it is; the shards before are kept and nothing of the shard at hand; the next run completes the store."""
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    made = config(batch_size=2)
    victims = {
        "decode": (decoding, "decode_video"),
        "prepare": (type(views_of_request()[0]), "prepare"),
        "device": (ClipExtractor, "start"),
        "write": (ShardWriter, "write"),
        "commit": (ShardWriter, "_commit"),
    }
    calls = 0

    def after_some(original: Callable[..., object], most: int) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            return original(*args, **options) if calls <= most else _break()

        return call

    with monkeypatch.context() as patch:
        if stage in victims:
            where, name = victims[stage]
            patch.setattr(where, name, after_some(getattr(where, name), 1 if stage == "commit" else 6))
        report = after_some(lambda progress: None, 5) if stage == "report" else lambda progress: None
        with pytest.raises(Broken, match="planted") if stage != "nowhere" else nullcontext():
            run_extraction(made, report)
    with FeatureStore.open(made.store) as store:
        committed = [row for split in store.splits for row in store.committed_rows(split, ["tokens/2"])]
        assert (sum(committed) < 18) == (stage != "nowhere")
        assert not list(made.store.rglob("*.tmp"))
    assert run_extraction(made).progress.videos_done == 18 - sum(committed)
    undisturbed.append(contents(made.store))
    assert undisturbed[-1] == undisturbed[0]


def test_an_interruption_while_the_last_shards_are_written_leaves_whole_ones(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 6)
    made = config()
    with monkeypatch.context() as patch:
        patch.setattr(
            "vcache.pipelines.writing.ShardWriting.drain", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run_extraction(made)
    with FeatureStore.open(made.store) as store:
        done = sum(sum(store.committed_rows(split, ["tokens/2"])) for split in store.splits)
    assert done % 6 == 0
    assert run_extraction(made).progress.videos_done == 18 - done
    assert verify(made.store)["ok"]


@pytest.fixture
def other_clip(tiny_clip: Path, tmp_path: Path) -> Path:
    """Other weights in the same form."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_clip, tmp_path / "other-clip")
    weights = load_file(tiny_clip / "open_clip_model.safetensors")
    save_file(
        {name: 1.01 * tensor for name, tensor in weights.items()}, tmp_path / "other-clip/open_clip_model.safetensors"
    )
    return tmp_path / "other-clip"


def test_several_models_decode_once_and_make_the_stores_that_each_makes_alone(
    config: MakeConfig, other_clip: Path, tmp_path: Path, decoded: list[str]
) -> None:
    made = config(store=None, more_models=((f"local-dir:{other_clip}", None),))
    first, second = run_extractions(per_model(made))
    assert len(decoded) == 18
    assert first.key != second.key
    assert first.progress is second.progress
    assert (first.progress.videos_done, first.progress.videos_total) == (18, 18)
    for number, (one, summary) in enumerate(zip(per_model(made), (first, second), strict=True)):
        alone = tmp_path / f"{number}.zarr"
        run_extraction(config(model=one.model, store=alone))
        assert contents(Path(summary.store)) == contents(alone)
    decoded.clear()
    again = run_extractions(per_model(made))
    assert (again[0].progress.videos_done, again[1].progress.videos_skipped, decoded) == (0, 18, [])


def test_a_second_model_gets_the_shards_of_the_first(
    config: MakeConfig, other_clip: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    """Also where the first is there, so that more layers of both decode once."""
    with monkeypatch.context() as patch:
        patch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 5)
        run_extraction(config(store=None, layers="-1"))
    both = per_model(config(store=None, more_models=((f"local-dir:{other_clip}", None),)))
    decoded.clear()
    summaries = run_extractions(both)
    assert len(decoded) <= 18
    for summary in summaries:
        with FeatureStore.open(summary.store) as store:
            assert store.manifest.rows_per_shard == 5
            assert store.committed_rows("train", ["tokens/1", "q/2"]).all()


def test_several_models_do_not_share_one_store(config: MakeConfig) -> None:
    with pytest.raises(ExtractionError, match="names one store, and each of 2 models has its own"):
        config(more_models=(("ViT-B-32", None),))
    made = config(store=None)
    for part in (None, (1, 2)):  # two turns at one store would wait an hour for each other
        twice = replace(made, part=part, more_models=((made.model, made.pretrained),))
        with pytest.raises(ExtractionError, match="is named twice. Name each model once"):
            run_extractions(per_model(twice))


VIEWS = tuple(views_of_request(2, (1, 3), Augmentation(), seed=3))  # a random view, and three more crops of val


def test_views_cost_no_second_decode_and_are_those_that_are_made_alone(
    config: MakeConfig, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch, video_folder: Path
) -> None:
    copy = tmp_path / "videos"
    shutil.copytree(video_folder, copy)
    (copy / "val" / "wave" / "w1.mp4").write_text("no video")
    made = config(dataset=str(copy), layers="-1")
    monkeypatch.setattr("vcache.pipelines.setup.wanted_views", lambda *asked: VIEWS)
    once = run_extraction(replaced(made, store=tmp_path / "once.zarr"))
    decoded_rows = len(decoded)
    assert (once.progress.videos_done, once.progress.failures) == (18, 1)
    assert once.progress.frames_done == 5 * (12 * 2 + 5 * 4)
    for views in (VIEWS[:1], VIEWS):  # view 0 first, the others added by another run
        monkeypatch.setattr("vcache.pipelines.setup.wanted_views", lambda *asked, views=views: views)
        decoded.clear()
        run_extraction(replaced(made, store=tmp_path / "twice.zarr"))
        assert len(decoded) <= decoded_rows
    assert contents(tmp_path / "once.zarr") == contents(tmp_path / "twice.zarr")
    with FeatureStore.open(tmp_path / "once.zarr") as store:
        assert store.manifest.facts["views"] == [view.to_dict() for view in VIEWS]
        assert (store.views("train"), store.views("val")) == ((0, 1), (0, 2, 3, 4))
        assert len(store.failures("val", view=3)) == 1
        left, right = (store.read("val", "crop", range(4), view=view) for view in (2, 4))
        assert (left[:, 1] < right[:, 1]).all()
        assert not np.array_equal(store.read("train", "tokens/2", [3]), store.read("train", "tokens/2", [3], view=1))


def replaced(made: ExtractionConfig, **fields: object) -> ExtractionConfig:
    from dataclasses import replace

    return replace(made, **fields)  # type: ignore[arg-type]


def test_a_view_is_mended_and_verified_from_its_definition(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(cross_frame="none", layers="-1")
    monkeypatch.setattr("vcache.pipelines.setup.wanted_views", lambda *asked: VIEWS)
    run_extraction(made)
    before = contents(made.store)
    shard = made.store / "train/view-1/tokens/2/c/0/0/0/0"
    shard.write_bytes(b"\x00" * shard.stat().st_size)
    (made.store / "val/view-3/embed/c/0/0/0").unlink()
    assert repair(made.store)["ok"]
    assert contents(made.store) == before
    result = verify(made.store, deep=12)
    assert (result["ok"], result["deep"]["equal_rows"]) == (True, 12)


def test_a_store_keeps_its_batch_size(config: MakeConfig) -> None:
    """The last bits of a row may depend on it."""
    run_extraction(config(layers="-1", batch_size=3))
    run_extraction(config(layers="-2:", batch_size=None))
    with pytest.raises(ExtractionError, match="--batch-size 5: .* was made with batches of 3 clips"):
        run_extraction(config(layers="all", batch_size=5))
    run_extraction(config(layers="all", batch_size=3))
    with FeatureStore.open(config().store) as store:
        assert store.manifest.facts["batch_size"] == 3
        assert verify(config().store, deep=4)["deep"]["equal_rows"] == 4


def test_every_batch_is_full_whoever_makes_it(
    config: MakeConfig, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 and 7 videos, one of them broken: the last of a shard, a retry, a layer that is added, and a row made again."""
    sizes, original = [], ClipExtractor.features

    def features(self: ClipExtractor, clips: Sequence[PreparedClip], names: Collection[str]) -> dict[str, torch.Tensor]:
        sizes.append(len(clips))
        return original(self, clips, names)

    monkeypatch.setattr(ClipExtractor, "features", features)
    copy = tmp_path / "videos"
    shutil.copytree(video_folder, copy)
    (copy / "train/jump/j1.mp4").write_bytes(b"")
    run_extraction(config(dataset=str(copy), layers="-1", batch_size=5))
    shutil.copy(video_folder / "train/jump/j1.mp4", copy / "train/jump/j1.mp4")
    made = config(dataset=str(copy), batch_size=None, retry_failed=True)
    assert run_extraction(made).failures == ()
    assert verify(made.store, deep=2)["deep"]["equal_rows"] == 2
    assert (set(sizes), len(sizes) > 10) == ({5}, True)


@pytest.fixture
def misbehaving(monkeypatch: pytest.MonkeyPatch, video_folder: Path, tmp_path: Path, decode_processes: None) -> Path:
    """A copy of the videos, and processes that do what the name of a video says; see tests/extract/misbehaving.py."""
    pool = decoding.DecodePool
    monkeypatch.setattr(decoding, "DecodePool", lambda workers, **options: pool(workers, decoder="misbehaving:decode"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "extract"))
    shutil.copytree(video_folder, tmp_path / "videos")
    return tmp_path / "videos"


def test_processes_decode_the_same_bytes_and_none_is_left(
    config: MakeConfig, tmp_path: Path, decode_processes: None
) -> None:
    """One process and three, which finish in another order."""
    before = children()
    for workers in (1, 3):
        run_extraction(config(store=tmp_path / f"{workers}.zarr", decode_workers=workers))
    assert contents(tmp_path / "1.zarr") == contents(tmp_path / "3.zarr")
    assert children() == before


def test_a_video_that_ends_its_process_costs_itself(config: MakeConfig, misbehaving: Path) -> None:
    (misbehaving / "val" / "jump" / "do.segfault.mp4").touch()
    before, made = children(), config(dataset=str(misbehaving), split=("val",))
    summary = run_extraction(made)
    (failure,) = summary.failures
    assert (failure.path, failure.kind) == ("val/jump/do.segfault.mp4", "worker_crash")
    assert summary.progress.videos_done == 7
    assert children() == before


def test_an_interruption_does_not_wait_for_a_video_that_hangs(config: MakeConfig, misbehaving: Path) -> None:
    (misbehaving / "val" / "wave" / "do.stop.mp4").touch()
    before, began = children(), time.monotonic()
    reports = iter(range(1))  # at the beginning, and then after the first batch

    def interrupt(progress: ExtractionProgress) -> None:
        if next(reports, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_extraction(config(dataset=str(misbehaving), split=("val",), batch_size=2), interrupt)
    assert time.monotonic() - began < 25  # its deadline is 30 s
    assert children() == before


def children() -> set[str]:
    """Processes of ours that are there."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= set((task / "children").read_text().split())
    return found
