"""Predictions of a head for the videos of a split, and the file that keeps them: an npz without pickled objects.

    video_ids     text (M,)                            paths          text (M,)
    scores        float32 (M, K)                       class_names    text (K,)
    targets       int64 (M,), or uint8 (M, K)          kind         "softmax" | "sigmoid": what makes probabilities of scores
    split, views ("3x1"), average, store_key, run      text
    of_classes   "trained", "left-out", "all", "named"   trained_on   bool (K,): the classes that the model was trained on

A file of anyone else may hold `scores` alone, or with any of the others. One without `kind` whose rows are probabilities (none
below 0, each row with the sum 1; where videos have several classes, all between 0 and 1) is read as such: the scores are their
logarithms, or log-odds.
"""

import csv
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vcache.pipelines.evaluation.metrics import Metrics, compute_metrics

# What zipfile and NumPy were seen to raise when one byte of a file is changed; MemoryError is a shape that is too large.
_DAMAGE = (ValueError, EOFError, KeyError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
_TEXTS = ("split", "views", "average", "store_key", "run", "of_classes")


class PredictionsError(ValueError):
    """A file of predictions that cannot be read, or whose arrays do not belong together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """M videos, K classes. What a foreign file does not say is None, or empty text."""

    scores: np.ndarray
    """float32 (M, K): logits of one view; of several, what averaging.py makes of them."""
    kind: str = "softmax"
    """What makes probabilities of the scores: "sigmoid" where a video may have several classes."""
    targets: np.ndarray | None = None
    """int64 (M,), the index of the class, or uint8 (M, K), 1 for each of several."""
    video_ids: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    split: str = ""
    views: str = ""
    average: str = ""
    store_key: str = ""
    run: str = ""
    of_classes: str = ""
    """Which classes of the store these are, one of CLASSES, or NAMED (class_choice.py)."""
    trained_on: np.ndarray | None = None
    """bool (K,): the classes that the model was trained on."""
    read_as: str = ""
    """What the scores of a file without `kind` were taken for, "probabilities" or "logits"; it is not saved."""

    def __post_init__(self) -> None:
        num_videos, num_classes = self.scores.shape
        lengths = {"video_ids": num_videos, "paths": num_videos, "class_names": num_classes, "trained_on": num_classes}
        for name, length in lengths.items():
            values = getattr(self, name)
            if values is not None and len(values) != length:
                raise PredictionsError(
                    f"{len(values)} {name} for scores of {num_videos} videos x {num_classes} classes"
                )
        if self.targets is not None and self.targets.shape != self.scores.shape[: self.targets.ndim]:
            raise PredictionsError(
                f"targets of shape {self.targets.shape} for scores of {num_videos} videos x {num_classes} classes; "
                "they must be (videos,), or (videos, classes) where a video may have several"
            )
        if self.kind not in ("softmax", "sigmoid"):
            raise PredictionsError(f"kind is {self.kind!r}; it must be 'softmax' or 'sigmoid'")
        if self.video_ids is not None and len(set(self.video_ids)) < num_videos:
            raise PredictionsError("a video id is there twice; each video must have one row")

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.scores)

    def probabilities(self) -> Float[Tensor, "M K"]:
        """In float64; of kind "sigmoid" a row need not sum to 1."""
        scores = torch.from_numpy(self.scores).double()
        return scores.sigmoid() if self.kind == "sigmoid" else scores.softmax(dim=1)

    def target_tensor(self) -> Int[Tensor, " M"] | Float[Tensor, "M K"]:
        """The targets as `compute_metrics` takes them.

        Raises:
            PredictionsError: there are none.
        """
        if self.targets is None:
            raise PredictionsError("the predictions come without targets, so nothing can be measured.")
        return torch.from_numpy(self.targets).float() if self.targets.ndim == 2 else torch.from_numpy(self.targets)

    def metrics(self) -> Metrics:
        """Their metrics. PredictionsError, ScoresError: without targets, or with scores that cannot be ranked."""
        return compute_metrics(torch.from_numpy(self.scores), self.target_tensor(), views=self.views)

    def save(self, path: Path) -> None:
        """Write the npz under a temporary name, then rename it: a file that is there is whole."""
        arrays: dict[str, Any] = {"scores": self.scores, "kind": np.array(self.kind)}
        arrays |= {name: np.array(getattr(self, name)) for name in _TEXTS}
        optional = {"targets": self.targets, "trained_on": self.trained_on}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        for name in ("video_ids", "paths", "class_names"):
            values = getattr(self, name)
            arrays |= {} if values is None else {name: np.array(values, dtype=np.str_)}
        with _replacing(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def save_csv(self, path: Path) -> None:
        """One line per video for people: its label, the most probable class, that one's probability, whether it is right, and the
        five most probable. Where videos have several classes, right means one of them. Of more classes than were trained on, also
        whether the label is one of those."""
        names = self.class_names or tuple(map(str, range(self.scores.shape[1])))
        probabilities, groups = self.probabilities(), self._groups()
        with _replacing(path, "w") as file:
            lines = csv.writer(file, lineterminator="\n")
            titles = ("video_id", "path", "label", "predicted", "probability", "correct", "top5")
            lines.writerow((*titles, "classes") if groups else titles)
            for row, best in enumerate(self._best(5).tolist()):
                labels = self._labels(row)
                right = "" if labels is None else int(best[0] in labels)
                ids = [values[row] if values else "" for values in (self.video_ids, self.paths)]
                probability = f"{probabilities[row, best[0]].item():.6f}"
                label = _joined(names[k] for k in labels or ())
                line = (*ids, label, names[best[0]], probability, right, _joined(names[k] for k in best))
                lines.writerow((*line, _joined(dict.fromkeys(groups[k] for k in labels or ()))) if groups else line)

    def _best(self, number: int) -> Int[np.ndarray, "M best"]:
        """The classes of the largest scores, in that order; of equal ones the first class is ahead, as in the metrics."""
        left, rows = np.maximum(self.scores, np.finfo(self.scores.dtype).min), np.arange(len(self))
        best = []
        for _ in range(min(number, left.shape[1])):
            best.append(left.argmax(axis=1))
            left[rows, best[-1]] = -np.inf
        return np.stack(best, axis=1)

    def _groups(self) -> tuple[str, ...]:
        """Of each class whether it was trained on; empty where all were."""
        if self.of_classes in ("", "trained") or self.trained_on is None:
            return ()
        return tuple("trained" if known else "left-out" for known in self.trained_on)

    def _labels(self, row: int) -> list[int] | None:
        """The classes of a video; None if that is not known."""
        if self.targets is None:
            return None
        if self.targets.ndim == 2:
            return np.flatnonzero(self.targets[row]).tolist()
        return [int(self.targets[row])] if self.targets[row] >= 0 else None

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read a file of ours or of anyone; nothing in it is unpickled.

        Raises:
            PredictionsError: it is no npz, has no scores, or its arrays have shapes or types that do not belong together.
        """
        arrays = _read(path)
        try:
            fields = {name: _text(arrays, name) for name in _TEXTS}
            lists = {name: _texts(arrays, name) for name in ("video_ids", "paths", "class_names")}
            targets = _targets(arrays)
            scores, kind, read_as = _scores(arrays, targets)
            known = _trained_on(arrays)
            return cls(scores=scores, kind=kind, read_as=read_as, targets=targets, trained_on=known, **lists, **fields)  # type: ignore[arg-type]
        except PredictionsError as error:
            raise PredictionsError(f"{path}: {error}") from error


def _joined(names: Iterable[str]) -> str:
    return "; ".join(names)


class _replacing:
    """A file to write, which takes the place of `path` when all of it is there."""

    def __init__(self, path: Path, mode: Literal["w", "wb"]) -> None:
        self.path, self.temporary, self.mode = path, path.with_name(path.name + ".part"), mode

    def __enter__(self) -> IO[Any]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = {} if self.mode == "wb" else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
        self.file: IO[Any] = self.temporary.open(self.mode, **text)  # type: ignore[call-overload]
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink()


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            opened = np.load(file, allow_pickle=False)
            if not isinstance(opened, np.ndarray):
                return _arrays(opened)
    except FileNotFoundError as error:
        raise PredictionsError(f"{path} is not there. `vcache eval RUN` writes one into RUN/predictions.") from error
    except _DAMAGE as error:
        # NumPy advises to load such a file with its safety off.
        what = (
            "it holds pickled Python objects, and vcache runs no code of a file"
            if "allow_pickle" in str(error)
            else error
        )
        raise PredictionsError(
            f"{path} is no npz of plain arrays: {what}. Write one with np.savez(FILE, scores=...)."
        ) from error
    raise PredictionsError(f"{path} is one array; save it as the `scores` of an npz: np.savez(FILE, scores=...)")


def _arrays(archive: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    found = {name: archive[name] for name in archive.files}
    if odd := [name for name, x in found.items() if not isinstance(x, np.ndarray)]:
        raise ValueError(f"{odd[0]} in it is no array")
    return found


def _scores(arrays: dict[str, np.ndarray], targets: np.ndarray | None) -> tuple[np.ndarray, str, str]:
    """The scores, their kind, and what they were taken for if the file does not say it."""
    if "scores" not in arrays:
        raise PredictionsError(f"it has no array 'scores'; it has {', '.join(sorted(arrays)) or 'none'}")
    scores = arrays["scores"]
    if scores.ndim != 2 or scores.dtype.kind != "f" or 0 in scores.shape:
        raise PredictionsError(
            f"scores are {scores.dtype} of shape {scores.shape}; they must be floating-point (videos, classes)"
        )
    if "kind" in arrays:
        return scores.astype(np.float32), _text(arrays, "kind"), ""
    several, x = targets is not None and targets.ndim == 2, scores.astype(np.float64)
    kind = "sigmoid" if several else "softmax"
    # float16 sums of many probabilities are off by a few thousandths.
    if not ((x >= 0) & (x <= 1)).all() or not (several or np.allclose(x.sum(axis=1), 1, atol=1e-2)):
        return scores.astype(np.float32), kind, "logits"
    with np.errstate(divide="ignore"):
        x = np.log(x) - np.log1p(-x) if several else np.log(x)
    return x.astype(np.float32), kind, "probabilities"


def _targets(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    targets = arrays.get("targets")
    if targets is None:
        return None
    if targets.dtype.kind not in "iub" or targets.ndim not in (1, 2):
        raise PredictionsError(f"targets are {targets.dtype} of shape {targets.shape}; they must be whole numbers")
    return targets.astype(np.int64) if targets.ndim == 1 else (targets > 0).astype(np.uint8)


def _trained_on(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    known = arrays.get("trained_on")
    if known is not None and (known.dtype.kind != "b" or known.ndim != 1):
        raise PredictionsError(f"trained_on is {known.dtype} of shape {known.shape}; it must be true or false by class")
    return known


def _texts(arrays: dict[str, np.ndarray], name: str) -> tuple[str, ...] | None:
    values = arrays.get(name)
    if values is None:
        return None
    if values.dtype.kind != "U" or values.ndim != 1:
        raise PredictionsError(f"{name} are {values.dtype} of shape {values.shape}; they must be a list of text")
    return tuple(values.tolist())


def _text(arrays: dict[str, np.ndarray], name: str) -> str:
    value = arrays.get(name, np.array(""))
    if value.dtype.kind != "U" or value.ndim != 0:
        raise PredictionsError(f"{name} is {value.dtype} of shape {value.shape}; it must be one text")
    return str(value)
