"""Which videos of a split can be read, view by view, and why the others cannot."""

from collections.abc import Iterable, Sequence

import numpy as np

from vcache.pipelines.matching import completing_command
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.errors import ArrayNotFound
from vcache.store.reader import FeatureStore


class IncompleteSplit(RuntimeError):
    """Some videos of the split are neither stored nor recorded as failed: their extraction has not finished."""


class UnlikePlans(ValueError):
    """Plans that cannot share a loader: each alone would read other videos."""


def readable_rows(store: FeatureStore, split: str, plan: ReadPlan, view: int) -> np.ndarray:
    """bool (rows of the split,): which have every array of the plan in that view."""
    try:
        return store.committed_rows(split, plan.arrays, view)
    except ArrayNotFound:  # the view has not been begun
        return np.zeros(store.splits[split], dtype=np.bool_)


def readable_in_views(store: FeatureStore, split: str, plan: ReadPlan, views: Sequence[int]) -> np.ndarray:
    """bool (views, rows of the split): `readable_rows` of each of the views."""
    return np.stack([readable_rows(store, split, plan, view) for view in views])


def failed_rows(store: FeatureStore, split: str, view: int) -> np.ndarray:
    """bool (rows of the split,): which have a recorded failure in that view."""
    failed = np.zeros(store.splits[split], dtype=np.bool_)
    failed[[failure.row for failure in store.failures(split, view)]] = True
    return failed


def readable_by_all(
    store: FeatureStore, split: str, plans: Iterable[ReadPlan], views: Sequence[int], *, allow_incomplete: bool
) -> np.ndarray:
    """bool (views, rows of the split): what every plan can read, which is what each alone could.

    Raises:
        IncompleteSplit: videos are neither stored nor failed, unless `allow_incomplete`.
        UnlikePlans: alone, one of the plans would read more videos than another.
    """
    tables = []
    for plan in {frozenset(plan.arrays): plan for plan in plans}.values():
        tables.append(readable_in_views(store, split, plan, views))
        if not allow_incomplete:
            _refuse_unfinished(store, split, plan, views, tables[-1])
    if any((table != tables[0]).any() for table in tables):
        counts = ", ".join(str(int(table.any(axis=0).sum())) for table in tables)
        raise UnlikePlans(
            f"these heads find different videos readable in split {split!r} of {store.path.name} ({counts}), as some arrays "
            "are there for fewer videos than others. Train them one by one, or complete the store."
        )
    return tables[0]


def _refuse_unfinished(
    store: FeatureStore, split: str, plan: ReadPlan, views: Sequence[int], readable: np.ndarray
) -> None:
    """Failed videos are left out; unfinished ones are an error."""
    unfinished = ~readable & ~np.stack([failed_rows(store, split, view) for view in views])
    num_videos = int(unfinished.any(axis=0).sum())
    if num_videos:
        behind = [views[i] for i in np.flatnonzero(unfinished.any(axis=1)).tolist()]
        names = f" in view{'s' * (len(behind) > 1)} {', '.join(map(str, behind))}" if len(views) > 1 else ""
        raise IncompleteSplit(
            f"{num_videos} of {unfinished.shape[1]} videos of split {split!r} in {store.path.name} are not "
            f"extracted yet{names}. Finish with:  {completing_command(store, plan, behind)}\n"
            "or use what is there with --allow-incomplete."
        )
