"""Who takes part in a comparison: runs, sweeps and files of predictions become files, each under the name of its setting."""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.evaluation.members import NoPredictions, find_predictions
from vcache.pipelines.evaluation.saving import save_predictions
from vcache.pipelines.runs import Run
from vcache.pipelines.stored_views import parse_grid
from vcache.pipelines.training.sweep import Sweep, is_sweep

_NOT_OF_THE_SETTING = frozenset(
    ("seed", "data_seed", "train_digest", "store", "num_videos", "versions", "device", "training", "num_processes")
)
"""Of a run's config.json: what trainings of one setting may differ in. `training` says the same again, as it was asked."""


class CompareError(ValueError):
    """A comparison that cannot be made of what is named."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One training, or one file of anyone."""

    path: Path
    """The run folder, or the file of predictions."""
    setting: str = ""
    """The same for trainings that differ in their seed alone; empty where that is not known."""
    seed: int | None = None
    label: str = ""
    """What a sweep calls the setting."""


def entrants(paths: Sequence[Path], on_note: Callable[[str], None]) -> list[Entrant]:
    """The runs and files named, and of each sweep the runs that are done; `on_note` hears of the others.

    Raises:
        CompareError: a sweep has no run that is done.
        RunError: a folder is no run, or a run is not complete.
    """
    found: list[Entrant] = []
    sweeps = [path for path in paths if is_sweep(path)]
    for path in paths:
        if path in sweeps:
            found += _of_sweep(path, on_note, with_folder=len(sweeps) > 1)
        else:
            found.append(_of_run(path) if path.is_dir() else Entrant(path=path))
    return found


def _of_run(path: Path, label: str = "") -> Entrant:
    config = Run.open(path).config
    told = {name: value for name, value in config.items() if name not in _NOT_OF_THE_SETTING}
    seed = config.get("seed")
    if seed is None:  # an imported run
        return Entrant(path=path, label=label)
    return Entrant(path=path, setting=label or json.dumps(told, sort_keys=True), seed=seed, label=label)


def _of_sweep(path: Path, on_note: Callable[[str], None], *, with_folder: bool) -> list[Entrant]:
    results = Sweep.open(path).results()
    done = [result for result in results if result.is_done]
    resume = shlex.join(["vcache", "resume", str(path)])
    if not done:
        raise CompareError(f"{path} has no run that is done. Train its {len(results)} with:  {resume}")
    if len(done) < len(results):
        on_note(
            f"{len(results) - len(done)} of the {len(results)} runs of {path} are not done, and not compared: {resume}"
        )
    folder = f"{path.resolve().name} " if with_folder else ""
    return [_of_run(Path(result.run), folder + result.label) for result in done]


def groups_of(found: Sequence[Entrant], *, each: bool) -> list[list[int]]:
    """Places of the trainings of each setting, in the order in which settings come first.

    Trainings are of one setting if they differ in the seed alone. With `each`, or where all are of one setting, every one is
    by itself.
    """
    alone = [[place] for place in range(len(found))]
    if each:
        return alone
    settings: dict[str, list[int]] = {}
    for place, entrant in enumerate(found):
        settings.setdefault(entrant.setting or f"alone {place}", []).append(place)
    for places in list(settings.values()):
        if len({found[place].seed for place in places}) < len(places):  # one seed twice is no sample of seeds
            return alone
    return list(settings.values()) if len(settings) > 1 else alone


def group_names(found: Sequence[Entrant], names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """What the groups are called: a training by its own name, seeds by their sweep's label or by what their names share."""
    told = [_group_name([found[place] for place in places], [names[place] for place in places]) for places in groups]
    if len(set(told)) == len(told):
        return told
    return [names[places[0]] + (f" +{len(places) - 1}" if len(places) > 1 else "") for places in groups]


def _group_name(found: Sequence[Entrant], names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(list(names)).rstrip("-_ =").removesuffix("seed").rstrip("-_ =")
    return found[0].label or shared or f"{names[0]} +{len(names) - 1}"


def with_predictions(
    found: Sequence[Entrant],
    *,
    split: str | None = None,
    views: str | None = None,
    device: str = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Entrant]:
    """The same with the files of their predictions as paths; a run that has none is evaluated first, as by `vcache eval`.

    Raises:
        EnsembleError: nothing is there, or several files fit.
        RunError: a run cannot be evaluated.
        CompareError: a run cannot be written into.
    """

    evaluated: list[Path] = []

    def file_of(path: Path) -> Path:
        try:
            return find_predictions(path, split=split, views=views)
        except NoPredictions:
            if Run.open(path).imported:  # it has no store of its own: the error has the line that names one
                raise
        on_stage(f"evaluating {path}")
        evaluation = evaluate(
            path, split=split, views=parse_grid(views) if views else None, device=device, on_note=on_note
        )
        if saved := save_predictions(evaluation, path, on_note=on_note):
            evaluated.append(path)
            return saved[0]
        command = shlex.join(["vcache", "eval", str(path), "--save", "FILE.npz"])
        raise CompareError(f"{path} cannot be written into. Name FILE.npz in its place after:  {command}")

    ready = [replace(entrant, path=file_of(entrant.path)) for entrant in found]
    if evaluated:
        which = str(evaluated[0]) if len(evaluated) == 1 else f"{len(evaluated)} runs"
        on_note(f"{which} had no such predictions: evaluated now, and kept in predictions/ of the run.")
    return ready
