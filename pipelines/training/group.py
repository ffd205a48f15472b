"""Training of heads that share a stream of batches, from their configs to their run folders."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcache.heads.registry import get_head
from vcache.heads.tail import FrozenTail
from vcache.pipelines.device import select_device
from vcache.pipelines.frozen_tail import SharedTails, tail_key
from vcache.pipelines.loading.residency import Residency
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.tail_check import check_tail
from vcache.pipelines.training.checkpoints import Checkpoints, common_number
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.engine import Position, TrainingLoop
from vcache.pipelines.training.fitting import fit_head, give_texts, open_fitting
from vcache.pipelines.training.head_training import HeadTraining
from vcache.pipelines.training.preparation import (
    PreparedHead,
    open_training_store,
    prepare_head,
    training_length,
)
from vcache.pipelines.training.random_state import RandomState
from vcache.pipelines.training.reports import EpochReport, StepReport, TrainingPlan, TrainingSummary
from vcache.pipelines.training.resuming import check_number_of_processes, resume_command
from vcache.pipelines.training.run_lock import held_alone
from vcache.pipelines.training.step import check_recipe
from vcache.pipelines.training.stopping import TrainingStopped, stop_on_signals
from vcache.pipelines.training.stream import open_stream, run_config
from vcache.pipelines.training.tail_plan import plan_of_tails
from vcache.pipelines.training.world import World, joined_world, state_digest
from vcache.pipelines.upkeep.register import note_run
from vcache.store.reader import FeatureStore

OPTIMISER_BYTES = 12
"""Of a parameter: its gradient and the two moments of AdamW, in float32."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One head of a group: its name among them, what it is told, and the folder of its run."""

    name: str
    config: TrainingConfig
    run: Path


@dataclass(frozen=True, kw_only=True)
class TrainingEvents:
    """Whom to tell what happens; on the first rank alone."""

    on_plan: Callable[[TrainingPlan], None] = lambda plan: None
    on_step: Callable[[StepReport], None] = lambda report: None
    on_epoch: Callable[[EpochReport], None] = lambda report: None
    on_load: Callable[[int, int], None] = lambda done, total: None
    """Bytes of the features that were read into memory so far, and those of all."""
    on_failure: Callable[[str, str], None] = lambda name, reason: None
    """A head of several is lost, by its name; told at once, before anything is kept of the step in which it was."""


def train_group(
    members: Sequence[Member],
    events: TrainingEvents | None = None,
    *,
    resume: bool = False,
    resumed_by: Path | None = None,
    tails: SharedTails | None = None,
) -> list[TrainingSummary]:
    """Train heads of one stream side by side; a summary for each, which of a failed one says why.

    A group of one raises what goes wrong. With `resume`, runs that are there go on from the last checkpoint that all of them
    have; of those that are complete there is nothing to be trained, and they are no members. `resumed_by` is the folder that
    `vcache resume` is to be given after a stop, where it is not the run of the only member. `tails` is shared with other groups.

    Raises:
        TrainingStopped: by Ctrl-C or SIGTERM, after a checkpoint.
        What `train_head` raises.
    """
    device = select_device(members[0].config.device)
    with joined_world(device) as world, open_training_store(members[0].config) as store:
        told = events if events and world.is_first else TrainingEvents()
        shared = tails if tails is not None else SharedTails()
        with _Group(members, told, store, world, resumed_by or members[0].run, shared) as group:
            return group.train(resume)


class _Group:
    def __init__(
        self,
        members: Sequence[Member],
        events: TrainingEvents,
        store: FeatureStore,
        world: World,
        resumed_by: Path,
        tails: SharedTails,
    ) -> None:
        self.members, self.events, self.store, self.resumed_by = members, events, store, resumed_by
        self.tails = tails
        self.device, self.world = world.device, world
        self.prepared = [prepare_head(member.config, store, self.device) for member in members]
        self.stream = open_stream(self.prepared, store, self.device, world)
        self.loader, self.val = self.stream.train, self.stream.val
        self.stream.check(self.members[0].config.resident)  # before there is a run folder
        self.locks = ExitStack()

    def __enter__(self) -> "_Group":
        return self

    def __exit__(self, *error: object) -> None:
        self.locks.close()

    def train(self, resume: bool) -> list[TrainingSummary]:
        number = common_number([Checkpoints(member.run) for member in self.members]) if resume else 0
        self._load_tails(resume)
        heads = [self._begin(*pair, resume, anew=not number) for pair in zip(self.members, self.prepared, strict=True)]
        position = self._resume(heads, number) if resume else Position()
        for head in heads if self.world.size > 1 else []:
            self.world.check_same(f"{state_digest(head.head.state_dict())} {position}", f"the weights of {head.name}")
        residency = self._keep(heads)
        if self.world.is_first:
            self.events.on_plan(self._plan(heads, residency))
        with stop_on_signals() as stop:
            loop = TrainingLoop(
                heads=heads,
                train=self.loader,
                val=self.val,
                num_classes=len(self.loader.class_names),
                position=position,
                world=self.world,
                stop=stop,
                source={"disk": "disk", "ram": "RAM", "gpu": "GPU memory"}[residency.kind],
                checkpoint_seconds=60 * min(member.config.checkpoint_minutes for member in self.members),
                on_step=self.events.on_step,
                on_epoch=self.events.on_epoch,
                on_failure=self.events.on_failure,
            )
            stopped = self._run_loop(loop)
        if stopped:
            raise TrainingStopped(self._stopped(loop.position, loop.not_kept), stop.signal)
        return [self._summary(head) for head in heads]

    def _run_loop(self, loop: TrainingLoop) -> bool:
        try:
            return loop.run()
        except OSError as error:  # a full disk, a bucket that does not answer
            raise RunError(
                f"{error}: the training has ended. Once that is mended, go on from the last checkpoint with:  "
                f"{resume_command(self.resumed_by, self.world.size)}"
            ) from error

    def _stopped(self, position: Position, not_kept: OSError | None) -> str:
        command = resume_command(self.resumed_by, self.world.size)
        done = position.epoch * len(self.loader) + position.batch
        if not_kept:
            return (
                f"stopped after {done} steps, and no checkpoint could be written then: {not_kept}. What was kept before is "
                f"as it was. Make room, and go on from there with:  {command}"
            )
        return f"stopped after {done} steps, all of them kept. Go on with:  {command}"

    def _load_tails(self, resume: bool) -> None:
        """Those that the heads run; of runs that go on, as these have kept them."""
        keys = [tail_key(head.requirements, head.head_config, self.store.manifest) for head in self.prepared]
        runs = [member.run for member in self.members] if resume else []
        self.tails.load(self.store, self.device, filter(None, keys), runs)

    def _begin(self, member: Member, prepared: PreparedHead, resume: bool, *, anew: bool) -> HeadTraining:
        """`anew`: there is no checkpoint whose weights take the place of those that it begins with."""
        config = prepared.config
        random = RandomState(config.seed, self.device)
        with random.active():
            head = get_head(config.head)(prepared.head_config)
        head.to(self.device)
        self._give_tail(head, prepared)
        give_texts(head, prepared, self.store)
        check_recipe(head, prepared.recipe)  # before there is a run folder
        if prepared.requirements.fitted_on and anew:
            fit_head(head, prepared, open_fitting(prepared, self.store, self.loader), self.world)
        if self.world.rank:
            random.seed(config.seed + 1_000_003 * self.world.rank)  # its own dropout; rank 0 draws what it would alone
        steps_per_epoch = len(self.loader)
        _, num_steps = training_length(prepared.recipe, steps_per_epoch)
        described = run_config(prepared, self.store, self.stream, self.world)
        run = self._run(member, described, resume, head.tail if prepared.requirements.tail else None)
        return HeadTraining(
            member.name,
            head,
            prepared.plan,
            prepared.recipe,
            prepared.precision,
            random,
            run,
            num_steps=num_steps,
            steps_per_epoch=steps_per_epoch,
            seed=config.seed,
            patience=config.patience,
            world=self.world,
        )

    def _give_tail(self, head: Any, prepared: PreparedHead) -> None:
        key = tail_key(prepared.requirements, prepared.head_config, self.store.manifest)
        if key is not None:
            tail = self.tails.of(key, self.device)
            head.set_tail(tail)
            check_tail(head, tail, prepared.plan, self.store, self.loader.split, self.device)

    def _run(self, member: Member, described: dict[str, Any], resume: bool, tail: FrozenTail | None) -> Run:
        if not self.world.is_first:
            return Run(member.run, described)
        if resume and (member.run / "config.json").is_file():
            run = self._held(Run.unfinished(member.run))
            check_number_of_processes(run.path, run.config.get("num_processes", 1), self.world.size)
            self.store.check_key(run.config["store_key"], run.config["store_spec"])
            run.check_same(described)
            if tail is not None:
                run.mend_tail(tail)
            note_run(run.path, run.config)  # it may have been moved
            return run
        if resume:
            Run.forget_unbegun(member.run)
        run = self._held(Run.create(member.run, described, self.loader.class_names, tail))
        note_run(run.path, described)
        return run

    def _held(self, run: Run) -> Run:
        self.locks.enter_context(held_alone(run.path / "config.json"))
        return run

    def _resume(self, heads: list[HeadTraining], number: int) -> Position:
        """After the last batch of which all have a checkpoint, its number; from the beginning if there is none."""
        if not number:
            for head in heads if self.world.is_first else []:
                head.log.truncate(0)
            return Position()
        positions = [Position(*head.load_checkpoint(number)) for head in heads]
        return positions[0]

    def _keep(self, heads: list[HeadTraining]) -> Residency:
        """Where the features are kept; what optimisers and the backbone's blocks will take is left free."""
        left = max(head.num_steps - head.step for head in heads)
        tail = plan_of_tails(heads, self.store.manifest)
        return self.stream.keep(
            self.members[0].config.resident,
            epochs=-(-left // len(self.loader)),
            reserve_bytes=sum(head.num_parameters for head in heads) * OPTIMISER_BYTES
            + (tail.kept_bytes if tail else 0),
            on_bytes=self.events.on_load,
        )

    def _plan(self, heads: list[HeadTraining], residency: Residency) -> TrainingPlan:
        longest = max(heads, key=lambda head: head.num_steps)
        epochs = -(-longest.num_steps // longest.steps_per_epoch)
        return TrainingPlan(
            run=longest.run.path,
            store=self.store.path,
            num_train=len(self.loader.rows),
            num_val=len(self.val.rows) if self.val else 0,
            num_views=len(self.loader.views_with_videos),
            num_parameters=sum(head.num_parameters for head in heads),
            epochs=epochs,
            steps=longest.num_steps,
            precision=longest.precision.name,
            recipe=longest.recipe,
            residency=self._where_from(residency),
            shuffle=self.stream.shuffle.kind,
            shuffle_bytes=self.loader.shuffle_bytes,
            subset=self._subset(),
            num_heads=len(heads),
            tail=plan_of_tails(heads, self.store.manifest),
            resumed_from=f"step {longest.step} of {longest.num_steps}" if longest.step else None,
        )

    def _subset(self) -> str:
        """What is left out, what is taken of the rest, and how that is drawn."""
        balanced = "every class is drawn equally often" if self.loader.order.balanced else ""
        said = (self._left_out(), (self.loader.subset_note or "").removesuffix("."), balanced)
        return "; ".join(filter(None, said))

    def _left_out(self) -> str:
        names, kept = self.prepared[0].config.leave_out, len(self.loader.class_names)
        listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{kept} of {kept + len(names)} classes are trained on, without {listed}" if names else ""

    def _where_from(self, residency: Residency) -> str:
        """A sentence; where a spinning disk would seek for every clip, as memory cannot hold what it has read, another."""
        seeks = residency.kind == "disk" and residency.needed_bytes > residency.free_bytes
        hints = [self.stream.shuffle.reason] if seeks and "--shuffle" in self.stream.shuffle.reason else []
        return " ".join([residency.reason, *hints]).removesuffix(".")

    def _summary(self, head: HeadTraining) -> TrainingSummary:
        return TrainingSummary(
            run=str(head.run.path),
            store=str(self.store.path),
            num_train=len(self.loader.rows),
            num_val=len(self.val.rows) if self.val else 0,
            num_failed=sum(loader.num_failed for loader in self.stream.loaders),
            num_parameters=head.num_parameters,
            epochs=-(-head.num_steps // head.steps_per_epoch),
            steps=head.step,
            last=head.last,
            best_epoch=head.best.epoch if head.best.epoch >= 0 else None,
            best_value=head.best.value if head.best.epoch >= 0 else None,
            stopped_early=head.state == "stopped early",
            stopped=False,
            error=head.error,
            tail=plan_of_tails([head], self.store.manifest),
        )
