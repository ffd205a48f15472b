"""`vcache verify --deep`: are the stored features still what their videos and the backbone give?"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vcache.pipelines.reextraction import Reextraction
from vcache.store.compare import Difference, compare
from vcache.store.errors import CannotRecompute, CorruptStore, StoreError
from vcache.store.findings import Finding
from vcache.store.layout import METADATA
from vcache.store.origin import arrays_of
from vcache.store.parts import PartName, split_of
from vcache.store.reader import FeatureStore
from vcache.store.view import READABLE
from vcache.store.writer import RowFailure

MAY_DIFFER = ("decoder.", "versions.")
"""Other versions usually give the same pixels and sums or nearly so; anything else in the key gives other features."""


@dataclass(frozen=True)
class SampledRow:
    """A row to be extracted again, with the arrays that hold data of it."""

    part: PartName
    view: int
    row: int
    arrays: tuple[str, ...]


@dataclass
class DeepCheck:
    """What was recomputed and how it compares."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    rows: int = 0
    """Rows that were computed again."""
    equal_rows: int = 0
    """Those of `rows` that are equal bit for bit in all arrays."""
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By kind of array, as "tokens": values compared bit-equal or not, the largest errors, and the bound."""


def version_notes(store: FeatureStore, origin: Reextraction) -> list[str]:
    """Other versions than those that a store was made with, a sentence each.

    Raises:
        CannotRecompute: anything else differs that changes features.
    """
    notes = []
    for name, stored, now in origin.differences:
        what = f"{name} was {stored!r} when {store.path.name} was made, and is {now!r} here"
        if not name.startswith(MAY_DIFFER):
            raise CannotRecompute(f"{what}: the head would see other features. Put back what the store was made with.")
        notes.append(f"{what}.")
    return notes


def check_deep(
    store: FeatureStore, origin: Reextraction, num_rows: int, seed: int, report: Callable[[int, int], None]
) -> DeepCheck:
    """Extract a random sample of the stored rows again and compare all their arrays.

    Args:
        origin: made with `same_key=False`; differences of the key are reported here.
        report: called with (rows done, rows in all).
    """
    check = DeepCheck()
    sample: list[SampledRow] = []
    try:
        sample = sample_rows(store, num_rows, seed)
        if _check_key(store, origin, check):
            for done, row in enumerate(sample):
                report(done, len(sample))
                _check_row(store, origin, row, check)
            report(len(sample), len(sample))
    except StoreError as error:
        check.findings.append(_finding(store, "unchecked", f"stored rows could not be extracted again: {error}."))
    if sample and not check.rows and not check.findings:
        what = f"none of {len(sample)} random rows could be extracted again: their videos cannot be read"
        check.findings.append(_finding(store, "unchecked", f"{what}. Say where they are with --root FOLDER."))
    return check


def sample_rows(store: FeatureStore, num_rows: int, seed: int) -> list[SampledRow]:
    """Random rows that hold data, over all splits and views alike; fewer if there are not so many."""
    rows: dict[tuple[PartName, int, int], list[str]] = defaultdict(list)
    for part in store.manifest.splits:
        for view in store.part_views(part):
            stored = store.view(part, view)
            for name in sorted(stored.specs):
                for row in np.flatnonzero(stored.row_states(name) == READABLE).tolist():
                    rows[part, view, row].append(name)
    chosen = random.Random(seed).sample(sorted(rows), min(num_rows, len(rows)))
    return [SampledRow(*place, tuple(rows[place])) for place in sorted(chosen)]


def _check_key(store: FeatureStore, origin: Reextraction, check: DeepCheck) -> bool:
    """Whether comparing makes sense: the same weights, preprocessing, sampling."""
    for name, stored, now in origin.differences:
        may_differ = name.startswith(MAY_DIFFER)
        what = f"{name} was {stored!r} when {store.path} was made, and is {now!r} here"
        if may_differ:
            note = _finding(store, "versions", f"{what}: the last bits of recomputed features may differ.")
            check.notes.append(note)
        else:
            model = f"{origin.config.model} {origin.config.pretrained or ''}".strip()
            what = f"{what}: {model} gives other features now. Put back what the store was made with; the store is as it was."
            check.findings.append(_finding(store, "spec", what))
    return not check.findings


def _check_row(store: FeatureStore, origin: Reextraction, sampled: SampledRow, check: DeepCheck) -> None:
    specs = store.view(sampled.part, sampled.view).specs
    wanted = tuple(specs[name] for name in sampled.arrays)
    ((_, result),) = origin.recompute(sampled.part, sampled.view, [sampled.row], wanted)
    if isinstance(result, RowFailure):
        what = f"cannot be extracted again: {result.path} cannot be read ({result.kind}: {result.reason})."
        check.notes.append(_row_finding(store, sampled, "gone", what))
        return
    try:
        stored = _read(store, sampled)
    except CorruptStore:
        return  # found by the check of the bytes
    made = arrays_of(result)
    differences = {spec.name: compare(stored[spec.name], made[spec.name], spec.dtype) for spec in wanted}
    check.rows += 1
    check.equal_rows += all(difference.equal for difference in differences.values())
    for name, difference in differences.items():
        _account(check.arrays, name, difference)
    if wrong := {name: difference for name, difference in differences.items() if not difference.agrees}:
        check.findings.append(_row_finding(store, sampled, "differs", _describe(store, sampled, wrong)))


def _read(store: FeatureStore, sampled: SampledRow) -> dict[str, np.ndarray]:
    """The stored row of each array."""
    split = split_of(sampled.part)
    parts = store.parts(split)
    start = sum(store.manifest.splits[part] for part in parts[: parts.index(sampled.part)])
    read = store.read_many(split, sampled.arrays, [start + sampled.row], view=sampled.view)
    return {name: rows[0] for name, rows in read.items()}


def _account(arrays: dict[str, dict[str, Any]], name: str, difference: Difference) -> None:
    account = arrays.setdefault(
        name.partition("/")[0],
        {
            "compared": 0,
            "equal": 0,
            "relative_error": 0.0,
            "largest_difference": 0.0,
            "tolerance": difference.tolerance,
        },
    )
    account["compared"] += 1
    account["equal"] += difference.equal
    account["relative_error"] = max(account["relative_error"], difference.relative)
    account["largest_difference"] = max(account["largest_difference"], difference.largest)


def _describe(store: FeatureStore, sampled: SampledRow, wrong: dict[str, Difference]) -> str:
    """Which arrays differ by how much, and what that usually means."""
    path = store.part_videos(sampled.part).paths[sampled.row]
    shown = ", ".join(f"{name} by {d.relative:.1e} (bound {d.tolerance:.1e})" for name, d in _worst_first(wrong)[:3])
    more = f" and {len(wrong) - 3} more arrays" if len(wrong) > 3 else ""
    return (
        f"is not what its video gives: {shown}{more} differ. Another video lies at {path} now, or it was exchanged before the "
        "extraction ended. Put the first one back, or extract into a new store."
    )


def _worst_first(wrong: dict[str, Difference]) -> list[tuple[str, Difference]]:
    # Frames and crop first: they say that the video itself is another.
    return sorted(wrong.items(), key=lambda item: (item[1].tolerance > 0, -item[1].relative))


def _row_finding(store: FeatureStore, sampled: SampledRow, kind: str, what: str) -> Finding:
    video_id = store.part_videos(sampled.part).ids[sampled.row]
    place = f"row {sampled.row} of {sampled.part}/view-{sampled.view} (video {video_id!r})"
    return Finding(
        kind=kind,
        message=f"{place} {what}",
        path=store.path,
        split=sampled.part,
        view=sampled.view,
        rows=(sampled.row,),
        video_ids=(video_id,),
    )


def _finding(store: FeatureStore, kind: str, message: str) -> Finding:
    return Finding(kind=kind, message=message, path=store.path / METADATA)
