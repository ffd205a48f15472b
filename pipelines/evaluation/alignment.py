"""Predictions of several models brought to the same videos, classes and targets, in the same order.

Videos go by their ids and classes by their names. What a file does not name is taken in its order, and a note says so.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vcache.pipelines.evaluation.predictions import Predictions


class EnsembleError(ValueError):
    """Members that cannot be averaged, or an average that was asked for and cannot be made."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of an ensemble, as messages name it, and what it says of the videos."""

    name: str
    says: Predictions


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """Members whose rows are the same videos and whose columns are the same classes."""

    members: tuple[Member, ...]
    targets: np.ndarray
    """(M,) int64, or (M, K) uint8 where a video may have several classes."""
    notes: tuple[str, ...]
    """In a sentence each, what was taken on trust or left out."""


def align(members: Sequence[Member], *, common: bool = False) -> Aligned:
    """The same members in the order of videos and classes of the first one that names them.

    Args:
        common: leave out the videos that some members lack, rather than refuse.

    Raises:
        EnsembleError: they are of other videos, other classes or other targets, or none has targets.
    """
    for member in members:
        _check_targets(member)
    in_order, on_classes = _same_classes(members)
    same, on_videos = _same_videos(in_order, common)
    return Aligned(members=tuple(same), targets=_same_targets(same), notes=(*on_classes, *on_videos))


def _check_targets(member: Member) -> None:
    targets, num_classes = member.says.targets, member.says.scores.shape[1]
    if targets is None or targets.ndim == 2 or not len(targets):
        return
    if odd := [target for target in (targets.min(), targets.max()) if not 0 <= target < num_classes]:
        raise EnsembleError(
            f"{member.name} has a video of class {odd[0]}, and {num_classes} classes, which are numbered from 0. Leave videos "
            "without a class out of it."
        )


def _same_classes(members: Sequence[Member]) -> tuple[list[Member], list[str]]:
    base = next((member for member in members if member.says.class_names is not None), members[0])
    num_classes = base.says.scores.shape[1]
    for member in members:
        if (there := member.says.scores.shape[1]) != num_classes:
            raise EnsembleError(
                f"{member.name} has {there} classes and {base.name} {num_classes}. Name predictions for the same classes."
            )
    unnamed = [member.name for member in members if member.says.class_names is None]
    notes = [f"{', '.join(unnamed)}: no class_names, so the order of the classes is taken on trust."] if unnamed else []
    return [member if member.name in unnamed else _in_class_order(member, base) for member in members], notes


def _in_class_order(member: Member, base: Member) -> Member:
    assert member.says.class_names is not None and base.says.class_names is not None
    wanted, columns = base.says.class_names, _places(member.says.class_names, member.name, "class")
    if missing := [name for name in wanted if name not in columns]:
        others = sorted(columns.keys() - set(wanted))
        raise EnsembleError(
            f"{member.name} has {_counted(others)} that {base.name} has not, which has {_counted(missing)} instead. Name "
            "predictions for the same classes."
        )
    order = np.array([columns[name] for name in wanted])
    targets = member.says.targets
    if targets is not None:
        targets = np.argsort(order)[targets] if targets.ndim == 1 else targets[:, order]
    known = member.says.trained_on
    says = replace(
        member.says,
        scores=member.says.scores[:, order],
        targets=targets,
        class_names=base.says.class_names,
        trained_on=None if known is None else known[order],
    )
    return replace(member, says=says)


def _same_videos(members: Sequence[Member], common: bool) -> tuple[list[Member], list[str]]:
    rows = {
        member.name: _places(member.says.video_ids, member.name, "video")
        for member in members
        if member.says.video_ids is not None
    }
    base = next((member for member in members if member.name in rows), members[0])
    kept = list(rows.get(base.name, {}))
    for name, there in rows.items():
        kept = _kept_ids(kept, there, base.name, name, common)
    _check_number(members, base, len(kept) if rows else len(base.says.scores), rows.keys())
    notes = []
    if unnamed := [member.name for member in members if member.name not in rows]:
        notes.append(f"{', '.join(unnamed)}: no video_ids, so the order of the videos is taken on trust.")
    if any(len(there) > len(kept) for there in rows.values()):
        notes.append(f"only the {len(kept)} videos that all members have are used.")
    return [
        _take(member, np.array([rows[member.name][video] for video in kept], dtype=int))
        if member.name in rows
        else member
        for member in members
    ], notes


def _check_number(members: Sequence[Member], base: Member, num_videos: int, named: Collection[str]) -> None:
    """Refuse a member without ids unless it can be of the very videos that are used."""
    for member in members:
        if member.name not in named and len(member.says.scores) != num_videos:
            raise EnsembleError(
                f"{member.name} has {len(member.says.scores)} videos and no video_ids, and {num_videos} of {base.name} are to be "
                "used: which is which cannot be told. Add an array video_ids to it."
            )


def _places(values: Sequence[str], name: str, what: str) -> dict[str, int]:
    """Where each value is; they have to be different."""
    (most, count), *_ = Counter(values).most_common(1) or [("", 0)]
    if count > 1:
        raise EnsembleError(f"{name} has {what} {most!r} {count} times. Each may be there once.")
    return {value: place for place, value in enumerate(values)}


def _kept_ids(kept: list[str], there: dict[str, int], base: str, name: str, common: bool) -> list[str]:
    """The ids that both have, in the order of the first."""
    known = set(kept)
    both = [video for video in kept if video in there]
    missing, extra = [video for video in kept if video not in there], [video for video in there if video not in known]
    if not both:
        raise EnsembleError(
            f"{base} and {name} have no video in common: {_few(kept)}; {_few(extra)}. Name those of one split."
        )
    if (missing or extra) and not common:
        differ = [f"{len(ids)} only in {where} ({_few(ids)})" for ids, where in ((missing, base), (extra, name)) if ids]
        raise EnsembleError(
            f"{base} and {name} are not of the same videos: {', '.join(differ)}. Add --common to use the {len(both)} that "
            "both have."
        )
    return both


def _take(member: Member, rows: np.ndarray) -> Member:
    says = member.says
    assert says.video_ids is not None
    targets = None if says.targets is None else says.targets[rows]
    ids = tuple(says.video_ids[row] for row in rows.tolist())
    paths = None if says.paths is None else tuple(says.paths[row] for row in rows.tolist())
    says = replace(says, scores=says.scores[rows], targets=targets, video_ids=ids, paths=paths)
    return replace(member, says=says)


def _same_targets(members: Sequence[Member]) -> np.ndarray:
    known = [member for member in members if member.says.targets is not None]
    if not known:
        listed = ", ".join(member.name for member in members)
        raise EnsembleError(
            f"none of {listed} has targets, so no average can be measured. Add an array targets to one."
        )
    for member in known[1:]:
        _check_same(member, known[0])
    assert known[0].says.targets is not None
    return known[0].says.targets


def _check_same(member: Member, base: Member) -> None:
    there, wanted = member.says.targets, base.says.targets
    assert there is not None and wanted is not None
    if there.ndim != wanted.ndim:
        several, one = (member, base) if there.ndim == 2 else (base, member)
        raise EnsembleError(f"{several.name} has videos of several classes, and {one.name} one class for each.")
    differ = np.not_equal(there, wanted).reshape(len(wanted), -1).any(axis=1)
    if differ.any():
        row = int(differ.argmax())
        video = f"row {row}" if base.says.video_ids is None else repr(base.says.video_ids[row])
        raise EnsembleError(
            f"video {video} is {_class_of(base.says, row)} in {base.name} and {_class_of(member.says, row)} in {member.name} "
            f"({differ.sum()} of {len(differ)} differ). Name predictions of one annotation."
        )


def _class_of(says: Predictions, row: int) -> str:
    assert says.targets is not None
    classes = [says.targets[row]] if says.targets.ndim == 1 else np.flatnonzero(says.targets[row])
    told = [str(k) if says.class_names is None else repr(says.class_names[k]) for k in classes]
    return " + ".join(told) or "of no class"


def _counted(names: Sequence[str]) -> str:
    return f"class {names[0]!r}" if len(names) == 1 else f"{len(names)} classes ({_few(names)})"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
