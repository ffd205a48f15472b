"""`vcache sweep`: many heads, trained side by side on batches that are read once; each becomes what it would be alone.

OUT/sweep.json      the members with their whole settings, the groups, what was skipped: enough to go on after a stop
OUT/FOLDER/         the run of a member, as `vcache train-head` writes it
OUT/failures.json   why members failed, by their folder
OUT/results.csv     and summary.csv, results.md (sweep_results.py); written anew after each group

What became of a member is read off its folder, so results are the same whether the sweep was stopped in between or not. Of
several processes (torchrun) all train every head, each on its share of a batch; the first reads and writes these files.
"""

import json
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vcache.pipelines.device import select_device
from vcache.pipelines.frozen_tail import SharedTails
from vcache.pipelines.runs import Run, RunError, check_free, next_run_folder, write_text
from vcache.pipelines.training.config import TrainingError
from vcache.pipelines.training.group import Member, TrainingEvents, train_group
from vcache.pipelines.training.resuming import check_number_of_processes
from vcache.pipelines.training.run_lock import held_alone
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.stream import shuffle_of
from vcache.pipelines.training.sweep_plan import SweepPlan
from vcache.pipelines.training.sweep_results import (
    FILES,
    METRICS,
    MemberResult,
    best_setting,
    summarise,
    write_results,
)
from vcache.pipelines.training.sweep_spec import SweepMember
from vcache.pipelines.training.world import World, joined_world
from vcache.store.object_path import StorePath

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """What came of a sweep."""

    sweep: Path
    results: tuple[MemberResult, ...]
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of members that could not be trained."""
    files: tuple[Path, ...]

    @property
    def num_failed(self) -> int:
        return sum(result.status == "failed" for result in self.results)

    def to_json(self) -> dict[str, Any]:
        summaries = summarise(self.results)
        return {
            "sweep": str(self.sweep),
            "best": best_setting(summaries),
            "settings": [asdict(row) for row in summaries],
            "runs": [asdict(result) for result in self.results],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "files": list(map(str, self.files)),
        }


class Sweep:
    """A folder with the runs of a sweep."""

    def __init__(self, path: Path, plan: SweepPlan) -> None:
        self.path, self.plan = path, plan

    @classmethod
    def create(cls, path: Path | None, plan: SweepPlan, *, name: str = "sweep") -> "Sweep":
        """At `path`, or in runs/NAME-1, -2, ...: the next that is free. Of several processes the first writes it.

        Raises:
            RunError: there is something at `path`.
        """
        with _joined_world(plan) as world:
            written = str(cls._write(path or next_run_folder(name), plan)) if world.is_first else None
            return cls(Path(world.broadcast_json(written)), plan)

    @classmethod
    def _write(cls, path: Path, plan: SweepPlan) -> Path:
        if is_sweep(path):
            command = shlex.join(["vcache", "resume", str(path)])
            raise RunError(f"{path} is a sweep already. Choose another --out, or go on with:  {command}")
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        cls._write_plan(path, plan)
        return path

    @classmethod
    def open(cls, path: Path) -> "Sweep":
        if not is_sweep(path):
            raise RunError(f"{path} is not a sweep: it has no {SWEEP_FILE}. `vcache sweep` writes one with --out.")
        return cls(path, SweepPlan.from_json(json.loads((path / SWEEP_FILE).read_text())))

    def replanned(self, plan: SweepPlan) -> "Sweep":
        """The same folder with other members: runs of those that stay go on, and those of others are left as they are.

        Raises:
            RunError: another process trains it.
        """
        with _joined_world(plan) as world:
            if world.is_first:
                with held_alone(self.path / SWEEP_FILE):
                    self._write_plan(self.path, plan)
        return Sweep(self.path, plan)

    @staticmethod
    def _write_plan(path: Path, plan: SweepPlan) -> None:
        write_text(path / SWEEP_FILE, json.dumps(plan.to_json(), indent=2) + "\n")

    def moved(self, store: StorePath | None = None, device: str | None = None) -> "Sweep":
        """The same with its store, which all members share, in another place, or on another device.

        Raises:
            RunError: its members have several stores, and one path cannot stand for them.
        """
        if store is not None and len(stores := {member.config.store for member in self.plan.members}) > 1:
            raise RunError(
                f"{self.path} reads {len(stores)} stores; --store can name one. Put them back where they were."
            )

        def move(member: SweepMember) -> SweepMember:
            config = member.config
            # As in the place where it was: in a bucket, heads that are begun there are shuffled by shards.
            kind = shuffle_of(config, config.store).kind if store and config.store else config.shuffle
            moved = {"store": store or config.store, "device": device or config.device, "shuffle": kind}
            return replace(member, config=replace(config, **moved))  # type: ignore[arg-type]

        return Sweep(self.path, replace(self.plan, members=tuple(map(move, self.plan.members))))

    def failures(self) -> dict[str, str]:
        """Reasons, by the members' folders."""
        return {folder: failure["reason"] for folder, failure in self._read_failures().items()}

    def record_failures(self, reasons: Mapping[str, str], *, final: bool = True) -> None:
        """By the members' folders; those that are not final are tried again by a resume."""
        there = self._read_failures()
        if reasons.keys() - there.keys():
            new = {folder: {"reason": reason, "final": final} for folder, reason in reasons.items()}
            self._write_failures({**new, **there})

    def forget_failures(self) -> None:
        """Those that were not the member's own, and may be mended by now: a store that could not be read, a full disk."""
        if there := self._read_failures():
            self._write_failures({folder: failure for folder, failure in there.items() if failure["final"]})

    def _read_failures(self) -> dict[str, dict[str, Any]]:
        path = self.path / "failures.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write_failures(self, failures: Mapping[str, Any]) -> None:
        write_text(self.path / "failures.json", json.dumps(failures, indent=2) + "\n")

    def unfinished(self) -> list[list[str]]:
        """Names of what is left of each group, without those of which nothing is."""
        over = {member.name for member in self.plan.members if self.is_over(member)}
        left = [[name for name in group if name not in over] for group in self.plan.groups]
        return [group for group in left if group]

    def is_over(self, member: SweepMember) -> bool:
        """Whether it is trained to its end, or failed."""
        return (self.path / member.folder / "head.safetensors").is_file() or member.folder in self._read_failures()

    def results(self) -> tuple[MemberResult, ...]:
        failed = self.failures()
        return tuple(
            _result(member, self.path / member.folder, failed.get(member.folder)) for member in self.plan.members
        )

    def write_results(self) -> SweepSummary:
        results = self.results()
        write_results(self.path, results)
        return self.summary(results)

    def summary(self, results: tuple[MemberResult, ...]) -> SweepSummary:
        files = tuple(self.path / name for name in FILES)
        return SweepSummary(sweep=self.path, results=results, skipped=self.plan.skipped, files=files)


def is_sweep(path: Path) -> bool:
    return (path / SWEEP_FILE).is_file()


def run_sweep(sweep: Sweep, events: TrainingEvents | None = None, *, resume: bool = False) -> SweepSummary:
    """Train what is left of a sweep, group after group. A member that fails is recorded with its reason and stops no other.

    Of several processes, an error that is not the member's own (a loss that is not finite) ends all; a resume goes on.

    Raises:
        RunError: another process trains it, or it was begun with another number of processes.
        TrainingStopped: by Ctrl-C or SIGTERM, after a checkpoint; `vcache resume` goes on.
    """
    with _joined_world(sweep.plan) as world:
        check_number_of_processes(sweep.path, sweep.plan.num_processes, world.size)
        with held_alone(sweep.path / SWEEP_FILE) if world.is_first else nullcontext():
            return _run_groups(sweep, events or TrainingEvents(), resume, world)


def _run_groups(sweep: Sweep, events: TrainingEvents, resume: bool, world: World) -> SweepSummary:
    if resume and world.is_first:
        sweep.forget_failures()
    # One process looks what is left: the files of the others' machines may be older.
    left = world.broadcast_json(sweep.unfinished() if world.is_first else None)
    tails = SharedTails()  # of all groups: a checkpoint is read once
    try:
        for number, names in enumerate(left, start=1):
            title = f"group {number} of {len(left)}" if len(left) > 1 else ""
            group = [member for member in sweep.plan.members if member.name in names]
            _train(sweep, group, _titled(events, title), resume, world, tails)
            if world.is_first:
                sweep.write_results()
    finally:
        if world.is_first:
            sweep.write_results()
    results = world.broadcast_json([asdict(result) for result in sweep.results()] if world.is_first else None)
    return sweep.summary(tuple(MemberResult(**result) for result in results))


def _joined_world(plan: SweepPlan) -> AbstractContextManager[World]:
    return joined_world(select_device(plan.members[0].config.device))


def _titled(events: TrainingEvents, title: str) -> TrainingEvents:
    """The plan of each group says which it is."""
    return replace(events, on_plan=lambda plan: events.on_plan(replace(plan, group=title)))


def _train(
    sweep: Sweep,
    group: list[SweepMember],
    events: TrainingEvents,
    resume: bool,
    world: World,
    tails: SharedTails,
) -> None:
    folders = {member.name: member.folder for member in group}

    def on_failure(name: str, reason: str) -> None:
        # At once: it has no checkpoint where the others have their next, and tried again beside them all would begin anew.
        sweep.record_failures({folders[name]: reason})
        events.on_failure(name, reason)

    members = [Member(name=member.name, config=member.config, run=sweep.path / member.folder) for member in group]
    try:
        told = replace(events, on_failure=on_failure)
        train_group(members, told, resume=resume, resumed_by=sweep.path, tails=tails)
    except TrainingStopped:
        raise
    except Exception as error:  # whatever it is, the other groups can do without this one
        if world.size > 1 and not isinstance(error, TrainingError):
            raise
        if not world.is_first:
            return
        left = [member for member in group if not sweep.is_over(member)]
        sweep.record_failures(
            {member.folder: _reason(error) for member in left}, final=isinstance(error, TrainingError)
        )


def _reason(error: Exception) -> str:
    """Our own errors explain themselves."""
    words = str(error)
    return words if words and type(error).__module__.startswith("vcache.") else f"{type(error).__name__}: {words}"


def _result(member: SweepMember, folder: Path, error: str | None) -> MemberResult:
    done, begun = (folder / "head.safetensors").is_file(), (folder / "config.json").is_file()
    result = MemberResult(
        label=member.label,
        head=member.config.head,
        varied=member.varied,
        seed=member.config.seed,
        status="failed" if error is not None else "training" if begun else "waiting",
        parameters=member.parameters,
        run=str(folder),
        error=error,
    )
    if error is not None or not done:
        return result
    run = Run.open(folder)
    epochs = run.metrics()
    last = epochs[-1]
    return replace(
        result,
        status="finished" if _is_full_length(run.config["recipe"], last) else "stopped early",
        metrics={name: last.get(f"val_{name}") for name in (*METRICS, "loss")},
        best_epoch=next((epoch["epoch"] for epoch in reversed(epochs) if epoch.get("best")), None),
        epochs=len(epochs),
        seconds=sum(epoch["seconds"] for epoch in epochs),
    )


def _is_full_length(recipe: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    if recipe["steps"] is not None:
        return last["step"] >= recipe["steps"]
    return last["epoch"] + 1 >= recipe["epochs"]
