"""The command line as a user meets it: the two commands, the help, the errors, the JSON."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from vcache.pipelines import console
from vcache.pipelines.cli import app
from vcache.pipelines.progress import ExtractionProgress
from vcache.store.commits import RowFailure

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def python(code: str) -> str:
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


def printed_command(err: str) -> str:
    """What follows `vcache` in the command that an error message ends in."""
    return next(line for line in err.splitlines() if "with:  vcache extract" in line).split("with:  vcache ")[1]


def test_help_loads_neither_torch_nor_zarr() -> None:
    loaded = python(
        "import sys; sys.argv = ['vcache', '--help']\n"
        "from vcache.pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', [name for name in ('torch', 'zarr', 'open_clip', 'av', 'numpy') if name in sys.modules])"
    )
    assert "extract" in loaded
    assert loaded.splitlines()[-1] == "LOADED []"


def test_the_check_above_can_fail() -> None:
    assert "torch" in python(
        "import sys, vcache.heads.linear; print([n for n in ('torch', 'zarr') if n in sys.modules])"
    )


def test_help_groups_every_command_by_what_it_is_about() -> None:
    output = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["--help"]).output
    panels = re.findall(r"^╭─ ([\w ]+) ─", output, flags=re.MULTILINE)
    assert panels == ["Options", "Features", "Heads", "Runs", "Stores", "This machine"]
    assert set(COMMANDS) <= set(re.findall(r"^│ ([a-z-]+) +\S", output, flags=re.MULTILINE))


def test_help_flows_at_80_columns_and_each_example_has_a_line() -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["verify", "--help"])
    lines = [line.strip() for line in result.output.splitlines()]
    assert "vcache verify STORE.zarr --deep --sample 100" in lines and "Examples:" in lines
    assert "found, too: another video under the same name, other weights." in " ".join(lines)
    paragraph = lines[lines.index("With --deep, stored features that are not what their videos and the backbone") :]
    assert all(len(line) > 50 for line in paragraph[: paragraph.index("") - 1])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(name: str) -> None:
    assert f"vcache {name}" in (COMMANDS[name].help or "").split("Example:")[-1]
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


def test_a_sweep_takes_every_option_of_train_head() -> None:
    of_head, of_sweep = (
        {parameter.name: parameter for parameter in COMMANDS[name].params} for name in ("train-head", "sweep")
    )
    assert of_head.keys() - of_sweep.keys() == {"head", "seed"}
    shared = of_head.keys() - {"head", "seed", "out", "settings", "as_json"}
    assert {of_sweep[name].help for name in shared} == {of_head[name].help for name in shared}


def test_the_two_commands_letter_by_letter(
    vcache: Callable[[str], tuple[int, str, str]],
    video_folder: Path,
    tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`vcache extract k400 --layers -4:` needs K400 and OpenAI's weights; the data is in miniature, the model is named."""
    k400 = tmp_path / "data" / "k400"
    rows = {"train": [], "val": []}
    for i, path in enumerate(sorted(video_folder.rglob("*.mp4"))):
        split, label = path.relative_to(video_folder).parts[:2]
        name = f"{i:011d}"
        rows[split].append(f"{label},{name},3,13,{split}")
        (k400 / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, k400 / split / f"{name}_000003_000013.mp4")
    for split, lines in rows.items():
        (k400 / f"{split}.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *lines]) + "\n")
    monkeypatch.setenv("VCACHE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    status, out, err = vcache(f"extract k400 --layers -3: --model local-dir:{tiny_clip}")
    assert status == 0, err
    assert "train 12, val 6 videos; 18 extracted now, 0 already there" in out
    status, out, err = vcache("train-head evl --epochs 1 --batch-size 4 --set layers=-3:")
    assert status == 0, err
    assert "runs/evl-1" in out
    status, out, _ = vcache("eval runs/evl-1 --json")
    assert (status, json.loads(out)["num_videos"]) == (0, 6)


def test_the_printed_command_mends_what_was_missing(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """A head asks for more than the store holds; the command in the error is run as printed; then the head trains."""
    store = tmp_path / "a store.zarr"
    made = f"--frames 4 --stride 2 --model local-dir:{tiny_clip} --cross-frame none --store {shlex.quote(str(store))}"
    assert vcache(f"extract {video_folder} --layers -1 {made}")[0] == 0
    train = f"train-head evl --epochs 1 --set layers=-2: --store {shlex.quote(str(store))} --out {tmp_path / 'run'}"
    status, _, err = vcache(train)
    assert status == 1
    assert (
        "reads tokens of layers 1-2, Q/K of layers 1-2; split 'train' of a store.zarr holds tokens of layers 2" in err
    )
    command = printed_command(err)
    assert vcache(command)[0] == 0
    status, _, err = vcache(train)
    assert status == 0, err


def test_a_store_of_maps_is_completed_with_maps(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    store = tmp_path / "maps.zarr"
    made = f"--frames 4 --stride 2 --model local-dir:{tiny_clip} --cross-frame maps --store {store}"
    assert vcache(f"extract {video_folder} --layers -1 {made}")[0] == 0
    train = f"train-head evl --epochs 1 --store {store} --out"
    assert vcache(f"{train} {tmp_path / 'one'} --set layers=-1:")[0] == 0
    status, _, err = vcache(f"{train} {tmp_path / 'two'} --set layers=-2:")
    assert status == 1
    assert "reads tokens of layers 1-2, maps of layers 1-2; split 'train' of maps.zarr holds tokens of layers 2" in err
    command = printed_command(err)
    assert "--cross-frame maps" in command
    assert vcache(command)[0] == 0
    assert vcache(f"{train} {tmp_path / 'two'} --set layers=-2:")[0] == 0
    assert json.loads(vcache(f"ls {tmp_path} --json")[1])[0]["cross_frame"] == "maps"


def test_another_number_of_frames_is_mended_by_the_printed_command(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    assert vcache(f"extract {video_folder} --layers -1 --frames 4 --model local-dir:{tiny_clip}")[0] == 0
    train = f"train-head evl --epochs 1 --set layers=-1: --set num_frames=3 --out {tmp_path / 'run'}"
    status, _, err = vcache(train)
    assert status == 1
    assert "reads clips of 3 frames" in err
    command = printed_command(err)
    assert vcache(command)[0] == 0
    assert vcache(train)[0] == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("extract k40", "k400"),
        ("extract k400", "--root"),
        ("extract {folder} --layers 9: --model local-dir:{clip}", "3 blocks"),
        ("extract {folder} --model local-dir:{folder}", "open_clip_config.json"),
        ("extract {folder} --model ViT-B-16-quickgelu --pretrained {folder}/none.pt", "none.pt"),
        ("extract {folder} --dtype int3", "float16"),
        ("extract {folder} --split tain --model local-dir:{clip}", "train, val"),
        ("train-head evil", "evl"),
        ("train-head evl", "vcache extract"),
        ("train-head evl --store nowhere.zarr", "nowhere.zarr"),
        ("train-head evl --set lr", "name=value"),
        ("train-head evl --set shots=0", "shots (0) must be at least 1"),
        ("eval nowhere", "not a run folder"),
        ("info nowhere.zarr", "nowhere.zarr"),
        ("info {folder}", "not a vcache store"),
        ("extract {folder} --layers -1 --model local-dir:{clip} --store {folder}", "not a vcache store"),
        ("extract {folder} --val-fraction 1 --model local-dir:{clip}", "--val-fraction 1: a share"),
        ("extract {folder} --model local-dir:{clip} --failures {folder}", "Name a file, as {folder}/failures.jsonl"),
        (
            "extract {folder} --model local-dir:{clip} --failures /proc/none/f.jsonl",
            "--failures /proc/none/f.jsonl: no file can",
        ),
        ("extract {folder} --device cuda:99 --model local-dir:{clip}", "--device"),
    ],
)
def test_every_error_is_a_sentence_without_a_traceback(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, line: str, words: str
) -> None:
    status, _, err = vcache(line.format(folder=video_folder, clip=tiny_clip))
    assert status == 1
    message = err[err.index("error:") :]
    assert words.format(folder=video_folder) in message
    assert "Traceback" not in err
    assert "not an error vcache foresaw" not in err


def test_too_many_failures_are_listed_and_the_status_says_so(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(video_folder, copy)
    for name in ("j1", "j2"):
        (copy / "train" / "jump" / f"{name}.mp4").write_bytes(b"")
    line = f"extract {copy} --layers -1 --model local-dir:{tiny_clip} --store {tmp_path / 's.zarr'}"
    status, out, err = vcache(line)
    assert status == 1
    assert "2 of 18 videos failed" in out
    assert "train/jump/j1.mp4" in out
    assert "more than --max-failures 0.01 allows" in err
    assert vcache(f"{line} --max-failures 0.2")[0] == 0


def test_listings_speak_json_and_tables(
    vcache: Callable[[str], tuple[int, str, str]], float32_store: Path, tmp_path: Path
) -> None:
    info = json.loads(vcache(f"info {float32_store} --json")[1])
    assert info["splits"]["train"]["arrays"]["tokens/2"] == {
        "shape": [5, 17, 48],
        "dims": ["frame", "token", "channel"],
        "dtype": "float32",
        "stored": 12,
        "failed": 0,
    }
    assert "tokens/2" in vcache(f"info {float32_store}")[1]
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "tiny.zarr").symlink_to(float32_store)
    shutil.copytree(float32_store, tmp_path / "damaged.zarr")
    next((tmp_path / "damaged.zarr" / "_commit").rglob("train-*.json")).write_text("{")
    rows = {Path(row["path"]).name: row for row in json.loads(vcache(f"ls {tmp_path} --json")[1])}
    assert "damaged" in rows["damaged.zarr"]["error"]
    assert rows["tiny.zarr"]["layers"] == [1, 2]
    assert "error" in rows["broken.zarr"]
    assert "tiny.zarr" in vcache(f"ls {tmp_path}")[1]
    assert "no stores in" in vcache("ls")[1]
    assert {row["head"] for row in json.loads(vcache("heads --json")[1])} >= {"linear", "evl"}
    assert "tca_gain=1.0" in vcache("heads")[1]
    assert {row["dataset"] for row in json.loads(vcache("datasets --json")[1])} >= {"k400"}
    assert "youtube_id" in vcache("datasets")[1]


def test_brackets_in_names_are_no_markup(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """yt-dlp writes "title [id].mp4"; "[/id]" would end the run with an error of the screen."""
    videos = tmp_path / "set [red]"
    shutil.copytree(video_folder, videos)
    (videos / "train" / "jump" / "clip [bold].mp4").write_bytes(b"")
    (videos / "train" / "odd [").mkdir()
    (videos / "train" / "odd [" / "i].mp4").write_bytes(b"")
    line = f"extract {shlex.quote(str(videos))} --layers -1 --model local-dir:{tiny_clip} --max-failures 1"
    status, out, err = vcache(line)
    assert status == 0, err
    assert "train/jump/clip [bold].mp4" in out
    assert "train/odd [/i].mp4" in out
    assert "18 extracted now, 0 already there" in out
    assert "set [red]" in err
    store = next((tmp_path / "vcache-home").glob("*.zarr"))
    assert "set [red]" in vcache("ls")[1]
    assert vcache(f"info {shlex.quote(str(store))}")[1].count("set [red]") == 2
    run = tmp_path / "run [x]"
    _, out, err = vcache(f"train-head linear --epochs 1 --out {shlex.quote(str(run))}")
    assert store.name in err
    assert f"vcache eval '{run}'" in out


def test_adding_layers_after_a_video_broke_leaves_the_older_layers_whole(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    copy, store = tmp_path / "copy", tmp_path / "s.zarr"
    shutil.copytree(video_folder, copy)
    made = f"--model local-dir:{tiny_clip} --store {store}"
    assert vcache(f"extract {copy} --layers -1 --split 'train, val' {made}")[0] == 0
    (copy / "train" / "jump" / "j1.mp4").write_bytes(b"")
    assert vcache(f"extract {copy} --layers -2: {made}")[0] == 0
    arrays = json.loads(vcache(f"info {store} --json")[1])["splits"]["train"]["arrays"]
    assert (arrays["tokens/2"]["stored"], arrays["tokens/2"]["failed"]) == (12, 0)
    assert (arrays["tokens/1"]["stored"], arrays["tokens/1"]["failed"]) == (11, 1)
    table = vcache(f"info {store}")[1]
    assert "of 11" not in table
    assert "of 12" not in table


def test_the_printed_command_keeps_out_splits_that_were_left_out(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """Also where only one of the splits lacks what the head reads."""
    copy, store = tmp_path / "copy", tmp_path / "s.zarr"
    shutil.copytree(video_folder, copy)
    shutil.copytree(copy / "val", copy / "test")
    made = f"--tsn --frames 3 --model local-dir:{tiny_clip} --store {store}"
    assert vcache(f"extract {copy} --layers -2: --split train {made}")[0] == 0
    assert vcache(f"extract {copy} --layers -1 --split val {made}")[0] == 0
    train = f"train-head evl --epochs 1 --set layers=-2: --store {store} --out {tmp_path / 'run'}"
    status, _, err = vcache(train)
    assert status == 1
    assert "split 'val' of s.zarr holds tokens of layers 2, cls of layers 2, Q/K of layers 2, the embedding" in err
    command = printed_command(err)
    assert "--split train,val" in command
    assert vcache(command)[0] == 0
    assert vcache(train)[0] == 0
    assert list(json.loads(vcache(f"info {store} --json")[1])["splits"]) == ["train", "val"]


def test_an_interrupted_extraction_says_what_is_kept(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vcache.pipelines.extraction.run_extractions", interrupted)
    status, _, err = vcache(f"extract {video_folder}")
    assert status == 130
    assert "the same command goes on from there" in err


@pytest.mark.parametrize("line", ["extract {folder} --decode-workers 0", "train-head linear --seed -1"])
def test_numbers_out_of_range_are_a_usage_error(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, line: str
) -> None:
    status, _, err = vcache(line.format(folder=video_folder))
    assert status == 2
    assert "greater than or equal" in err or "not in the range" in err


def test_verify_finds_damage_and_what_it_says_mends_it(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    extract = f"extract {video_folder} --layers -1 --model local-dir:{tiny_clip} --store {store}"
    assert vcache(extract)[0] == 0
    status, out, _ = vcache(f"verify {store}")
    assert status == 0
    assert "is whole: 18 rows (0 failed) in 2 shards" in out
    shard = next((store / "train/view-0/tokens/2/c").rglob("0/0/0/0"))
    before = shard.read_bytes()
    shard.write_bytes(before[:999] + bytes([before[999] ^ 1]) + before[1000:])
    status, out, _ = vcache(f"verify {store} --json")
    assert status == 1
    (finding,) = json.loads(out)["findings"]
    assert (finding["kind"], finding["split"], finding["array"], finding["rows"]) == ("chunk", "train", "tokens/2", [0])
    status, out, _ = vcache(finding["message"].split("Mend it with:  vcache ")[1])
    assert status == 0
    assert "is whole again: 1 mended (1 row from their videos, 11 rows copied)" in out
    assert shard.read_bytes() == before
    assert vcache(f"verify {store}")[0] == 0


def test_the_extraction_says_in_80_columns_what_it_does_and_what_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), width=80, force_terminal=True)
    monkeypatch.setattr(console, "err", screen)
    limits = {"decode": 0.83, "device": 0.15, "disk": 0.02}
    with console.extraction_screen("k400") as drawn:
        drawn.stage("loading ViT-B-32")
        drawn.progress(ExtractionProgress(videos_total=240000))
        drawn.progress(
            ExtractionProgress(
                videos_total=240000, videos_done=5, bytes_written=10**11, failures=1, recent_limits=limits
            )
        )
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())  # type: ignore[attr-defined]
    assert "loading ViT-B-32 ..." in text
    assert "5/240000" in text
    assert "100 GB written, 1 failed, limited by decode 83% (device 15%, disk 2%)" in text


def drawn_in(monkeypatch: pytest.MonkeyPatch, *states: ExtractionProgress, title: str = "k400", terminal: bool) -> str:
    screen = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    monkeypatch.setattr(console, "err", screen)
    with console.extraction_screen(title) as drawn:
        for state in states:
            drawn.progress(state)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())  # type: ignore[attr-defined]


def test_the_count_of_videos_is_whole_at_80_columns_whatever_the_dataset_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = ExtractionProgress(videos_total=260000, videos_done=123456, frames_done=8 * 123456)
    text = drawn_in(monkeypatch, state, title="a-folder-with-a-long-name-of-its-own", terminal=True)
    line = text.strip().splitlines()[-2]
    assert line.startswith("a-folder-with-a… ")
    assert " 123456/260000 " in line
    assert " videos/s " in line
    assert len(line) <= 80


def test_a_file_gets_a_line_of_progress_every_minute_and_no_bar_is_drawn_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [ExtractionProgress(videos_total=7, videos_done=done) for done in (2, 3)]
    assert drawn_in(monkeypatch, *states, terminal=False).count("videos") == 1, "the bar, once, at the end"
    monkeypatch.setattr(console, "LOG_SECONDS", 0)
    lines = drawn_in(monkeypatch, *states, terminal=False).splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["k400: 2/7 videos", "k400: 3/7 videos"]
    assert drawn_in(monkeypatch, ExtractionProgress(videos_skipped=7), terminal=False) == ""


def test_verify_says_what_is_not_extracted_yet_and_takes_temporary_files_together(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    extract = f"extract {video_folder} --layers -1 --cross-frame none --model local-dir:{tiny_clip} --store {store}"
    assert vcache(extract)[0] == 0
    assert "not extracted yet" not in vcache(f"verify {store}")[1]
    for record in (store / "_commit").glob("*/val-*.json"):
        record.unlink()
    for array in ("flip", "crop"):
        (store / f"val/view-0/{array}/.0.0123456789ab.tmp").write_bytes(b"half")
    status, out, _ = vcache(f"verify {store}")
    assert status == 0
    assert "  val: 6 rows not extracted yet; the `vcache extract` command that made the store goes on with them" in out
    assert "train: " not in out
    assert (
        out.count("temporary") == 1 and "note  2 temporary files: an extraction is writing them, or was killed." in out
    )
    assert json.loads(vcache(f"verify {store} --json")[1])["missing_rows"] == {"val": 6}


def test_two_models_share_the_bytes_that_are_written(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_clip, other)
    status, out, _ = vcache(
        f"extract {video_folder} --layers -1 --cross-frame none --model local-dir:{tiny_clip} --model local-dir:{other}"
    )
    assert status == 0
    assert out.count("18 extracted now") == out.count("written to 2 stores") == 2


def test_a_failed_segment_is_named_beside_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    from vcache.pipelines.extraction import ExtractionSummary

    failures = (
        RowFailure(2, "P01_01_3", "P01/P01_01.MP4", "frame_count", "too short"),
        RowFailure(3, "clip", "a/clip [x].mp4", "empty", "no bytes"),
    )
    summary = ExtractionSummary(
        store="s.zarr", key="k", layers=(), splits={"train": 5}, progress=ExtractionProgress(), failures=failures
    )
    console.print_failures(summary)
    out = capsys.readouterr().out
    assert "P01_01_3 of P01/P01_01.MP4" in out
    assert " a/clip [x].mp4 " in out


@pytest.mark.parametrize("command", ["heads", "explain", "datasets", "ls"])
def test_the_usage_line_brackets_an_optional_argument_once(
    vcache: Callable[[str], tuple[int, str, str]], command: str
) -> None:
    status, printed, _ = vcache(f"{command} --help")
    usage = next(line for line in printed.splitlines() if "Usage:" in line)
    assert status == 0 and usage.rstrip().endswith("]") and "[[" not in usage
