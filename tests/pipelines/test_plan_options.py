"""`vcache plan` with every option of `extract`: bytes, files, decodes and forward passes are those of the extraction."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from vcache.extract.video import DecodedVideo, DecodeRequest
from vcache.pipelines import decoding
from vcache.pipelines.batches import COMPUTED, ClipExtractor
from vcache.pipelines.console import duration, size
from vcache.pipelines.extraction import run_extraction, run_extractions
from vcache.pipelines.measuring import measure_decoding
from vcache.pipelines.plan import plan_extraction
from vcache.pipelines.plan_screen import describe_plan, print_plan
from vcache.pipelines.planning import ExtractionPlan
from vcache.pipelines.progress import STAGES
from vcache.pipelines.request import ExtractionConfig, ExtractionError, per_model
from vcache.pipelines.setup import prepare_extractions
from vcache.store.layout import ArraySpec
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]


class Counted:
    """What an extraction really does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded, self.clips = 0, 0
        decode, start = decoding.decode_video, ClipExtractor.start

        def counted_decode(request: DecodeRequest) -> DecodedVideo:
            self.decoded += 1
            return decode(request)

        def counted_start(extractor: ClipExtractor, slots: list[object], arrays: tuple[ArraySpec, ...]) -> object:
            computed = any(spec.name.split("/")[0] in COMPUTED for spec in arrays)
            self.clips += len(slots) if computed else 0
            return start(extractor, slots, arrays)  # type: ignore[arg-type]

        monkeypatch.setattr(decoding, "decode_video", counted_decode)
        monkeypatch.setattr(ClipExtractor, "start", counted_start)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def shard_files(stores: list[Path]) -> list[Path]:
    return [file for store in stores for file in store.glob("*/view-*/**/c/**/*") if file.is_file()]


def stored_bytes(stores: list[Path]) -> int:
    """Of the shard files, and of the frozen weights that `derive` reads."""
    weights = 0
    with ExitStack() as stack:
        for path in stores:
            store = stack.enter_context(FeatureStore.open(path))
            derived = [name for name in store.manifest.constants if not name.startswith(("tokens_", "block_input_"))]
            weights += sum(store.constant(name).nbytes for name in derived)
    return weights + sum(file.stat().st_size for file in shard_files(stores))


def check_against_the_extraction(asked: ExtractionConfig, counted: Counted) -> ExtractionPlan:
    """Plan, extract, compare; float32, so that no calibration decodes and computes beside the extraction."""
    plan = plan_extraction(asked, seconds=None)
    counted.decoded = counted.clips = 0
    run_extractions(per_model(asked))
    stores = [store.path for store in plan.stores]
    assert plan.asked.total_bytes == plan.asked.missing_bytes == stored_bytes(stores)
    assert plan.asked.missing_files == len(shard_files(stores))
    if asked.dtype == "float32":
        assert (plan.asked.missing_videos, sum(plan.asked.missing_clips)) == (counted.decoded, counted.clips)
    again = plan_extraction(asked, seconds=None).asked
    assert (again.missing_bytes, again.missing_files, again.missing_videos) == (0, 0, 0)
    assert again.total_bytes == plan.asked.total_bytes
    return plan


@pytest.mark.parametrize(
    "options",
    [
        {"views": 3, "eval_views": "2x3", "pixels": 10, "cross_frame": "none"},
        {"views": 2, "augment": "aim", "cross_frame": "maps"},
        {"eval_views": "3x1", "dtype": "int8", "cross_frame": "derive"},
        {"pixels": 15, "dtype": "bfloat16", "precision": "bfloat16"},
        {"dtype": "int8", "cross_frame": "maps", "views": 2, "split": ("train",)},
        {"frames": 1, "cross_frame": "none", "layers": "all", "batch_size": 7, "tsn": True, "stride": 16},
        {"dtype": "float16", "cross_frame": "derive", "preprocess": "exact", "batch_size": None},
    ],
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
)
def test_sizes_and_work_are_those_of_the_extraction(
    config: MakeConfig,
    counted: Counted,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 5)  # 12 and 6 videos: full shards and a rest
    check_against_the_extraction(config(**options), counted)


def second_model(tiny_clip: Path, folder: Path) -> str:
    """The same architecture with other weights: a model of its own to the key."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in tiny_clip.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (weights,) = folder.glob("*.safetensors")
    save_file({name: value * 1.001 for name, value in load_file(weights).items()}, weights)
    return f"local-dir:{folder}"


def test_of_two_models_each_video_is_decoded_once_and_each_store_counts(
    config: MakeConfig, counted: Counted, tiny_clip: Path, tmp_path: Path, home: Path
) -> None:
    other = second_model(tiny_clip, tmp_path / "other_clip")
    asked = config(store=None, more_models=((other, None),), views=2, eval_views="1x3", pixels=5)
    plan = check_against_the_extraction(asked, counted)
    assert len({store.path for store in plan.stores}) == 2
    assert plan.asked.missing_videos == 18
    assert plan.asked.missing_clips[0] == plan.asked.missing_clips[1] > 18
    alone = plan_extraction(replace(asked, more_models=()), seconds=None)
    assert (alone.asked.missing_bytes, alone.asked.total_bytes * 2) == (0, plan.asked.total_bytes)


def test_of_two_models_one_of_which_is_stored_the_other_counts(
    config: MakeConfig, counted: Counted, tiny_clip: Path, tmp_path: Path, home: Path
) -> None:
    asked = config(store=None)
    run_extraction(asked)
    both = replace(asked, more_models=((second_model(tiny_clip, tmp_path / "other_clip"), None),))
    plan = plan_extraction(both, seconds=None)
    assert plan.asked.missing_bytes * 2 == plan.asked.total_bytes
    assert (plan.asked.missing_videos, plan.asked.missing_clips[0]) == (18, 0)
    counted.decoded = counted.clips = 0
    run_extractions(per_model(both))
    assert (counted.decoded, counted.clips) == (18, plan.asked.missing_clips[1])


def test_pixels_that_are_added_need_no_forward_pass(config: MakeConfig, counted: Counted) -> None:
    run_extraction(config())
    plan = plan_extraction(config(pixels=5), seconds=None)
    counted.decoded = counted.clips = 0
    run_extraction(config(pixels=5))
    assert (plan.asked.missing_videos, plan.asked.missing_clips) == (18, (0,)) == (counted.decoded, (counted.clips,))


def test_views_that_are_added_are_what_is_missing(config: MakeConfig, counted: Counted) -> None:
    asked = config(cross_frame="none")
    run_extraction(asked)
    before = stored_bytes([asked.store])
    more = replace(asked, views=3, eval_views="1x3")
    plan = plan_extraction(more, seconds=None)
    assert plan.views == {"train": 3, "val": 4}
    counted.decoded = counted.clips = 0
    run_extraction(more)
    assert plan.asked.missing_bytes == stored_bytes([asked.store]) - before
    assert (plan.asked.missing_videos, plan.asked.missing_clips) == (counted.decoded, (counted.clips,))


def test_segments_are_rows_of_their_own(
    config: MakeConfig, counted: Counted, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    root = tmp_path / "kitchen"
    write_video(root / "P01" / "videos" / "P01_01.MP4", num_frames=40)
    columns = "narration_id,participant_id,video_id,start_frame,stop_frame,verb_class,noun_class"
    rows = [f"P01_01_{i},P01,P01_01,{start},{start + 8},0,{i % 2}" for i, start in enumerate((1, 5, 12, 20, 30))]
    (root / "EPIC_100_train.csv").write_text("\n".join([columns, *rows]) + "\n")
    (root / "EPIC_100_validation.csv").write_text(f"{columns}\nP01_01_9,P01,P01_01,10,14,1,1\n")
    (root / "EPIC_100_verb_classes.csv").write_text("id,key\n0,take\n1,put\n")
    (root / "EPIC_100_noun_classes.csv").write_text("id,key\n0,tap\n1,pan\n")
    plan = check_against_the_extraction(config(dataset="epic-kitchens-100", root=root), counted)
    assert plan.splits == {"train": 5, "val": 1}


def test_folders_of_frames_are_read_by_their_own_decoder(config: MakeConfig, counted: Counted, tmp_path: Path) -> None:
    for name in "abc":
        folder = tmp_path / "frames" / name
        folder.mkdir(parents=True)
        for number in range(1, 7):
            Image.new("RGB", (40, 32), (9 * number, 0, 0)).save(folder / f"img_{number:05}.jpg")
    (tmp_path / "frames" / "train.txt").write_text("a 6 0\nb 6 1\nc 6 0\n")
    plan = check_against_the_extraction(config(dataset=str(tmp_path / "frames" / "train.txt")), counted)
    assert plan.decoder == "images"


def test_another_decoder_is_planned_with(config: MakeConfig, counted: Counted) -> None:
    pytest.importorskip("decord")
    assert check_against_the_extraction(config(decoder="decord", split=("val",)), counted).decoder == "decord"


def test_shares_of_several_processes_add_up(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 5)
    asked = config(views=2, cross_frame="none")
    whole = plan_extraction(asked, seconds=None).asked
    parts = [plan_extraction(replace(asked, part=(i, 3)), seconds=None) for i in (1, 2, 3)]
    for name in ("missing_bytes", "missing_files", "missing_videos"):
        assert sum(getattr(plan.asked, name) for plan in parts) == getattr(whole, name)
    assert {plan.asked.needed_bytes for plan in parts} == {whole.needed_bytes}
    run_extraction(replace(asked, part=(2, 3)))
    assert stored_bytes([asked.store]) == parts[1].asked.missing_bytes
    left = [plan_extraction(replace(asked, part=(i, 3)), seconds=None).asked.missing_bytes for i in (1, 2, 3)]
    assert left == [parts[0].asked.missing_bytes, 0, parts[2].asked.missing_bytes]


def test_videos_that_failed_before_are_told_of(
    config: MakeConfig, video_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(video_folder, broken)
    next((broken / "train").rglob("*.mp4")).write_bytes(b"no video")
    asked = config(dataset=str(broken), max_failures=1.0)
    run_extraction(asked)
    plan = plan_extraction(replace(asked, retry_failed=True), seconds=None)
    assert [store.to_retry for store in plan.stores] == [1]
    print_plan(plan)
    assert "1 video that failed before will be tried again" in capsys.readouterr().out
    assert plan_extraction(asked, seconds=None).stores[0].to_retry == 0


def test_another_batch_size_than_the_store_has_is_refused(config: MakeConfig) -> None:
    run_extraction(config(batch_size=3))
    with pytest.raises(ExtractionError, match="--batch-size 4"):
        plan_extraction(config(batch_size=4), seconds=None)


def test_decoding_is_measured_with_all_views_and_with_one(config: MakeConfig, tiny_clip: Path, tmp_path: Path) -> None:
    """Decoding takes its time once; what comes after it grows with the views. A batch of clips of each model is kept."""
    other = second_model(tiny_clip, tmp_path / "other_clip")
    asked = config(store=None, views=4, eval_views="4x1", more_models=((other, None),), augment="aim")
    setups = prepare_extractions(per_model(asked))
    requests: list[int] = []

    def decode(request: DecodeRequest) -> DecodedVideo:
        requests.append(len(request.clips))
        return decoding.decode_here(request)

    sample = measure_decoding(setups, decode, seconds=60.0)
    assert sample.num_decoded == 18 and set(requests) == {4, 5}
    assert len(requests) == 18 + 2  # and one to start each process
    assert 0 < sample.seconds_per_view < sample.seconds_per_video
    assert [len(clips) for clips in sample.clips] == [3, 3]
    for setup, clips in zip(setups, sample.clips, strict=True):
        video = next(
            v for v in setup.dataset.videos if torch.equal(setup.extractor().prepare(v).images, clips[0].images)
        )
        assert video in setup.dataset.videos


def test_the_processes_of_the_extraction_are_what_is_measured(config: MakeConfig, decode_processes: None) -> None:
    plan = plan_extraction(config(decode_workers=1), seconds=0.5)
    assert plan.rates is not None and plan.rates.num_sampled >= 1


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screen_is_no_wider_than_80_columns(
    config: MakeConfig,
    tiny_clip: Path,
    tmp_path: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    """Paths aside, which are as long as they are; and the table is never cut."""
    monkeypatch.setattr("vcache.pipelines.plan_screen.out", Console(width=columns))
    other = second_model(tiny_clip, tmp_path / "other_clip")
    asked = config(store=None, views=3, eval_views="3x1", more_models=((other, None),), dtype="float16")
    plan = plan_extraction(asked, seconds=0.6)
    print_plan(plan)
    shown = capsys.readouterr().out
    table, _, advice = shown.partition("It ")
    lines = [line.rstrip() for line in table.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80 and max(map(len, advice.splitlines())) <= columns
    assert "\u2026" not in shown
    assert "views of each video: 3 (train), 4 (val)" in shown
    expected = plan.forecast(plan.asked)
    assert expected is not None and list(expected.video_seconds) == list(STAGES)
    words = ", ".join(f"{name} {duration(seconds)}" for name, seconds in expected.video_seconds.items())
    assert words in shown
    assert f"18 videos; limited by {expected.limit}" in shown
    assert size(plan.asked.video_bytes) in shown
    assert [store["path"] for store in describe_plan(plan)["stores"]] == [str(store.path) for store in plan.stores]
