"""Training a head from a store: no video is opened, no backbone is run."""

import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from vcache.pipelines.missing_run import why_no_run
from vcache.pipelines.runs import RunError, check_free, next_run_folder, read_config
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.group import Member, TrainingEvents, train_group
from vcache.pipelines.training.preparation import resolve
from vcache.pipelines.training.reports import EpochReport, StepReport, TrainingPlan, TrainingSummary
from vcache.store.object_path import StorePath


def train_head(
    config: TrainingConfig,
    *,
    on_plan: Callable[[TrainingPlan], None] = lambda plan: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    on_load: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingSummary:
    """Train one head on a store's train split, validating after every epoch, and write a run folder.

    Raises:
        UnknownHead, UnknownPreset, SettingError: no such head or preset, or a setting that neither head nor recipe has.
        NoFittingStore, HeadStoreMismatch, IncompleteSplit: the stores lack what the head reads; with the mending command.
        RunError: `out` is not empty.
        PrecisionError: the precision is none of the device.
        TrainingError: the loss is not finite any more.
        TrainingStopped: by Ctrl-C or SIGTERM, after a checkpoint.
    """
    resolve(config)  # what is wrong without any store is said before one is looked for
    run = config.out or next_run_folder(config.head)
    check_free(run)
    events = TrainingEvents(on_plan=on_plan, on_step=on_step, on_epoch=on_epoch, on_load=on_load)
    return train_group([Member(name=run.name, config=config, run=run)], events)[0]


def resume_run(
    run: Path,
    *,
    store: StorePath | None = None,
    device: str | None = None,
    on_plan: Callable[[TrainingPlan], None] = lambda plan: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    on_load: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingSummary:
    """Go on with a run that was stopped or killed, from its last checkpoint, or from its beginning if it has none.

    On a CPU it ends with the weights that it would have ended with, bit for bit. `store` says where the store lies now, if it
    was moved.

    Raises:
        RunError: there is no run, it is complete, or it would not be the same any more: another store, fewer or more videos.
        And what `train_head` raises.
    """
    config = begun_config(run)
    config = replace(config, store=store or config.store, device=device or config.device)
    events = TrainingEvents(on_plan=on_plan, on_step=on_step, on_epoch=on_epoch, on_load=on_load)
    return train_group([Member(name=run.name, config=config, run=run)], events, resume=True)[0]


def begun_config(run: Path) -> TrainingConfig:
    """What an unfinished run was told when it began, its store by its path.

    Raises:
        RunError: there is no run, or it is complete.
    """
    if not (run / "config.json").is_file():
        raise RunError(why_no_run(run))
    if (run / "head.safetensors").is_file():
        raise RunError(
            f"{run} is complete: there is nothing to resume. Evaluate it with:  vcache eval {shlex.quote(str(run))}"
        )
    begun = read_config(run / "config.json")
    if "training" not in begun:
        raise RunError(
            f"{run} was begun by an older vcache, which wrote no checkpoints. Train again into another --out."
        )
    known = {field.name for field in fields(TrainingConfig)}
    if unknown := [name for name in begun["training"] if name not in known]:
        raise RunError(
            f"{run} was begun with {', '.join(unknown)}, which this vcache does not know: by another version of vcache, with "
            "which it can go on."
        )
    # As it was shuffled: a store that is moved to a bucket meanwhile would be by shards.
    return replace(TrainingConfig.from_json(begun["training"]), shuffle=begun["shuffle"])
