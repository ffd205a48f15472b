"""Checkpoints: whole or not there, and damage is noticed."""

import json
from pathlib import Path

import pytest
import torch

from vcache.pipelines.runs import RunError
from vcache.pipelines.training.checkpoints import Checkpoint, Checkpoints, common_number


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {"head/weight": torch.randn(3, 5, generator=generator), "random": torch.arange(7, dtype=torch.uint8)}
    return Checkpoint(step, tensors, {"epoch": step // 4, "sums": {"loss": 0.1 + step}})


def test_a_checkpoint_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    saved, checkpoints = checkpoint(6), Checkpoints(tmp_path)
    checkpoints.save(saved)
    loaded = checkpoints.load(6)
    assert loaded.number == 6 and loaded.facts == saved.facts
    torch.testing.assert_close(dict(loaded.tensors), dict(saved.tensors), rtol=0, atol=0)


def test_a_kill_between_the_two_files_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(1))
    checkpoints.save(checkpoint(2))
    (tmp_path / "checkpoint" / "00000002.json").rename(tmp_path / "checkpoint" / "00000002.json.part")
    assert checkpoints.numbers() == [1]
    checkpoints.save(checkpoint(2))
    checkpoints.keep_only(2)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "00000002.json",
        "00000002.safetensors",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other"])
def test_damaged_tensors_are_refused(tmp_path: Path, damage: str) -> None:
    checkpoints, path = Checkpoints(tmp_path), tmp_path / "checkpoint" / "00000003.safetensors"
    checkpoints.save(checkpoint(3))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 4
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "gone":
        path.unlink()
    else:
        checkpoints.save(checkpoint(4))
        path.write_bytes((tmp_path / "checkpoint" / "00000004.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"00000003.safetensors is damaged"):
        checkpoints.load(3)


def test_heads_go_on_from_the_last_step_that_all_of_them_have(tmp_path: Path) -> None:
    runs = [Checkpoints(tmp_path / name) for name in "abc"]
    for run, steps in zip(runs, [(4, 8), (4, 8, 12), (4, 8)], strict=True):
        run.folder.parent.mkdir()
        for step in steps:
            run.save(checkpoint(step))
    assert common_number(runs) == 8
    runs[2].delete()
    assert common_number(runs) == 0
    assert json.loads((tmp_path / "a" / "checkpoint" / "00000004.json").read_text())["epoch"] == 1
