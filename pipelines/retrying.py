"""`vcache extract --retry-failed`: the videos that failed before are extracted again, and their rows filled."""

from collections.abc import Iterable

from vcache.store.errors import UnsupportedLocation
from vcache.store.object_path import ObjectPath
from vcache.store.origin import Origin
from vcache.store.reader import FeatureStore
from vcache.store.retry import Report, RetrySummary, retry_rows


def retry_failed(
    store: FeatureStore,
    origin: Origin,
    splits: Iterable[str],
    report: Report = lambda done, total: None,
    *,
    allow_partial: bool = False,
) -> RetrySummary:
    """Fill the failed rows of these splits whose videos can be read now, in all views and passes; hold `sole_writer`.

    Args:
        allow_partial: also try the rows of damaged videos, whose videos may be whole now. `origin` has to allow it, too.

    Raises:
        UnsupportedLocation: the store is not in a local folder.
        CannotRecompute: features made now would be others than those in the store; nothing has changed.
    """
    if isinstance(store.path, ObjectPath):
        raise UnsupportedLocation(
            f"failed videos of {store.path} cannot be filled in: only local files can be replaced safely. Copy the store to a "
            "local folder, retry there, and copy what changed back."
        )
    known = [split for split in splits if split in store.splits]
    return retry_rows(store, origin, known, retry_partial=allow_partial, report=report)
