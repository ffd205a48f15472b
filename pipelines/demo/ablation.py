"""`vcache demo --ablation`: EVL's Table 8 on the demo's world, every row over several seeds, from the one store.

A list of settings over `train_head`. Finished runs are found by what their config.json says, wherever in OUT/runs they lie: the
runs of a plain demo count, a second command trains only what is missing, and one that was killed loses the run it was at.

OUT/ablation.json    the tables with every run; written anew after each run
OUT/ablation.csv     a line for each run of each row
"""

import csv
import io
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vcache.heads.registry import get_head
from vcache.heads.requirements import Recipe
from vcache.pipelines.demo.ablation_screen import AblationScreen, ablation_bar, announce
from vcache.pipelines.demo.motions import MOTIONS
from vcache.pipelines.demo.run import EVL_SETTINGS, prepare_world
from vcache.pipelines.demo.table8 import MODULES, TABLES, VARIANTS, PaperRow, Variant
from vcache.pipelines.device import select_device
from vcache.pipelines.matching import build_head_config
from vcache.pipelines.runs import Run, next_run_folder, write_text
from vcache.pipelines.settings import build, split_settings
from vcache.pipelines.stored_views import training_views, view_definitions
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.mixed_precision import training_precision
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

ORDER_BLIND_BOUND = 0.5
"""Top-1 that no head which ignores the order can pass: the motions are pairs, each the other played backwards."""

_SAME = (
    "head",
    "head_config",
    "recipe",
    "dataset",
    "train_split",
    "views",
    "seed",
    "precision",
    "store_key",
    "num_videos",
)
"""Of config.json, what makes two runs the same."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to; `top1` (0..1) is None and `error` says why if it failed."""

    run: Path
    top1: float | None
    seconds: float
    """Of its epochs, with their validation."""
    error: str | None = None


Outcomes = dict[tuple[Variant, int], Outcome]
"""By variant and seed."""


class Pace:
    """How long runs take here: what the same variant took, else a guess of how it compares, scaled by the runs so far."""

    def __init__(self, outcomes: Outcomes) -> None:
        self.measured: dict[Variant, list[float]] = {}
        for (variant, _), outcome in outcomes.items():
            self.add(variant, outcome)

    def add(self, variant: Variant, outcome: Outcome) -> None:
        if outcome.error is None:
            self.measured.setdefault(variant, []).append(outcome.seconds)

    def seconds(self, variants: Iterable[Variant]) -> float:
        """Expected for one run of each of these."""
        guessed = sum(variant.quiet_seconds * len(times) for variant, times in self.measured.items())
        scale = sum(map(sum, self.measured.values())) / guessed if guessed else 1.0
        return math.fsum(
            statistics.fmean(self.measured[variant]) if variant in self.measured else variant.quiet_seconds * scale
            for variant in variants
        )


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

    A run that fails is named in `failed` and does not stop the others; the next command tries it again.

    Returns a dict with the tables, chance, the bound for heads that ignore the order, and the paths of everything written.
    """
    store, _ = prepare_world(out, train=train, val=val, show=show)
    configs = {
        (variant, seed): TrainingConfig(
            head="evl", store=store, settings=_settings(variant, settings, tca_gain), seed=seed
        )
        for seed in range(seeds)
        for variant in VARIANTS
    }
    facts = {
        "settings": {**settings, "tca_gain": tca_gain},
        "num_val": val,
        "videos": str(out / "world"),
        "store": str(store),
        "runs": str(out / "runs"),
    }
    outcomes = _finished_runs(out / "runs", configs)
    left = [key for key in configs if key not in outcomes]
    _train_all(left, configs, outcomes, out, facts)
    return {**_write_results(out, outcomes, facts), "num_trained": len(left)}


def _settings(variant: Variant, settings: Mapping[str, Any], tca_gain: float) -> dict[str, Any]:
    """The gain only where there is something to multiply: the other runs are the same for every gain."""
    gain = {"tca_gain": tca_gain} if variant.temporal_cross_attention else {}
    return {**settings, **variant.settings, **gain}


def _train_all(
    left: list[tuple[Variant, int]],
    configs: Mapping[tuple[Variant, int], TrainingConfig],
    outcomes: Outcomes,
    out: Path,
    facts: Mapping[str, Any],
) -> None:
    """Train what is left, into `outcomes`; the files of results are as new as the last run."""
    pace = Pace(outcomes)
    variants = [variant for variant, _ in left]
    announce(len(configs), len(left), pace.seconds(variants), timed=bool(pace.measured))
    with ablation_bar(len(configs), len(outcomes)) as screen:
        for i, (variant, seed) in enumerate(left):
            screen.begin(f"{variant.label}, seed {seed}", pace.seconds([variant]), pace.seconds(variants[i + 1 :]))
            outcome = _train(configs[variant, seed], out / "runs", screen)
            outcomes[variant, seed] = outcome
            pace.add(variant, outcome)
            screen.finish(outcome.top1, outcome.seconds, outcome.error, pace.seconds(variants[i + 1 :]))
            _write_results(out, outcomes, facts)


def _train(config: TrainingConfig, runs: Path, screen: AblationScreen) -> Outcome:
    run, began = next_run_folder(config.head, runs), time.perf_counter()
    try:
        train_head(replace(config, out=run), on_plan=screen.plan, on_step=screen.step)
    except Exception as error:  # whatever it is, the other runs can do without this one
        reason = f"{type(error).__name__}: {error}"
        return Outcome(run=run, top1=None, seconds=time.perf_counter() - began, error=reason)
    return _outcome(Run.open(run))


def _outcome(run: Run) -> Outcome:
    """Of a finished run, by the line of its last epoch."""
    epochs = run.metrics()
    return Outcome(run=run.path, top1=epochs[-1]["val_top1"], seconds=sum(epoch["seconds"] for epoch in epochs))


def _finished_runs(runs: Path, configs: Mapping[tuple[Variant, int], TrainingConfig]) -> Outcomes:
    """Those of `configs` that a run folder with weights was trained with."""
    store = next(iter(configs.values())).store
    assert store is not None
    with FeatureStore.open(store) as opened:
        num_videos = opened.splits
        asked = {key: _fingerprint(_run_config(config, opened), num_videos) for key, config in configs.items()}
    there: dict[str, Run] = {}
    for path in sorted(runs.glob("*/head.safetensors")):
        if (run := Run.open(path.parent)).head == "evl" and run.metrics():
            there[_fingerprint(run.config, num_videos)] = run
    return {key: _outcome(there[asked[key]]) for key in configs if asked[key] in there}


def _fingerprint(run_config: Mapping[str, Any], num_videos: Mapping[str, int]) -> str:
    """Fields that the head or recipes have had only since the run take their defaults, as when its weights are loaded; runs that
    do not tell their precision had no other than float32, and those that do not tell the size of their store are taken to be of
    this one. Its key does not: it says how features were made, and not of which videos."""
    defaults = {
        name: {field.name: field.default for field in fields(config) if field.default is not MISSING}
        for name, config in (("head_config", get_head(run_config["head"]).Config), ("recipe", Recipe))
    }
    same = {"precision": "float32", "num_videos": num_videos}
    same |= {name: run_config[name] for name in _SAME if name in run_config}
    whole = {name: {**default, **run_config[name]} for name, default in defaults.items()}
    return json.dumps({**same, **whole}, sort_keys=True)


def _run_config(config: TrainingConfig, store: FeatureStore) -> dict[str, Any]:
    """What `train_head` will write into config.json, as far as it tells runs apart."""
    head, manifest = get_head(config.head), store.manifest
    head_settings, recipe = split_settings(config.settings, head.Config, Recipe)
    views, definitions = training_views(manifest, config.train_split), view_definitions(manifest)
    return {
        "head": config.head,
        "head_config": asdict(build_head_config(config.head, head_settings, manifest)),
        "recipe": asdict(build(Recipe, {**asdict(head.recipe), "steps": None, **recipe})),
        "dataset": manifest.dataset,
        "train_split": config.train_split,
        "views": {str(view): definitions[view] for view in views},
        "seed": config.seed,
        "precision": training_precision(config.precision, select_device(config.device)).name,
        "store_key": manifest.key,
        "num_videos": store.splits,
    }


def _write_results(out: Path, outcomes: Outcomes, facts: Mapping[str, Any]) -> dict[str, Any]:
    """ablation.json and ablation.csv, and what they say."""
    failed = [
        {"variant": variant.label, "seed": seed, "run": str(outcome.run), "error": outcome.error}
        for (variant, seed), outcome in outcomes.items()
        if outcome.error is not None
    ]
    result = {
        "tables": {name: [_row(row, outcomes) for row in table] for name, table in TABLES.items()},
        "seeds": sorted({seed for _, seed in outcomes}),
        "failed": failed,
        "chance": 1 / len(MOTIONS),
        "order_blind_bound": ORDER_BLIND_BOUND,
        **facts,
        "results": [str(out / "ablation.json"), str(out / "ablation.csv")],
    }
    write_text(out / "ablation.json", json.dumps(result, indent=2) + "\n")
    write_text(out / "ablation.csv", _csv(result["tables"]))
    return result


def _row(row: PaperRow, outcomes: Outcomes) -> dict[str, Any]:
    """A row of a table: its settings, its runs, their mean and sample standard deviation, and the paper's numbers."""
    runs = {
        seed: outcome
        for (variant, seed), outcome in sorted(outcomes.items(), key=lambda item: item[0][1])
        if variant == row.variant
    }
    top1 = [outcome.top1 for outcome in runs.values() if outcome.top1 is not None]
    seconds = [outcome.seconds for outcome in runs.values() if outcome.top1 is not None]
    return {
        **{name: getattr(row.variant, name) for name in MODULES},
        "depth": row.variant.depth,
        "mean": statistics.fmean(top1) if top1 else None,
        "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "seconds": statistics.fmean(seconds) if seconds else None,
        "paper_k400": row.k400,
        "paper_ssv2": row.ssv2,
        "runs": [
            {
                "seed": seed,
                "top1": outcome.top1,
                "seconds": outcome.seconds,
                "run": str(outcome.run),
                "error": outcome.error,
            }
            for seed, outcome in runs.items()
        ],
    }


def _csv(tables: Mapping[str, list[dict[str, Any]]]) -> str:
    text = io.StringIO()
    names = ("seed", "top1", "seconds", "run", "error")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", *MODULES, "depth", *names])
    for table, rows in tables.items():
        for row in rows:
            settings = [table, *(int(row[name]) for name in MODULES), row["depth"]]
            writer.writerows([*settings, *(run[name] for name in names)] for run in row["runs"])
    return text.getvalue()
