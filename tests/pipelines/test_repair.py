"""vcache repair and verify --deep over real videos and a real backbone."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from store_files import flip, tree

from vcache.pipelines.cli import main
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.repairing import repair
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.verification import verify
from vcache.store.errors import StoreBusy
from vcache.store.layout import CRC_BYTES
from vcache.store.reader import FeatureStore
from vcache.store.writer import sole_writer

MakeConfig = Callable[..., ExtractionConfig]


STORES = [("qk", "float32"), ("derive", "float32"), ("qk", "int8")]


@pytest.fixture(scope="module", params=STORES, ids="-".join)
def whole(
    request: pytest.FixtureRequest, video_folder: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store in shards of 4 rows whose videos are in a folder of their own; one video is broken."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(video_folder, folder / "videos")
    (folder / "videos" / "train" / "jump" / "j1.mp4").write_bytes(b"")
    config = ExtractionConfig(
        dataset=str(folder / "videos"),
        layers="-1",
        frames=4,
        stride=3,
        model=f"local-dir:{tiny_clip}",
        pretrained=None,
        dtype=request.param[1],
        cross_frame=request.param[0],
        store=folder / "s.zarr",
        batch_size=3,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
        run_extraction(config)
    return folder / "s.zarr"


of_one_store = pytest.mark.parametrize("whole", STORES[:1], indirect=True, ids="-".join)
"""For what does not depend on the values that a store holds."""


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(whole, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def tokens(store: Path, shard: int) -> Path:
    return store / "train" / "view-0" / "tokens" / "2" / "c" / str(shard) / "0" / "0" / "0"


def record(store: Path, shard: int) -> Path:
    (path,) = store.glob(f"_commit/*/train-view-0-{shard}.json")
    return path


def chunk_step(store: Path) -> int:
    with FeatureStore.open(store) as opened:
        return opened.arrays("train")["tokens/2"].chunk_bytes + CRC_BYTES


def exchange(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "chunk": lambda store: flip(tokens(store, 1), 9),
    "index": lambda store: flip(tokens(store, 0), -9),
    "size": lambda store: os.truncate(tokens(store, 2), 700),
    "missing": lambda store: tokens(store, 1).unlink(),
    "unreadable": lambda store: (tokens(store, 1).unlink(), tokens(store, 1).mkdir()),
    "exchanged": lambda store: exchange(tokens(store, 0), tokens(store, 2)),
    "record": lambda store: flip(record(store, 1), 200),
    "record lost": lambda store: record(store, 1).write_bytes(b""),
    "array metadata": lambda store: (store / "train/view-0/embed/zarr.json").write_text("{"),
    "group metadata": lambda store: (store / "train/view-0/tokens/zarr.json").unlink(),
    "table": lambda store: flip(store / "train/path/c/0", 20),
    "manifest": lambda store: replace_text(store / "zarr.json", '"zarr_format": 3', '"zarr_format": 2'),
}


@pytest.mark.parametrize(
    ("whole", "kind"),
    [(STORES[0], kind) for kind in DAMAGES]
    # What a store holds matters only where values are made again.
    + [(made, kind) for made in STORES[1:] for kind in ("chunk", "exchanged")],
    indirect=["whole"],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_kind_of_damage_is_mended_by_the_printed_command(
    store: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(store)
    DAMAGES[kind](store)
    result = verify(store)
    assert {finding["kind"] for finding in result["findings"]} <= {kind.split()[-1], kind.split()[0], "size"}
    commands = {finding["message"].split("Mend it with:  ")[1] for finding in result["findings"]}
    assert len(commands) == 1
    monkeypatch.setattr(sys, "argv", shlex.split(commands.pop()))
    main_status(main)
    assert "is whole again" in " ".join(capsys.readouterr().out.split())
    assert verify(store)["ok"]
    assert tree(store) == before


def main_status(run: Callable[[], None]) -> None:
    with pytest.raises(SystemExit) as caught:
        run()
    assert not caught.value.code


@pytest.mark.parametrize("array", ["tokens", "tokens_scale", "q", "k", "q_scale", "k_scale", "cls"])
def test_each_array_is_mended_without_the_others(store: Path, array: str) -> None:
    if not (store / "train/view-0" / array).is_dir():
        pytest.skip("not in this store")
    before = tree(store)
    for path in (store / "train/view-0" / array).glob("2/c/1/**/0"):
        if path.is_file():
            flip(path, 3)
    result = repair(store)
    assert result["ok"], [left["reason"] for left in result["left"]]
    assert len(result["mended"]) == 1
    assert tree(store) == before


def test_channel_statistics_are_taken_again(store: Path) -> None:
    if not (store / "constants/tokens_mean").is_dir():
        pytest.skip("not a store of int8")
    before = tree(store)
    flip(store / "constants/tokens_mean/2/c/0", 1)
    shutil.rmtree(store / "constants/tokens_std/2")
    assert not verify(store)["ok"]
    assert repair(store)["ok"]
    assert tree(store) == before


def test_damaged_weights_of_a_store_that_derives_are_made_again(store: Path) -> None:
    before = tree(store)
    for constant in store.glob("constants/blocks/2/*/c/**/*"):
        if constant.is_file():
            flip(constant, 5)
    result = repair(store)
    assert result["ok"]
    assert tree(store) == before
    assert len(result["mended"]) == (4 if (store / "constants/blocks").exists() else 0)


def test_a_grown_split_is_mended_part_by_part(config: MakeConfig, video_folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(video_folder, videos)
    late = videos / "train" / "clap hands" / "c1.mp4"  # listed before most of those that are there at first
    late.rename(tmp_path / "late.mp4")
    made = config(dataset=str(videos))
    run_extraction(made)
    (tmp_path / "late.mp4").rename(late)
    run_extraction(made)
    before = tree(made.store)
    flip(made.store / "train+1" / "label" / "c" / "0", 2)
    flip(made.store / "train" / "path" / "c" / "0", 20)
    flip(made.store / "train+1" / "view-0" / "tokens" / "2" / "c" / "0" / "0" / "0" / "0", 5)
    assert repair(made.store)["ok"]
    assert tree(made.store) == before
    result = verify(made.store, deep=100)
    assert (result["ok"], result["deep"]["rows"], result["deep"]["equal_rows"]) == (True, 18, 18)


def test_only_the_videos_of_bad_rows_are_decoded(store: Path, decoded: list[str]) -> None:
    before, step = tree(store), chunk_step(store)
    flip(tokens(store, 0), 4 * step)  # row 1
    flip(store / "val/view-0/embed/c/0/0/0", 0)  # row 0
    result = repair(store)
    assert result["ok"]
    assert sorted(decoded) == ["c0.mp4", "c1.mp4"]
    assert (result["recomputed_rows"], len(result["mended"])) == (2, 2)
    assert tree(store) == before


def test_a_lost_array_comes_back_bit_for_bit_from_batches_of_the_same_size(store: Path) -> None:
    """float32, so that no rounding hides another order of sums; the last batches of the shards have other sizes."""
    before = tree(store)
    for path in [*store.glob("*/view-0/*/2/c"), *store.glob("*/view-0/embed/c"), *store.glob("*/view-0/*/0/c")]:
        shutil.rmtree(path)
    result = repair(store)
    assert result["ok"]
    assert tree(store) == before


@of_one_store
def test_a_store_made_elsewhere_is_repaired_only_where_the_key_comes_out_the_same(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(tokens(store, 0), 0)
    flip(tokens(store, 1), -9)  # needs no video
    before = tree(store)
    versions = {"decoder": "pyav", "av": "99.0", "libavcodec": "1", "libavformat": "1", "libswscale": "1"}
    monkeypatch.setattr("vcache.pipelines.setup.decoder_versions", lambda name: versions)
    result = repair(store)
    assert not result["ok"]
    (left,) = result["left"]
    assert "decoder.av: stored " in left["reason"]
    assert "now '99.0'" in left["reason"]
    assert len(result["mended"]) == 1
    assert tree(store)[str(tokens(store, 0).relative_to(store))] == before[str(tokens(store, 0).relative_to(store))]


@of_one_store
def test_moved_videos_are_found_with_root(store: Path, whole: Path) -> None:
    before = tree(store)
    flip(tokens(store, 0), 0)
    videos, moved = whole.with_name("videos"), whole.with_name("moved")
    videos.rename(moved)
    try:
        result = repair(store)
        assert "Say where they are with --root FOLDER" in result["left"][0]["reason"]
        assert repair(store, root=moved)["ok"]
    finally:
        moved.rename(videos)
    assert tree(store) == before


@of_one_store
def test_a_busy_store_and_a_dry_run(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(tokens(store, 0), 0)
    before = tree(store)
    with sole_writer(store):
        with pytest.raises(StoreBusy, match="another process"):
            repair(store)
        monkeypatch.setattr(sys, "argv", ["vcache", "repair", str(store), "--dry-run", "--json"])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["recomputed_rows"], result["mended"], len(result["left"])) == (1, [], 1)
    assert tree(store) == before


def test_deep_finds_nothing_in_a_sound_store(whole: Path) -> None:
    result = verify(whole, deep=100)
    assert result["ok"]
    assert (result["deep"]["rows"], result["deep"]["equal_rows"]) == (17, 17)
    assert {"tokens", "cls", "embed", "frame_index", "crop", "flip"} <= result["deep"]["arrays"].keys()


@of_one_store
def test_deep_takes_as_many_rows_as_asked_and_others_with_another_seed(whole: Path, decoded: list[str]) -> None:
    picks = []
    for seed in (0, 0, 1):
        decoded.clear()
        assert verify(whole, deep=4, seed=seed)["deep"]["rows"] == 4
        picks.append(sorted(decoded))
    assert picks[0] == picks[1] != picks[2]


def test_deep_finds_another_video_under_the_same_name_and_says_which(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(whole.with_name("videos"), videos)
    shutil.copy(videos / "val/wave/w0.mp4", videos / "val/wave/w1.mp4")
    (videos / "train/clap hands/c1.mp4").unlink()
    result = verify(whole, deep=100, root=videos)
    assert not result["ok"]
    (finding,) = result["findings"]
    assert (finding["kind"], finding["split"], finding["rows"]) == ("differs", "val", (5,))
    assert "(video 'val/wave/w1" in finding["message"] or "w1" in finding["video_ids"][0]
    assert "Another video lies at val/wave/w1.mp4 now" in finding["message"]
    (note,) = result["notes"]
    assert note["kind"] == "gone"
    assert "c1.mp4 cannot be read (missing" in note["message"]
    monkeypatch.setattr(
        sys, "argv", ["vcache", "verify", str(whole), "--deep", "--root", str(videos), "--sample", "99"]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "16 random rows extracted again, 15 equal bit for bit" in capsys.readouterr().out


@of_one_store
def test_deep_names_other_weights_and_compares_nothing(whole: Path, tiny_clip: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    weights = tiny_clip / "open_clip_model.safetensors"
    shutil.copy(weights, backup)
    try:
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        result = verify(whole, deep=3)
    finally:
        shutil.copy(backup, weights)
    (finding,) = result["findings"]
    assert finding["kind"] == "spec"
    assert "weights_sha256 was " in finding["message"]
    assert result["deep"]["rows"] == 0


@of_one_store
def test_deep_names_another_decoder_and_compares_all_the_same(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.decoder_versions", lambda name: {"decoder": "pyav", "av": "99.0"})
    result = verify(whole, deep=3)
    assert result["ok"]
    assert result["deep"]["equal_rows"] == 3
    assert any("decoder.av was " in note["message"] and note["kind"] == "versions" for note in result["notes"])


@of_one_store
def test_deep_that_can_check_nothing_is_not_ok(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root, words in ((tmp_path / "empty", "none of 3 random rows"), (tmp_path / "none", "are not in")):
        result = verify(whole, deep=3, root=root)
        assert not result["ok"]
        assert [finding["kind"] for finding in result["findings"]] == ["unchecked"]
        assert words in result["findings"][0]["message"]


def test_a_change_of_one_value_that_no_checksum_shows_is_found_deep(store: Path) -> None:
    """Written with its checksums, record and all, by somebody's script: only the video tells."""
    from vcache.store.commits import read_commit
    from vcache.store.mend_shard import ShardMender

    class Liar:
        def recompute(self, split, view, rows, arrays):  # type: ignore[no-untyped-def]
            with FeatureStore.open(store) as opened:
                for row in rows:
                    values = {spec.name: opened.read(split, spec.name, [row])[0] for spec in arrays}
                    values["cls/2"][0, 5] += 0.5
                    yield row, values

    with FeatureStore.open(store) as opened:
        mender = ShardMender(opened, read_commit(record(store, 0)), record(store, 0), Liar())  # type: ignore[arg-type]
        mender.look(["cls/2"])
        mender.mend({"cls/2": {1}})
    assert verify(store)["ok"]
    (finding,) = verify(store, deep=100)["findings"]
    assert (finding["kind"], finding["rows"]) == ("differs", (1,))
    assert "cls/2 by " in finding["message"]
