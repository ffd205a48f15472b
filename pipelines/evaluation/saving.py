"""Where `vcache eval` and `vcache zero-shot` write their predictions: an npz for programs (predictions.py), a CSV for people."""

import re
from collections.abc import Callable
from pathlib import Path

from vcache.pipelines.evaluation.class_choice import TRAINED
from vcache.pipelines.evaluation.head_evaluation import Evaluation
from vcache.pipelines.evaluation.predictions import Predictions


def save_predictions(
    evaluation: Evaluation,
    run: Path,
    where: Path | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> tuple[Path, ...]:
    """Write both files and return their paths, the npz first.

    Args:
        where: a file named *.npz, or a folder; None is RUN/predictions. A run that cannot be written into is then no error:
            `on_note` hears of it, and nothing is returned.

    Raises:
        OSError: `where` cannot be written.
    """
    named = where is not None and where.suffix == ".npz"
    npz = where if where is not None and named else (where or run / "predictions") / f"{file_stem(evaluation)}.npz"
    try:
        return write_predictions(evaluation.predictions, npz)
    except OSError as error:
        if where is not None:
            raise
        on_note(f"the predictions are not saved: {error}. Name a place with --save, or say --no-save.")
        return ()


def write_predictions(predictions: Predictions, npz: Path) -> tuple[Path, Path]:
    """Write the npz and, beside it, the CSV; returns both paths."""
    csv = npz.with_suffix(".csv")
    predictions.save(npz)
    predictions.save_csv(csv)
    return npz, csv


def file_stem(evaluation: Evaluation) -> str:
    """ "val-3x1", and what is not the usual: "val-3x1-best", "val-3x1-logits", "val-3x1-left-out", "val-3x1-all-ucf101"."""
    predictions = evaluation.predictions
    parts = [predictions.split, predictions.views]
    parts += [evaluation.which] if evaluation.which != "last" else []
    # One view is not averaged, whatever was asked for.
    parts += [predictions.average] if predictions.average != "softmax" and predictions.views != "1x1" else []
    parts += [predictions.of_classes] if predictions.of_classes not in ("", TRAINED) else []
    parts += [re.sub(r"[^A-Za-z0-9.+-]+", "_", evaluation.dataset)] if evaluation.dataset else []
    return "-".join(parts)
