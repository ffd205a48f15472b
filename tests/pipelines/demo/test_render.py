"""The rendered world: the same files whoever renders them, a CSV that loads, and no surprise in a folder that is full."""

import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vcache.extract.datasets.registry import load_dataset
from vcache.pipelines.demo.motions import MOTIONS, UnknownName, draw_clip, random_clip
from vcache.pipelines.demo.render import CLASSES, World, WorldMismatch, clip_frames, main, render_world, write_video
from vcache.pipelines.demo.stills import COMBINATIONS, HELD_OUT, SEEN, appearance, combination_name


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def digests(folder: Path) -> dict[str, str]:
    """Of the decoded frames; the bytes of a file are its encoder's business."""
    files = sorted(folder.rglob("*.mp4"))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(decoded(file)).hexdigest() for file in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    render_world(folder, train=13, val=11, num_processes=1)
    return folder


def test_the_csv_is_a_dataset_with_the_motions_as_classes(world: Path) -> None:
    dataset = load_dataset(str(world / "world.csv"), root=None, splits=None)
    assert set(dataset.class_names) == set(MOTIONS)
    assert [len(dataset.split(name)) for name in ("train", "val")] == [13, 11]
    for video in dataset.videos:
        assert (world / video.path).is_file()
        assert dataset.class_names[video.label].replace(" ", "_") == Path(video.path).parent.name


def test_the_files_hold_what_was_drawn(world: Path) -> None:
    drawn = clip_frames(World(train=13, val=11, level="easy", seed=0, codec=""), "val", 10).numpy()
    shown = decoded(world / "val/moves_right/00010.mp4")
    assert shown.shape == drawn.shape == (24, 72, 96, 3)
    assert np.abs(shown.astype(int) - drawn).mean() < 6  # of 255: the encoder's loss, mostly of the grain


def test_a_world_of_appearance_is_labelled_by_colour_and_shape(tmp_path: Path) -> None:
    csv = render_world(tmp_path, train=3, val=2, labels="appearance", num_processes=1)
    dataset = load_dataset(str(csv), root=None, splits=None)
    names = {combination_name(pair).split(" ", 1)[1] for pair in COMBINATIONS[:3]}
    assert set(dataset.class_names) == names == {"red circle", "orange circle", "yellow circle"}
    for video in dataset.videos:
        assert (tmp_path / video.path).is_file()
        assert dataset.class_names[video.label].replace(" ", "_") == Path(video.path).parent.name


def test_the_64_appearances_are_those_that_the_tiny_clip_saw_and_did_not_see() -> None:
    assert len(set(CLASSES["appearance"])) == 64
    held_out, seen = ({appearance(pair) for pair in pairs} for pairs in (HELD_OUT, SEEN))
    assert len(held_out) == 16
    assert held_out.isdisjoint(seen)
    assert held_out | seen == set(CLASSES["appearance"])


@pytest.mark.parametrize("index", [5, 69])
def test_of_a_world_of_appearance_the_label_says_what_is_drawn_and_chance_how_it_moves(index: int) -> None:
    world = World(train=1, val=1, level="easy", seed=3, codec="", labels="appearance")
    rng = np.random.default_rng([3, 0, index])
    motion = MOTIONS[int(rng.integers(len(MOTIONS)))]
    drawn = draw_clip(random_clip(rng, motion, COMBINATIONS[5], level="easy", num_frames=24))
    assert torch.equal(clip_frames(world, "train", index), drawn)


def test_the_world_of_motion_is_drawn_as_before_there_were_labels() -> None:
    rng = np.random.default_rng([0, 1, 10])
    combination = COMBINATIONS[int(rng.integers(len(COMBINATIONS)))]
    drawn = draw_clip(random_clip(rng, "moves right", combination, level="easy", num_frames=24))
    assert torch.equal(clip_frames(World(train=13, val=11, level="easy", seed=0, codec=""), "val", 10), drawn)


def test_two_other_processes_render_the_same_frames(world: Path, tmp_path: Path) -> None:
    """Through the pool of spawned workers: x264's usual settings, for one, differ from process to process."""
    render_world(tmp_path / "again", train=13, val=11, num_processes=2)
    assert digests(tmp_path / "again") == digests(world)
    assert len(set(digests(world).values())) == 24


def test_clips_do_not_depend_on_the_number_of_threads() -> None:
    world = World(train=1, val=1, level="hard", seed=6, codec="")
    first = clip_frames(world, "train", 7)
    torch.set_num_threads(2)
    assert torch.equal(first, clip_frames(world, "train", 7))


def test_a_finished_world_is_used_again_and_what_was_removed_comes_back(world: Path) -> None:
    calls: list[tuple[int, int]] = []
    before = digests(world)
    lost = world / "train/moves_left/00001.mp4"
    kept = (world / "train/moves_right/00000.mp4").stat()
    lost.unlink()
    render_world(world, train=13, val=11, num_processes=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(23, 24), (24, 24)]
    assert digests(world) == before
    assert (world / "train/moves_right/00000.mp4").stat().st_mtime_ns == kept.st_mtime_ns


def test_a_world_grows_by_the_clips_that_it_lacks(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path), "--train", "4", "--val", "1"])
    assert capsys.readouterr().out == (
        f"{tmp_path}  train 4, val 1 videos of 10 classes; listed in {tmp_path / 'world.csv'}\n"
    )
    stays = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    main([str(tmp_path), "--train", "13", "--val", "11"])
    assert len(stays) == 5
    assert {path: path.stat().st_mtime_ns for path in stays} == stays
    assert digests(tmp_path) == digests(world)
    assert (tmp_path / "world.csv").read_text() == (world / "world.csv").read_text()
    with pytest.raises(SystemExit, match="holds a world of moving shapes with train 13 instead of 12, "):
        main([str(tmp_path), "--train", "12", "--val", "12"])


def test_other_parameters_in_the_same_folder_are_refused(world: Path) -> None:
    before = (world / "world.json").read_text()
    with pytest.raises(WorldMismatch) as refused:
        render_world(world, train=13, val=12, level="hard")
    assert "with val 11 instead of 12, level easy instead of hard." in str(refused.value)
    assert f"rm -r {world}" in str(refused.value)
    assert (world / "world.json").read_text() == before


def test_a_folder_of_before_there_were_labels_is_a_world_of_motion(tmp_path: Path) -> None:
    render_world(tmp_path, train=1, val=0, num_processes=1)
    parameters = json.loads((tmp_path / "world.json").read_text())
    assert parameters.pop("labels") == "motion"
    (tmp_path / "world.json").write_text(json.dumps(parameters))
    there = (tmp_path / "train/moves_right/00000.mp4").stat()
    render_world(tmp_path, train=1, val=0, num_processes=1)
    assert (tmp_path / "train/moves_right/00000.mp4").stat().st_mtime_ns == there.st_mtime_ns
    with pytest.raises(WorldMismatch, match="with labels motion instead of appearance"):
        render_world(tmp_path, train=1, val=0, labels="appearance")


def test_an_interrupted_rendering_is_done_again_since_its_parameters_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "train/moves_right").mkdir(parents=True)
    (tmp_path / "train/moves_right/00000.mp4").write_bytes(b"of another world")
    render_world(tmp_path, train=1, val=0, num_processes=1)
    assert len(decoded(tmp_path / "train/moves_right/00000.mp4")) == 24
    assert json.loads((tmp_path / "world.json").read_text())["train"] == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_an_error_in_a_worker_is_raised_here_and_leaves_no_marker(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val/grows").write_text("in the way")
    with pytest.raises(OSError, match="grows"):
        render_world(tmp_path, train=0, val=20, num_processes=2)
    assert not (tmp_path / "world.json").exists()


def test_an_unknown_level_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="the levels are easy, hard"):
        render_world(tmp_path / "new", level="medium")
    assert not (tmp_path / "new").exists()


def test_unknown_labels_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="the labels are motion, appearance"):
        render_world(tmp_path / "new", labels="size")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_both_codecs_are_true_to_the_frames_and_stable(codec: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    frames = clip_frames(World(train=1, val=0, level="easy", seed=2, codec=codec), "train", 3)
    for name in ("first.mp4", "again.mp4"):
        write_video(tmp_path / name, frames, codec=codec)
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert np.abs(decoded(tmp_path / "first.mp4").astype(int) - frames.numpy()).mean() < 8
