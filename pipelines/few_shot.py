"""`vcache few-shot`: heads trained on K videos of each class, beside CLIP without training, as a table and a curve over K.

It is a sweep (training/sweep.py), whose folder has beside a sweep's files

OUT/few-shot.json                   the numbers of shots, and the zero-shot accuracies, found before anything is trained
OUT/few-shot.csv, few-shot.md       the table (few_shot_results.py)
OUT/few-shot.png                    the curve (few_shot_chart.py)

Text4Vis, section 4.3 and Table 8, and ActionCLIP, section 4.4 and figure 3: all classes, K videos of each.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcache.pipelines.class_text import clip_sets
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.class_choice import TRAINED, ClassChoice
from vcache.pipelines.few_shot_chart import few_shot_chart
from vcache.pipelines.few_shot_members import Shots
from vcache.pipelines.few_shot_results import (
    FewShotTable,
    Metrics,
    few_shot_csv,
    few_shot_json,
    few_shot_markdown,
    few_shot_table,
)
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.runs import RunError, write_text
from vcache.pipelines.stored_views import ONE_VIEW
from vcache.pipelines.training.preparation import PreparedHead, open_training_store, prepare_head
from vcache.pipelines.training.sweep import Sweep, SweepSummary
from vcache.pipelines.training.sweep_plan import SweepPlan
from vcache.pipelines.training.sweep_results import METRICS
from vcache.pipelines.training.sweep_spec import SweepMember
from vcache.pipelines.training.torchrun import is_first_process
from vcache.pipelines.zero_shot import evaluate_untrained
from vcache.store.reader import FeatureStore

FEW_SHOT_FILE = "few-shot.json"
FILES = ("few-shot.csv", "few-shot.md", "few-shot.png")


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A sweep over numbers of shots."""

    sweep: Sweep
    shots: tuple[Shots, ...]
    zero_shot: tuple[Metrics | None, ...]
    """Of each member: CLIP without training on the same store, classes and templates; None: it has no text of the store."""

    @classmethod
    def create(cls, path: Path | None, plan: SweepPlan, shots: Sequence[Shots]) -> "FewShot":
        """Begin it at `path`, or in runs/few-shot-1, -2, ...; CLIP without training is evaluated at once.

        Raises:
            RunError: there is something at `path`.
        """
        zero_shot = zero_shot_metrics(plan.members) if is_first_process() else (None,) * len(plan.members)
        begun = cls(sweep=Sweep.create(path, plan, name="few-shot"), shots=tuple(shots), zero_shot=zero_shot)
        if is_first_process():
            by_name = dict(zip((member.name for member in plan.members), zero_shot, strict=True))
            told = {"shots": list(shots), "zero_shot": by_name}
            write_text(begun.sweep.path / FEW_SHOT_FILE, json.dumps(told, indent=2) + "\n")
        return begun

    @classmethod
    def of(cls, sweep: Sweep) -> "FewShot | None":
        """What `create` began; None of another sweep."""
        if not is_few_shot(sweep.path):
            return None
        told = json.loads((sweep.path / FEW_SHOT_FILE).read_text())
        zero_shot = tuple(told["zero_shot"].get(member.name) for member in sweep.plan.members)
        return cls(sweep=sweep, shots=tuple(told["shots"]), zero_shot=zero_shot)

    def table(self) -> FewShotTable:
        return few_shot_table(self.sweep.plan.members, self.sweep.results(), self.shots, self.zero_shot)

    def write(self) -> tuple[Path, ...]:
        """The three files, of the runs that are done."""
        path, table = self.sweep.path, self.table()
        write_text(path / "few-shot.csv", few_shot_csv(table))
        write_text(path / "few-shot.md", few_shot_markdown(table, self.sweep.results()))
        store = self.sweep.plan.members[0].config.store
        few_shot_chart(table, store.name if store is not None else "").save(path / "few-shot.png")
        return tuple(path / name for name in FILES)

    def to_json(self, summary: SweepSummary) -> dict[str, Any]:
        files = [str(self.sweep.path / name) for name in FILES]
        told = summary.to_json()
        return {**told, "few_shot": few_shot_json(self.table()), "files": [*files, *told["files"]]}


def is_few_shot(path: Path) -> bool:
    return (path / FEW_SHOT_FILE).is_file()


def zero_shot_metrics(members: Sequence[SweepMember]) -> tuple[Metrics | None, ...]:
    """Of each member, what CLIP makes of the same validation split; members of one store, classes and templates share it."""
    found: dict[Any, Metrics | None] = {}
    return tuple(_of_member(member, found) for member in members)


def _of_member(member: SweepMember, found: dict[Any, Metrics | None]) -> Metrics | None:
    config = member.config
    with open_training_store(config) as store:
        prepared = prepare_head(config, store, select_device(config.device))
        key = (str(config.store), prepared.val_split, prepared.plan.text, prepared.classes, config.frame_step)
        if key not in found:
            found[key] = _zero_shot(prepared, store)
    return found[key]


def _zero_shot(prepared: PreparedHead, store: FeatureStore) -> Metrics | None:
    """Of the head's classes and templates, in view 0 as trained heads are validated."""
    config, templates, split = prepared.config, prepared.plan.text, prepared.val_split
    if split is None or templates not in clip_sets(store.manifest):
        return None
    names, places = store.manifest.class_names, prepared.classes
    kept = names if places is None else tuple(names[k] for k in places)
    asked = ClassChoice(which=TRAINED, places=places, names=kept, templates=templates)
    try:
        found = evaluate_untrained(
            store,
            asked,
            split,
            views=ONE_VIEW,
            frame_step=config.frame_step,
            device=select_device(config.device),
            allow_incomplete=config.allow_incomplete,
        )
    except (HeadStoreMismatch, RunError):  # no embeddings of the frames, or no video
        return None
    return {name: getattr(found.metrics, name) for name in METRICS}
