"""`vcache plan` on real videos: its sizes are the extraction's, its refusals too, and it leaves nothing behind."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from vcache.extract.sampling import ClipRule
from vcache.extract.spec import DTYPES
from vcache.extract.video import DecodedVideo, DecodeRequest, VideoError
from vcache.extract.weights import BackboneError
from vcache.pipelines import measuring
from vcache.pipelines.cli import app
from vcache.pipelines.console import duration
from vcache.pipelines.decoding import decode_here
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.growth import DatasetChanged
from vcache.pipelines.measuring import MeasuringError, measure_decoding, measure_disk
from vcache.pipelines.plan import plan_extraction
from vcache.pipelines.plan_screen import describe_plan, print_plan
from vcache.pipelines.request import CROSS_FRAME, ExtractionConfig
from vcache.pipelines.setup import prepare_extraction
from vcache.store.errors import StoreKeyMismatch, UnsupportedFormat
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]


def files_under(path: Path) -> list[Path]:
    return sorted(path.rglob("*"))


def test_the_plan_of_what_was_asked_is_what_the_extraction_then_writes(config: MakeConfig, tmp_path: Path) -> None:
    asked = config(store=tmp_path / "deep" / "er" / "s.zarr")
    plan = plan_extraction(asked, seconds=None)
    assert not (tmp_path / "deep").exists()
    run_extraction(asked)
    with FeatureStore.open(asked.store) as store:
        assert plan.asked.missing_bytes == plan.asked.total_bytes == store.size_bytes()
    shard_files = [path for path in asked.store.glob("*/view-*/**/c/**/*") if path.is_file()]
    assert plan.asked.missing_files == len(shard_files)
    assert (plan.asked.missing_videos, plan.num_videos) == (18, 18)
    assert plan.free_folder == tmp_path
    again = plan_extraction(asked, seconds=None)
    assert (again.asked.missing_bytes, again.asked.missing_files, again.asked.missing_videos) == (0, 0, 0)
    assert again.asked.total_bytes == plan.asked.total_bytes


def test_every_choice_is_listed_and_of_a_store_that_is_there_only_the_rest_counts(config: MakeConfig) -> None:
    run_extraction(config(cross_frame="none"))
    before = files_under(config().store)
    plan = plan_extraction(config(cross_frame="qk"), seconds=None)
    by_name = {(choice.dtype, choice.cross_frame): choice for choice in plan.choices}
    assert {cross_frame for _, cross_frame in by_name} == set(CROSS_FRAME)
    assert [key for key, choice in by_name.items() if choice.asked] == [("float32", "qk")]
    none, qk, half = by_name["float32", "none"], by_name["float32", "qk"], by_name["float16", "none"]
    assert none.missing_bytes == 0
    assert qk.missing_bytes == qk.total_bytes - none.total_bytes
    assert half.missing_bytes == half.total_bytes  # another key, so a store of its own
    assert files_under(config().store) == before


def test_maps_of_one_frame_are_no_choice(config: MakeConfig) -> None:
    plan = plan_extraction(config(frames=1), seconds=None)
    assert "maps" not in {choice.cross_frame for choice in plan.choices}


def test_the_machine_is_measured_and_nothing_is_left(config: MakeConfig, tmp_path: Path) -> None:
    stages: list[str] = []
    before = files_under(tmp_path)
    plan = plan_extraction(config(), seconds=1.0, on_stage=stages.append)
    assert files_under(tmp_path) == before
    assert [stage.split()[0] for stage in stages] == ["listing", "loading", "looking", "decoding", "running", "writing"]
    rates = plan.rates
    assert rates is not None
    assert rates.shared_cores
    assert 0 < rates.num_sampled <= 18 and rates.num_failed == 0  # a busy machine measures fewer in its second
    assert 1e-5 < rates.decode_seconds < 5
    assert 1e-5 < rates.view_decode_seconds <= rates.decode_seconds
    assert len(rates.forward_seconds) == 1 and 1e-5 < rates.forward_seconds[0] < 5
    assert 0 < rates.write_cores <= 1
    assert 1e5 < rates.write_bytes_per_second < 1e12
    assert 1e5 < rates.read_bytes_per_second < 1e12


def test_decoding_is_measured_at_the_speed_it_has(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that takes 20 ms on each of 4 threads gives a video every 5 ms; one of six of them broken."""
    setup = prepare_extraction(config(decode_workers=4))
    broken = {setup.dataset.root / video.path for video in setup.dataset.videos[::6]}
    rule = ClipRule(sampling=setup.config.sampling)
    decoded = decode_here(setup.extractor().request(setup.dataset.videos[1], (rule,)))

    def decode(request: DecodeRequest) -> DecodedVideo:
        time.sleep(0.02)
        if request.path in broken:
            raise VideoError("truncated", "the file ends early")
        return decoded

    sample = measure_decoding([setup], decode, seconds=5.0)
    assert (sample.num_decoded, sample.num_failed, [len(clips) for clips in sample.clips]) == (15, 3, [3])
    assert 0.005 <= sample.seconds_per_video < 0.015


def test_a_sample_ends_with_its_time_and_has_a_video_at_least(config: MakeConfig) -> None:
    setup = prepare_extraction(config(decode_workers=1))
    assert measure_decoding([setup], decode_here, seconds=0.0).num_decoded == 1


def test_the_disk_is_measured_at_the_speed_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync that takes a quarter of a second bounds the rate of the 4 MB before it."""
    monkeypatch.setattr(measuring.os, "fsync", lambda fd: time.sleep(0.25))
    disk = measure_disk(tmp_path, 1000, seconds=0.0)
    assert 4e6 < disk.write_bytes_per_second < 4 * 2**20 / 0.25
    assert 0 < disk.write_cores < 0.5  # asleep most of the time
    assert disk.read_bytes_per_second > 0
    assert files_under(tmp_path) == []


def test_what_cannot_be_measured_says_why(config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "x.mp4").write_bytes(b"")
    with pytest.raises(MeasuringError, match=r"none of 1 videos .* a/x.mp4: empty: .*--quick"):
        plan_extraction(config(dataset=str(tmp_path / "bad")), seconds=1.0)
    monkeypatch.setattr(measuring, "free_bytes", lambda path: 1000)
    with pytest.raises(MeasuringError, match="is full.*--store"):
        measure_disk(tmp_path, 1000, seconds=1.0)


def test_what_the_extraction_refuses_the_plan_refuses(config: MakeConfig, video_folder: Path, tmp_path: Path) -> None:
    run_extraction(config())
    with pytest.raises(StoreKeyMismatch, match=r"preprocessing\.mode"):
        plan_extraction(config(preprocess="exact"), seconds=None)
    copy = tmp_path / "copy"
    shutil.copytree(video_folder, copy)
    (copy / "val" / "wave" / "w1.mp4").unlink()
    with pytest.raises(DatasetChanged, match="no longer lists 1 of the 6 videos"):
        plan_extraction(config(dataset=str(copy)), seconds=None)
    with pytest.raises(UnsupportedFormat, match="not a vcache store"):
        plan_extraction(config(store=tmp_path / "copy"), seconds=None)
    with pytest.raises(BackboneError, match=r"none\.pt"):
        plan_extraction(config(model="ViT-B-16", pretrained=str(tmp_path / "none.pt")), seconds=None)


def test_a_damaged_store_of_another_choice_does_not_stand_in_the_way(config: MakeConfig) -> None:
    """Without --store each dtype has a store of its own."""
    asked = config(store=None)
    other = prepare_extraction(replace(asked, dtype="float16")).path
    other.mkdir(parents=True)
    (other / "zarr.json").write_text("{")
    assert plan_extraction(asked, seconds=None).asked.missing_bytes > 0


def test_what_does_not_fit_is_said_and_not_refused(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vcache.pipelines.plan.free_bytes", lambda path: 10**6)
    plan = plan_extraction(config(), seconds=None)
    print_plan(plan)
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "name another disk with --store" in " ".join(shown.split())
    assert not describe_plan(plan)["asked"]["fits"]


def test_the_screen_and_the_json_say_the_same(
    config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_extraction(config(), seconds=1.0)
    told = json.loads(json.dumps(describe_plan(plan)))
    print_plan(plan)
    shown = capsys.readouterr().out
    forecast = told["asked"]["forecast"]
    for seconds in (forecast["extraction_seconds"], forecast["video_epoch_seconds"], forecast["store_epoch_seconds"]):
        assert duration(seconds) in shown
    assert f"limited by {forecast['limit']}" in shown
    assert " ".join(told["recommendation"].split()) in " ".join(shown.split())
    lines = (line.split() for line in shown.splitlines())
    rows = [words for words in lines if words and (words[0] in DTYPES or words[0] == ">")]
    assert [tuple(row[row[0] == ">" :][:2]) for row in rows] == [
        (c["dtype"], c["cross_frame"]) for c in told["choices"]
    ]
    assert [tuple(row[1:3]) for row in rows if row[0] == ">"] == [("float32", "qk")]
    assert [choice["asked"] for choice in told["choices"]].count(True) == 1


def test_the_command_prints_nothing_but_json_where_that_is_asked(
    config: MakeConfig, video_folder: Path, tmp_path: Path
) -> None:
    words = ["plan", str(video_folder), "--model", config().model, "--store", str(tmp_path / "new.zarr"), "--layers=-1"]
    result = CliRunner().invoke(app, [*words, "--quick", "--json"])
    told = json.loads(result.stdout)
    assert (result.exit_code, told["stores"][0]["layers"], told["rates"], told["asked"]["fits"]) == (0, [2], None, True)
    shown = CliRunner().invoke(app, [*words, "--seconds", "1"]).stdout
    assert "measured here:" in shown
    assert not (tmp_path / "new.zarr").exists()


def test_plan_takes_every_option_of_extract_with_the_same_default() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    extract, plan = ({p.name: p for p in commands[name].params} for name in ("extract", "plan"))
    assert set(plan) - set(extract) == {"seconds", "quick"}
    assert set(extract) <= set(plan)
    assert all(
        (p.opts, p.default, p.help) == (plan[name].opts, plan[name].default, plan[name].help)
        for name, p in extract.items()
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.00291, "2.9 ms"),
        (0.453, "453 ms"),
        (3.14, "3.1 s"),
        (89.0, "89 s"),
        (91.0, "1.5 min"),
        (5399.0, "90 min"),
        (5400.0, "1.5 h"),
        (86400.0, "24 h"),
        (200_000.0, "2.3 days"),
    ],
)
def test_times_are_in_the_unit_a_person_would_use(seconds: float, words: str) -> None:
    assert duration(seconds) == words
