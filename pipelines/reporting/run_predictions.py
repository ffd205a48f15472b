"""The predictions that a report shows: those that `vcache eval` has saved, where they are of this run, else made as it does."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vcache.pipelines.evaluation.class_choice import TRAINED
from vcache.pipelines.evaluation.evaluate import choose_split, evaluate
from vcache.pipelines.evaluation.head_evaluation import Evaluation
from vcache.pipelines.evaluation.predictions import Predictions, PredictionsError
from vcache.pipelines.evaluation.saving import save_predictions
from vcache.pipelines.reporting.run_record import RunRecord
from vcache.pipelines.runs import RunError
from vcache.pipelines.stored_views import ViewsError, parse_grid
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is evaluated, and where."""

    store: StorePath | None = None
    split: str | None = None
    device: str = "auto"
    save: bool = True


def find_evaluation(
    record: RunRecord, store: FeatureStore | None, asked: Asked, on_note: Callable[[str], None]
) -> Evaluation | None:
    """Of the last weights on the split to validate on, or on the one that is asked for.

    None where nothing is saved and no store is there, or the run is not finished; `on_note` hears why.
    """
    if not record.finished:
        return None
    saved = saved_evaluation(record, store, asked.split)
    if saved is not None or store is None:
        if saved is None:
            on_note("No predictions are saved in the run, and without its store none can be made.")
        return saved
    try:
        made = evaluate(record.path, store=store.path, split=asked.split, device=asked.device, on_note=on_note)
    except RunError as error:
        if asked.split is not None:
            raise
        on_note(f"The run was not evaluated: {error}")
        return None
    if asked.save:
        save_predictions(made, record.path, on_note=on_note)
    return made


def saved_evaluation(record: RunRecord, store: FeatureStore | None, split: str | None) -> Evaluation | None:
    """That of the most views among RUN/predictions, if it is of this run, this store and all of its videos now."""
    if split is None and store is not None:
        try:
            split = choose_split(store, None, record.config.get("train_split"))
        except RunError:
            return None
    found = []
    for path in sorted((record.path / "predictions").glob("*.npz")):
        with suppress(PredictionsError):
            predictions = Predictions.load(path)
            if _is_plain(path, predictions) and _belongs(record, predictions) and split in (None, predictions.split):
                found.append(predictions)
    if split is None:
        found = [one for one in found if one.split != record.config.get("train_split")]
    found = [one for one in found if store is None or _is_current(one, store, record)]
    if not found:
        return None
    most = max(found, key=lambda one: _num_views(one.views))
    failed = len(store.failures(most.split)) if store is not None else 0
    return Evaluation(metrics=most.metrics(), kinds=(), predictions=most, which="last", num_failed=failed)


def _is_plain(path: Path, predictions: Predictions) -> bool:
    """Named as those of the last weights on the run's own classes and store, with the averaging of the head's choice."""
    return path.stem == f"{predictions.split}-{predictions.views}" or (
        path.stem == f"{predictions.split}-{predictions.views}-{predictions.average}"
    )


def _belongs(record: RunRecord, predictions: Predictions) -> bool:
    key, names = record.config.get("store_key"), record.class_names
    return (
        predictions.targets is not None
        and predictions.of_classes in ("", TRAINED)
        and (key is None or predictions.store_key == key)
        and (not names or predictions.class_names == names)
    )


def _is_current(predictions: Predictions, store: FeatureStore, record: RunRecord) -> bool:
    """Whether the split has the same videos now. Of a run that left classes out, only that none is gone."""
    if predictions.split not in store.splits or predictions.store_key != store.manifest.key:
        return False
    ids = set(store.videos(predictions.split).ids)
    if not ids.issuperset(predictions.video_ids or ()):
        return False
    return bool(record.run.left_out) or len(ids) - len(store.failures(predictions.split)) <= len(predictions)


def _num_views(word: str) -> int:
    with suppress(ViewsError):
        return math.prod(parse_grid(word))
    return 1
