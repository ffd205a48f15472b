"""The members of an ensemble: each one's file of predictions found, read, and its scores made probabilities."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vcache.pipelines.evaluation.alignment import EnsembleError, Member, align
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.runs import Run

_PLAIN_NAME = re.compile(r".+-\d+x\d+")
"""SPLIT-VIEWS; other weights and averages add their names behind."""


class NoPredictions(EnsembleError):
    """A run was not evaluated in the way that is asked for."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """What n models say of the same M videos."""

    names: tuple[str, ...]
    said: tuple[Predictions, ...]
    """Of each member all that its file holds, in the common order."""
    probabilities: tuple[Tensor, ...]
    """Of each member (M, K), float64."""
    complements: tuple[Tensor, ...]
    """1 - probability, exact where that is near 1; empty where the classes of a video exclude each other."""
    targets: Tensor
    """Int (M,), or Float (M, K) multi-hot."""
    first: Predictions
    """Of the first member that names its videos."""
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        return self.targets.ndim == 2

    def only(self, rows: Tensor) -> "Members":
        """The same of some videos, but for `said` and `first`."""
        return replace(
            self,
            probabilities=tuple(p[rows] for p in self.probabilities),
            complements=tuple(q[rows] for q in self.complements),
            targets=self.targets[rows],
        )


def find_predictions(path: Path, *, split: str | None = None, views: str | None = None) -> Path:
    """The file of predictions that `path` means: itself, or of a run folder the one of that split and these views.

    Where `vcache eval` was run in several ways, that of the last weights and the usual average, which has the plain name.

    Raises:
        NoPredictions: none of the run's files fits.
        EnsembleError: nothing is there, or several of the run's files fit.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise EnsembleError(f"{path} is not there. Name a run folder, or a .npz with an array `scores`.")
    run = Run.open(path)
    fitting = [file for file in sorted((path / "predictions").glob("*.npz")) if _fits(file, split, views)]
    plain = [file for file in fitting if _PLAIN_NAME.fullmatch(file.stem)]
    for files in (fitting, plain):
        if len(files) == 1:
            return files[0]
    if fitting:
        listed = ", ".join(file.name for file in fitting)
        raise EnsembleError(
            f"{path / 'predictions'} holds {listed}: name one of them, or choose by --split and --views."
        )
    told = (f" of split {split!r}" if split else "") + (f" in {views} views" if views else "")
    words = [
        " --store STORE" if run.imported else "",
        f" --split {split}" if split else "",
        f" --views {views}" if views else "",
    ]
    raise NoPredictions(f"{path} has no predictions{told}. Make them with:  vcache eval {path}{''.join(words)}")


def read_members(paths: Sequence[Path], *, common: bool = False) -> Members:
    """The predictions in these files, aligned by video and class, as probabilities.

    Args:
        common: leave out the videos that some members lack, rather than refuse.

    Raises:
        EnsembleError: they are of other videos, classes, targets or kinds.
        PredictionsError: a file cannot be read.
    """
    names = _distinct_names(paths)
    read = [Member(name=name, says=Predictions.load(path)) for name, path in zip(names, paths, strict=True)]
    aligned = align(read, common=common)
    targets = torch.from_numpy(aligned.targets)
    targets = targets.float() if targets.ndim == 2 else targets.long()
    for member in aligned.members:
        _check_kind(member, targets.ndim == 2)
        _check_numbers(member)
    pairs = [_probabilities(member.says, targets.ndim == 2) for member in aligned.members]
    notes = chain(aligned.notes, *map(_note_on_kind, aligned.members))
    said = [member.says for member in aligned.members]
    return Members(
        names=names,
        said=tuple(said),
        probabilities=tuple(p for p, _ in pairs),
        complements=tuple(q for _, q in pairs) if targets.ndim == 2 else (),
        targets=targets,
        first=_with_common_classes(said),
        class_names=next((says.class_names for says in said if says.class_names is not None), None),
        notes=tuple(notes),
    )


def _with_common_classes(said: Sequence[Predictions]) -> Predictions:
    """The first that names its videos; which classes were trained on, it says where that is true of all."""
    first = next((says for says in said if says.video_ids is not None), said[0])
    known = {(says.of_classes, None if says.trained_on is None else tuple(says.trained_on.tolist())) for says in said}
    return first if len(known) == 1 else replace(first, of_classes="", trained_on=None)


def _fits(file: Path, split: str | None, views: str | None) -> bool:
    if split is None and views is None:
        return True
    there = Predictions.load(file)
    return split in (None, there.split) and views in (None, there.views)


def _distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of the paths that tell them apart; the only file of a run that takes part goes by its run."""
    runs = [path.parent.parent if path.parent.name == "predictions" else path for path in paths]
    for told in (runs, paths):
        for length in range(1, max(len(path.parts) for path in told) + 1):
            names = tuple(str(Path(*path.parts[-length:])) for path in told)
            if len(set(names)) == len(names):
                return names
    twice = next(path for path in paths if paths.count(path) > 1)
    raise EnsembleError(f"{twice} is given twice. Name each member once.")


def _check_kind(member: Member, multi_label: bool) -> None:
    expected = "sigmoid" if multi_label else "softmax"
    if member.says.kind != expected:
        what = "may have several classes" if multi_label else "have one class each"
        mend = f"Add an array kind = {expected!r} to it" if member.says.read_as else "Name predictions of the same task"
        raise EnsembleError(
            f"the scores of {member.name} are for {member.says.kind}, and the videos {what}, which takes {expected}. {mend}."
        )


def _check_numbers(member: Member) -> None:
    # A probability of 0 has the logarithm minus infinity, and one of 1 infinite log-odds.
    largest = member.says.scores.max(axis=1)  # NaN if any is
    odd = np.flatnonzero(np.isnan(largest) if member.says.kind == "sigmoid" else ~np.isfinite(largest))
    if len(odd):
        raise EnsembleError(
            f"{member.name} has scores that are no numbers, those of {len(odd)} videos, the first in row {odd[0]}. Leave it out, "
            "or write it again."
        )


def _probabilities(says: Predictions, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Probabilities and their complements."""
    x = torch.from_numpy(says.scores).double()
    if multi_label:
        return x.sigmoid(), (-x).sigmoid()
    p = x.softmax(dim=1)
    return p, 1 - p


def _note_on_kind(member: Member) -> list[str]:
    """What was made of scores whose file does not say what they are."""
    if not member.says.read_as:
        return []
    if member.says.read_as == "probabilities":
        return [f"{member.name}: its scores are probabilities, and averaged as they are."]
    return [f"{member.name}: its scores are taken for logits, of which {member.says.kind} makes probabilities."]
