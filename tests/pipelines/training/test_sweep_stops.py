"""A sweep that is stopped at an inconvenient moment goes on from there, and says how."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stops import stop_after
from viewed import CLS, fill_view, viewed_store

from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.runs import Run
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.group import TrainingEvents
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_file import read_sweep
from vcache.pipelines.training.sweep_plan import InvalidMembers, plan_sweep
from vcache.pipelines.training.sweep_spec import SweepMember


@pytest.fixture
def fixed(float32_store: Path) -> dict[str, str]:
    return {"epochs": "3", "batch_size": "5", "device": "cpu", "store": str(float32_store)}


def stopped(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, num_batches: int) -> str:
    """What is said of it."""
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped) as caught:
        stop_after(patch, num_batches)
        run_sweep(sweep)
    return str(caught.value)


def begin(members: tuple[SweepMember, ...], out: Path, **options: object) -> Sweep:
    return Sweep.create(out, plan_sweep(members, **options))  # type: ignore[arg-type]


def weights(sweep: Sweep, member: SweepMember) -> dict[str, torch.Tensor]:
    return load_file(sweep.path / member.folder / "head.safetensors")


@pytest.mark.parametrize("num_batches", [1, 2, 3, 4])
def test_a_sweep_stopped_as_a_head_fails_goes_on_where_it_was(
    fixed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_batches: int
) -> None:
    """One head is lost at the second batch: it is not waited for, and the others do not begin anew."""
    members = read_sweep("linear", fixed, {"lr": ("1e-3", "1e30", "1e-2")})
    whole, sweep = begin(members, tmp_path / "whole"), begin(members, tmp_path / "sweep")
    run_sweep(whole)
    stopped(sweep, monkeypatch, num_batches)
    first_batches, epoch = [], ClipLoader.epoch

    def recorded(self: ClipLoader, number: int, *, first_batch: int = 0, **options: object) -> object:
        first_batches.append(number * len(self) + first_batch)
        return epoch(self, number, first_batch=first_batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ClipLoader, "epoch", recorded)
    summary = run_sweep(Sweep.open(sweep.path), TrainingEvents(), resume=True)
    assert first_batches[0] == num_batches
    assert [result.status for result in summary.results] == ["finished", "failed", "finished"]
    for member in (members[0], members[2]):
        torch.testing.assert_close(weights(sweep, member), weights(whole, member), rtol=0, atol=0)


@pytest.mark.parametrize("together", [1, 2])
def test_a_stopped_sweep_names_the_command_that_goes_on_with_all_of_it(
    fixed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Also where its group has one head: the run of that head alone would leave the others."""
    sweep = begin(read_sweep("linear", fixed, {"lr": ("1e-3", "1e-2")}), tmp_path / "sweep", together=together)
    assert stopped(sweep, monkeypatch, 2).endswith(f"Go on with:  vcache resume {sweep.path}")


def test_a_recipe_that_a_head_cannot_have_is_said_before_anything_runs_and_stops_no_other(
    fixed: dict[str, str], tmp_path: Path
) -> None:
    """Linear reads no patches to cut; a pattern of EVL's names fits none of its parameters."""
    (tmp_path / "s.toml").write_text("[common]\ncutmix = 0.5\n[[head]]\nhead='linear'\n[[head]]\nhead='evl'\ndepth=1")
    members = read_sweep(str(tmp_path / "s.toml"), {**fixed, "epochs": "1"}, {})
    with pytest.raises(InvalidMembers, match="linear:\n    cutmix .0.5. pastes patches, and LinearHead"):
        plan_sweep(members)
    sweep = begin(members, tmp_path / "sweep", skip_invalid=True)
    assert [result.status for result in run_sweep(sweep).results] == ["finished"]


def test_a_device_for_one_head_alone_is_refused(fixed: dict[str, str], tmp_path: Path) -> None:
    """It would have been that of the first for all."""
    (tmp_path / "s.toml").write_text("[[head]]\nhead='linear'\n[[head]]\nhead='evl'\ndevice='cuda'")
    with pytest.raises(SettingError, match="device is the same for all heads of a sweep"):
        read_sweep(str(tmp_path / "s.toml"), {name: value for name, value in fixed.items() if name != "device"}, {})


CLS_1 = replace(CLS, name="cls/1")


@pytest.fixture
def unlike_layers(tmp_path: Path) -> Path:
    """Of one layer a video less can be read than of the other."""
    with viewed_store(tmp_path / "s.zarr", held={"train": (0,), "val": (0,)}, definitions=()) as store:
        fill_view(store, "train", 0, (CLS_1,), failed={("train", 0, 3)})
        fill_view(store, "val", 0, (CLS_1,))
    return tmp_path / "s.zarr"


def test_heads_that_find_other_videos_readable_are_groups_of_their_own(
    fixed: dict[str, str], unlike_layers: Path, tmp_path: Path
) -> None:
    """Together they would be refused, and neither trained."""
    members = read_sweep("linear", {**fixed, "store": str(unlike_layers), "epochs": "1"}, {"layer": ("2", "1")})
    sweep = begin(members, tmp_path / "sweep")
    assert sweep.plan.groups == (("layer=2",), ("layer=1",))
    assert "share batches only with the same readable videos" in " ".join(sweep.plan.lines)
    assert [result.status for result in run_sweep(sweep).results] == ["finished", "finished"]
    numbers = [Run.open(sweep.path / member.folder).config["num_train"] for member in members]
    assert numbers == [12, 11]


def test_a_layer_that_is_still_being_extracted_is_said_before_anything_runs(
    fixed: dict[str, str], tmp_path: Path
) -> None:
    with viewed_store(tmp_path / "s.zarr", held={"train": (0,), "val": (0,)}, definitions=()) as store:
        fill_view(store, "train", 0, (CLS_1,), missing={("train", 0, 1)})
        fill_view(store, "val", 0, (CLS_1,))
    members = read_sweep("linear", {**fixed, "store": str(tmp_path / "s.zarr")}, {"layer": ("2", "1")})
    with pytest.raises(
        InvalidMembers, match="layer=1:\n    5 of 12 videos of split 'train' in s.zarr are not extracted yet"
    ):
        plan_sweep(members)
    assert [member.name for member in plan_sweep(members, skip_invalid=True).members] == ["layer=2"]
