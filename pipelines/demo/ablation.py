"""`vcache demo --ablation`: EVL's Table 8 on the demo's world, every row over several seeds, as one sweep on the one store.

OUT/ablation/        the sweep: a run folder for each variant and seed, results.csv and the other files of `vcache sweep`
OUT/ablation.json    the tables with every run, beside the paper's numbers; written when the training ends, also by a stop

A run has the same folder whatever else is asked for, so a second command trains only what is missing: more seeds add theirs, and
another gain of T-CA those of the variants that have it.
"""

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vcache.pipelines.demo.ablation_screen import announce
from vcache.pipelines.demo.motions import MOTIONS
from vcache.pipelines.demo.run import EVL_SETTINGS, prepare_world
from vcache.pipelines.demo.table8 import MODULES, TABLES, VARIANTS, PaperRow, Variant
from vcache.pipelines.runs import RunError, write_text
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.group import TrainingEvents
from vcache.pipelines.training.screen import training_bar
from vcache.pipelines.training.sweep import Sweep, is_sweep, run_sweep
from vcache.pipelines.training.sweep_plan import plan_sweep
from vcache.pipelines.training.sweep_results import MemberResult
from vcache.pipelines.training.sweep_spec import SweepMember
from vcache.store.reader import FeatureStore

ORDER_BLIND_BOUND = 0.5
"""Top-1 that no head which ignores the order can pass: the motions are pairs, each the other played backwards."""


def run_ablation(
    out: Path,
    *,
    seeds: int = 3,
    tca_gain: float = 1.0,
    train: int = 400,
    val: int = 200,
    settings: Mapping[str, Any] = EVL_SETTINGS,
    show: bool = True,
) -> dict[str, Any]:
    """Render and extract as the demo does, then train every row of Table 8 with seeds 0..seeds-1, but for runs that are there.

    A run that fails is named in `failed` and stops no other. As in every sweep, a lost loss is not tried again.

    Returns a dict with the tables, chance, the bound for heads that ignore the order, and the paths of everything written.

    Raises:
        RunError: a run that is there was trained with other settings, or on another store.
        TrainingStopped: by Ctrl-C or SIGTERM, after a checkpoint; the same call goes on.
    """
    store, _ = prepare_world(out, train=train, val=val, show=show)
    sweep = _planned(out / "ablation", _members(store, range(seeds), settings, tca_gain))
    _check_same_runs(sweep, store)
    left = sum(map(len, sweep.unfinished()))
    facts = {
        "settings": {**settings, "tca_gain": tca_gain},
        "num_val": val,
        "videos": str(out / "world"),
        "store": str(store),
        "runs": str(sweep.path),
        "num_trained": left,
    }
    announce(len(sweep.plan.members), left, len(sweep.unfinished()))
    try:
        with training_bar("ablation", epoch_lines=False) as screen:
            events = TrainingEvents(on_plan=screen.plan, on_step=screen.step, on_epoch=screen.epoch)
            run_sweep(sweep, events, resume=True)
    finally:
        result = _write_results(out, sweep.results(), facts)
    return result


def _members(store: Path, seeds: Sequence[int], settings: Mapping[str, Any], tca_gain: float) -> list[SweepMember]:
    """Seed after seed, so that the first numbers of all rows are there before the second."""
    return [_member(variant, seed, store, settings, tca_gain) for seed in seeds for variant in VARIANTS]


def _member(variant: Variant, seed: int, store: Path, settings: Mapping[str, Any], tca_gain: float) -> SweepMember:
    """The gain only where there is something to multiply: the other runs are the same for every gain."""
    gain = {"tca_gain": tca_gain} if variant.temporal_cross_attention and tca_gain != 1.0 else {}
    folder = "-".join([variant.slug, *(f"gain{value:g}" for value in gain.values()), f"seed{seed}"])
    return SweepMember(
        label=variant.label,
        name=f"{variant.label}, seed {seed}",
        folder=folder,
        varied={
            **{word: "on" if getattr(variant, name) else "off" for name, word in MODULES.items()},
            "depth": str(variant.depth),
        },
        config=TrainingConfig(head="evl", store=store, settings={**settings, **variant.settings, **gain}, seed=seed),
    )


def _planned(path: Path, members: Sequence[SweepMember]) -> Sweep:
    """The sweep of these members; what is trained of it stays. A group is what one seed has left, trained side by side."""
    plan = plan_sweep(members, together=len(VARIANTS))
    return Sweep.open(path).replanned(plan) if is_sweep(path) else Sweep.create(path, plan)


def _check_same_runs(sweep: Sweep, path: Path) -> None:
    """The key of a store says how features were made, and not of which videos: their numbers are compared, too."""
    with FeatureStore.open(path) as store:
        is_on = {"store_key": store.manifest.key, "num_videos": dict(store.splits)}
    for member in sweep.plan.members:
        file = sweep.path / member.folder / "config.json"
        if not file.is_file():
            continue
        begun = json.loads(file.read_text())
        told = TrainingConfig.from_json(begun["training"])
        told = replace(told, store=member.config.store, device=member.config.device)
        if told != member.config or any(begun[name] != value for name, value in is_on.items()):
            raise RunError(
                f"{file.parent} was trained with other settings, or on another world, than it would be now. Choose another "
                f"--out, or train all runs again after:  rm -r {shlex.quote(str(sweep.path))}"
            )


def _write_results(out: Path, results: Sequence[MemberResult], facts: Mapping[str, Any]) -> dict[str, Any]:
    """ablation.json, and what it says."""
    result = {
        "tables": {name: [_row(row, results) for row in table] for name, table in TABLES.items()},
        "seeds": sorted({result.seed for result in results}),
        "failed": [
            {"variant": result.label, "seed": result.seed, "run": result.run, "error": result.error}
            for result in results
            if result.status == "failed"
        ],
        "chance": 1 / len(MOTIONS),
        "order_blind_bound": ORDER_BLIND_BOUND,
        **facts,
        "results": [str(out / "ablation.json"), str(out / "ablation" / "results.csv")],
    }
    write_text(out / "ablation.json", json.dumps(result, indent=2) + "\n")
    return result


def _row(row: PaperRow, results: Sequence[MemberResult]) -> dict[str, Any]:
    """A row of a table: its settings, its runs, their mean and sample standard deviation, and the paper's numbers."""
    runs = [result for result in results if result.label == row.variant.label]
    top1 = [value for run in runs if (value := run.metrics.get("top1")) is not None]
    return {
        **{name: getattr(row.variant, name) for name in MODULES},
        "depth": row.variant.depth,
        "mean": statistics.fmean(top1) if top1 else None,
        "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "paper_k400": row.k400,
        "paper_ssv2": row.ssv2,
        "runs": [
            {
                "seed": run.seed,
                "status": run.status,
                "top1": run.metrics.get("top1"),
                "run": run.run,
                "error": run.error,
            }
            for run in runs
        ],
    }
