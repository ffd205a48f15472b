"""vcache sweep: each head becomes what it would be alone, failures stay its own, and a stopped sweep goes on."""

import csv
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vcache.heads import registry
from vcache.heads.linear import LinearHead
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.training.group import TrainingEvents
from vcache.pipelines.training.preparation import open_training_store, prepare_head
from vcache.pipelines.training.reports import EpochReport
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_file import read_sweep, read_sweep_file
from vcache.pipelines.training.sweep_plan import InvalidMembers, SweepPlan, demand_of, plan_sweep
from vcache.pipelines.training.sweep_spec import SweepMember, expand
from vcache.pipelines.training.train_head import train_head

VCache = Callable[..., tuple[int, str, str]]
SHORT = {"epochs": "2", "batch_size": "5", "device": "cpu", "checkpoint_minutes": "0"}


@pytest.fixture
def fixed(float32_store: Path) -> dict[str, str]:
    """Settings of a short sweep on the store of 12 and 6 videos."""
    return {**SHORT, "store": str(float32_store)}


@pytest.fixture
def breaking_head() -> Iterator[str]:
    """A head that fails in its third forward pass."""

    class Breaking(LinearHead):
        calls = 0

        def forward(self, features: ClipFeatures) -> torch.Tensor:
            Breaking.calls += 1
            if Breaking.calls == 3:
                raise RuntimeError("no kernel for this")
            return super().forward(features)

    registry.register_head("breaking")(Breaking)
    yield "breaking"
    del registry._HEADS["breaking"]


def begin(members: tuple[SweepMember, ...], out: Path, **options: object) -> Sweep:
    return Sweep.create(out, plan_sweep(members, **options))  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "head.safetensors")


def trained_alone(member: SweepMember, out: Path) -> dict[str, torch.Tensor]:
    train_head(replace(member.config, out=out))
    return weights(out)


def statuses(out: Path) -> dict[str, str]:
    with (out / "results.csv").open() as file:
        return {Path(row["run"]).name: row["status"] for row in csv.DictReader(file)}


MIXED = """
[[head]]
head = "evl"
grid = { depth = [1, 2] }
seeds = 2
epochs = 3
[[head]]
head = "evl"
set = { depth = 1, temporal_cross_attention = false, lr = 1e-3 }
[[head]]
head = "linear"
grid = { lr = [1e-3, 1e-2] }
"""


def test_each_head_of_a_sweep_is_bit_for_bit_what_it_is_alone(fixed: dict[str, str], tmp_path: Path) -> None:
    """Of other kinds, depths, rates, seeds and lengths, on one stream."""
    (tmp_path / "mixed.toml").write_text(MIXED)
    common = {name: value for name, value in fixed.items() if name != "epochs"}
    blocks = read_sweep_file(tmp_path / "mixed.toml", common)
    members = expand([replace(block, settings={"epochs": "2", **block.settings}) for block in blocks])
    sweep = begin(members, tmp_path / "sweep")
    assert len(sweep.plan.groups) == 1 and len(members) == 7
    summary = run_sweep(sweep)
    assert [result.status for result in summary.results] == ["finished"] * 7
    for member in members:
        alone = trained_alone(member, tmp_path / "alone" / member.folder)
        torch.testing.assert_close(weights(sweep.path / member.folder), alone, rtol=0, atol=0)
        best = load_file(tmp_path / "alone" / member.folder / "best.safetensors")
        torch.testing.assert_close(load_file(sweep.path / member.folder / "best.safetensors"), best, rtol=0, atol=0)
    assert len({str(weights(sweep.path / member.folder)) for member in members}) == 7


def test_what_several_heads_read_is_read_once(fixed: dict[str, str], tmp_path: Path) -> None:
    """Eight of the deepest head read what one does, and those that need less read nothing more."""
    settings = {**fixed, "resident": "disk"}
    alone = read_sweep("evl", {**settings, "depth": "2"}, {})[0]
    train_head(replace(alone.config, out=tmp_path / "alone"))
    one = Run.open(tmp_path / "alone").metrics()
    sweep = begin(read_sweep("evl", settings, {"depth": ("1", "2")}, 4), tmp_path / "sweep")
    assert len(sweep.plan.members) == 8
    for result in run_sweep(sweep).results:
        epochs = Run.open(Path(result.run)).metrics()
        assert [epoch["read_bytes"] for epoch in epochs] == [epoch["read_bytes"] for epoch in one]
        assert epochs[0]["read_bytes"] > 0


def test_the_bytes_of_a_batch_are_those_that_are_read(fixed: dict[str, str], tmp_path: Path) -> None:
    (member,) = read_sweep("evl", {**fixed, "depth": "1", "resident": "disk"}, {})
    with open_training_store(member.config) as store:
        demand = demand_of(member.name, prepare_head(member.config, store, torch.device("cpu")), store.manifest)
    train_head(replace(member.config, out=tmp_path / "run"))
    run = Run.open(tmp_path / "run")
    assert sum(demand.arrays.values()) * 12 == run.metrics()[0]["read_bytes"] * 5  # a batch of 5 of 12 videos
    assert demand.num_parameters == sum(p.numel() for p in run.load_head().parameters())
    tokens = demand.features["tokens/2"]
    width, num_frames = run.config["head_config"]["width"], run.config["head_config"]["num_frames"]
    num_tokens = 1 + run.config["head_config"]["grid"][0] * run.config["head_config"]["grid"][1]
    assert tokens == 5 * num_frames * num_tokens * width * 4


def test_the_results_are_those_of_the_runs(fixed: dict[str, str], tmp_path: Path) -> None:
    members = read_sweep("linear", fixed, {"lr": ("1e-3", "1e-2")}, 2)
    summary = run_sweep(begin(members, tmp_path / "sweep"))
    for result in summary.results:
        metrics, last = evaluate_run(Path(result.run), device="cpu"), Run.open(Path(result.run)).metrics()[-1]
        assert result.metrics["top1"] == metrics.top1 == last["val_top1"]
        assert result.metrics["loss"] == pytest.approx(metrics.loss, rel=1e-5)
        assert result.parameters == sum(p.numel() for p in Run.open(Path(result.run)).load_head().parameters())
        assert result.epochs == 2 and result.best_epoch in (0, 1)
    assert json.loads(json.dumps(summary.to_json()))["settings"][0]["num_done"] == 2


def test_heads_of_other_batches_are_groups_of_their_own(fixed: dict[str, str], tmp_path: Path) -> None:
    settings = {name: value for name, value in fixed.items() if name != "batch_size"}
    members = read_sweep("linear", settings, {"batch_size": ("4", "5")}, 2)
    heard: list[str] = []
    sweep = begin(members, tmp_path / "sweep")
    run_sweep(sweep, TrainingEvents(on_plan=lambda plan: heard.append(plan.group)))
    assert heard == ["group 1 of 2", "group 2 of 2"]
    assert sweep.plan.groups == (
        ("batch_size=4 seed=0", "batch_size=4 seed=1"),
        ("batch_size=5 seed=0", "batch_size=5 seed=1"),
    )
    assert set(statuses(sweep.path).values()) == {"finished"}
    alone = trained_alone(members[0], tmp_path / "alone")
    torch.testing.assert_close(weights(sweep.path / members[0].folder), alone, rtol=0, atol=0)


@pytest.mark.parametrize("together", [None, 1])
def test_a_head_that_diverges_does_not_stop_or_change_the_others(
    fixed: dict[str, str], tmp_path: Path, together: int | None
) -> None:
    members = read_sweep("linear", {**fixed, "epochs": "3"}, {"lr": ("1e-3", "1e30", "1e-2")})
    sweep = begin(members, tmp_path / "sweep", together=together)
    summary = run_sweep(sweep)
    assert [result.status for result in summary.results] == ["finished", "failed", "finished"]
    assert "the loss is nan" in (summary.results[1].error or "")
    assert "failed: lr=1e30 seed=0: the loss is nan" in (sweep.path / "results.md").read_text()
    for member in (members[0], members[2]):
        alone = trained_alone(member, tmp_path / "alone" / member.folder)
        torch.testing.assert_close(weights(sweep.path / member.folder), alone, rtol=0, atol=0)


def test_a_head_that_raises_does_not_stop_or_change_the_others(
    fixed: dict[str, str], tmp_path: Path, breaking_head: str
) -> None:
    (tmp_path / "s.toml").write_text(f"[[head]]\nhead = 'linear'\n[[head]]\nhead = '{breaking_head}'")
    members = read_sweep(str(tmp_path / "s.toml"), fixed, {})
    sweep = begin(members, tmp_path / "sweep")
    summary = run_sweep(sweep)
    assert [result.status for result in summary.results] == ["finished", "failed"]
    assert "no kernel for this" in (summary.results[1].error or "")
    alone = trained_alone(members[0], tmp_path / "alone")
    torch.testing.assert_close(weights(sweep.path / members[0].folder), alone, rtol=0, atol=0)


class Killed(BaseException):
    """Nothing of the sweep may catch it, as nothing catches SIGKILL."""


def killed_after(num_epochs: int) -> TrainingEvents:
    """Of all heads together."""
    left = iter(range(num_epochs))

    def on_epoch(report: EpochReport) -> None:
        if next(left, None) is None:
            raise Killed

    return TrainingEvents(on_epoch=on_epoch)


@pytest.mark.parametrize("num_epochs", [0, 4, 8])
def test_a_killed_sweep_goes_on_to_the_same_weights(fixed: dict[str, str], tmp_path: Path, num_epochs: int) -> None:
    """Two groups; one member fails, and is not tried again."""
    settings = {name: value for name, value in fixed.items() if name != "batch_size"}
    grid = {"batch_size": ("4", "5"), "lr": ("1e-3", "1e30", "1e-2")}
    members = read_sweep("linear", {**settings, "epochs": "3"}, grid)
    whole, killed = begin(members, tmp_path / "whole"), begin(members, tmp_path / "killed")
    expected = run_sweep(whole)
    with pytest.raises(Killed):
        run_sweep(killed, killed_after(num_epochs))
    assert Sweep.open(killed.path).unfinished()
    summary = run_sweep(Sweep.open(killed.path), resume=True)
    assert [result.status for result in summary.results] == [result.status for result in expected.results]
    for member in members:
        if "1e30" not in member.name:
            ours, theirs = (weights(sweep.path / member.folder) for sweep in (killed, whole))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert [epoch["epoch"] for epoch in Run.open(killed.path / member.folder).metrics()] == [0, 1, 2]


def test_what_failed_for_want_of_its_store_is_tried_again_by_a_resume(
    fixed: dict[str, str], float32_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(float32_store, tmp_path / "store.zarr")
    members = read_sweep("linear", {**fixed, "store": str(tmp_path / "store.zarr")}, {"lr": ("1e-3", "1e30")})
    sweep = begin(members, tmp_path / "sweep")
    (tmp_path / "store.zarr").rename(tmp_path / "elsewhere.zarr")
    summary = run_sweep(sweep)
    assert [result.status for result in summary.results] == ["failed", "failed"]
    assert "store.zarr" in (summary.results[0].error or "")
    (tmp_path / "elsewhere.zarr").rename(tmp_path / "store.zarr")
    for _ in range(2):
        summary = run_sweep(Sweep.open(sweep.path), resume=True)
        assert [result.status for result in summary.results] == ["finished", "failed"]
        assert "the loss is nan" in (summary.results[1].error or "")


def test_a_moved_store_is_named(fixed: dict[str, str], float32_store: Path, tmp_path: Path) -> None:
    shutil.copytree(float32_store, tmp_path / "store.zarr")
    sweep = begin(read_sweep("linear", {**fixed, "store": str(tmp_path / "store.zarr")}, {}), tmp_path / "sweep")
    (tmp_path / "store.zarr").rename(tmp_path / "elsewhere.zarr")
    summary = run_sweep(Sweep.open(sweep.path).moved(tmp_path / "elsewhere.zarr"))
    assert [result.status for result in summary.results] == ["finished"]
    two = begin(
        read_sweep("linear", SHORT, {"store": (str(tmp_path / "elsewhere.zarr"), str(float32_store))}), tmp_path / "2"
    )
    with pytest.raises(RunError, match="reads 2 stores; --store can name one"):
        two.moved(tmp_path / "elsewhere.zarr")


def test_resume_goes_on_with_a_sweep(fixed: dict[str, str], tmp_path: Path, vcache: VCache) -> None:
    sweep = begin(read_sweep("linear", {**fixed, "epochs": "3"}, {}, 2), tmp_path / "sweep")
    with pytest.raises(Killed):
        run_sweep(sweep, killed_after(1))
    status, printed, _ = vcache(f"resume {sweep.path} --json")
    assert status == 0
    assert [(run["status"], run["epochs"]) for run in json.loads(printed)["runs"]] == [("finished", 3), ("finished", 3)]


def test_a_finished_sweep_that_is_resumed_trains_nothing(fixed: dict[str, str], tmp_path: Path) -> None:
    sweep = begin(read_sweep("linear", fixed, {}, 2), tmp_path / "sweep")
    before = run_sweep(sweep)
    plans: list[object] = []
    assert run_sweep(Sweep.open(sweep.path), TrainingEvents(on_plan=plans.append), resume=True) == before
    assert not plans


def test_a_plan_is_the_same_after_a_round_trip_through_its_file(fixed: dict[str, str], tmp_path: Path) -> None:
    members = read_sweep("evl", {**fixed, "shots": "2"}, {"pooling": ("cls", "none"), "depth": ("1", "2")}, 2)
    sweep = begin(members, tmp_path / "sweep", skip_invalid=True)
    assert Sweep.open(sweep.path).plan == sweep.plan
    assert SweepPlan.from_json(json.loads(json.dumps(sweep.plan.to_json()))) == sweep.plan


def test_combinations_that_are_impossible_are_all_named_before_anything_runs(
    fixed: dict[str, str], tmp_path: Path
) -> None:
    members = read_sweep("evl", fixed, {"depth": ("1", "3"), "pooling": ("none", "cls")}, 2)
    with pytest.raises(InvalidMembers) as caught:
        plan_sweep(members)
    words = str(caught.value)
    assert words.startswith("6 of 8 heads cannot be trained:\n  depth=1 pooling=cls seed=0, depth=1 pooling=cls seed=1")
    assert "depth=3 pooling=cls seed=0 and 1 more:\n    pooling 'cls' reads CLS tokens alone" in words
    assert (
        "depth=3 pooling=none seed=0, depth=3 pooling=none seed=1:\n    head 'evl' reads tokens of layers 0-2" in words
    )
    assert "\n    Extract the rest with:  vcache extract " in words and "\n    (adds " in words
    assert words.endswith("train the others with --skip-invalid.")
    plan = plan_sweep(members, skip_invalid=True)
    assert [member.name for member in plan.members] == ["depth=1 pooling=none seed=0", "depth=1 pooling=none seed=1"]
    assert len(plan.skipped) == 6
    with pytest.raises(InvalidMembers, match="2 of 2 heads cannot be trained"):
        plan_sweep([member for member in members if "cls" in member.name][:2], skip_invalid=True)


def test_a_folder_that_is_there_is_refused(fixed: dict[str, str], tmp_path: Path) -> None:
    members = read_sweep("linear", fixed, {})
    begin(members, tmp_path / "sweep")
    with pytest.raises(RunError, match="is a sweep already. .*vcache resume"):
        begin(members, tmp_path / "sweep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(RunError, match="is not empty"):
        begin(members, tmp_path / "other")
    with pytest.raises(RunError, match="is not a sweep: it has no sweep.json"):
        Sweep.open(tmp_path / "other")


def test_the_command_trains_tabulates_and_says_how_many_groups(
    vcache: VCache, float32_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    line = f"sweep linear --store {shlex.quote(str(float32_store))} --grid lr=1e-3,1e-2 --seeds 2 --epochs 2 --batch-size 5"
    status, printed, said = vcache(f"{line} --device cpu --out {out}", columns=80)
    assert status == 0
    assert "4 heads in 1 group, every batch is read once for all" in said
    assert "top-1" in printed and "│ 1e-2" in printed and "results.csv, summary.csv, results.md" in printed
    assert (out / "linear-lr1e-3-seed1" / "head.safetensors").is_file()
    status, printed, _ = vcache(f"{line} --device cpu --out {tmp_path / 'json'} --json")
    assert status == 0 and json.loads(printed)["settings"][1]["varied"] == {"lr": "1e-2"}


def test_the_command_ends_with_1_where_a_head_failed_and_with_what_is_wrong(
    vcache: VCache, float32_store: Path, tmp_path: Path
) -> None:
    line = f"sweep linear --store {shlex.quote(str(float32_store))} --epochs 5 --batch-size 5 --device cpu"
    status, printed, _ = vcache(f"{line} --grid lr=1e-3,1e30 --out {tmp_path / 'sweep'}")
    assert status == 1 and "failed: lr=1e30 seed=0: the loss is nan" in printed
    status, _, said = vcache(f"{line} --grid lre=1,2")
    assert status == 1 and "unknown setting 'lre'. Did you mean 'lr'" in said
    status, _, said = vcache(f"{line} --grid lr=-1,1e-3")
    assert status == 1 and "1 of 2 heads cannot be trained:\n  lr=-1:\n    lr (-1.0) must be above 0" in said
    status, _, said = vcache("sweep")
    assert status == 2 and "name a HEAD or a FILE.toml" in said


def test_a_dry_run_writes_nothing(
    vcache: VCache, float32_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"sweep linear --store {shlex.quote(str(float32_store))} --grid lr=1e-3,1e-2 --together 1 --dry-run"
    status, printed, _ = vcache(line)
    assert status == 0 and "lr=1e-2  linear-lr1e-2" in printed and "because --together allows 1 at once" in printed
    status, printed, _ = vcache(f"{line} --json")
    assert json.loads(printed)["groups"] == [["lr=1e-3"], ["lr=1e-2"]]
    assert not list(tmp_path.iterdir())


def test_the_printed_example_is_a_file_for_the_command(vcache: VCache, tmp_path: Path) -> None:
    status, printed, _ = vcache("sweep --example")
    (tmp_path / "example.toml").write_text(printed)
    assert status == 0 and len(read_sweep(str(tmp_path / "example.toml"), {}, {})) == 11
