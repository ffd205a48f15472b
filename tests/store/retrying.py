"""A store whose videos break and are mended, as several tests of retrying need it."""

import numpy as np

from vcache.store.commits import RowFailure
from vcache.store.origin import PartialRow
from vcache.store.reader import FeatureStore
from vcache.store.retry import retry_rows
from vcache.store.writer import ShardWriter, clean_temporary, declare_arrays, sole_writer

ROWS, ROWS_PER_SHARD = 7, 3  # shards of rows 0-2, 3-5, 6


class Videos:
    """The videos of "train": `states` has (kind, whether it can be extracted in part) of those that are broken."""

    def __init__(self, world, states=(), allow_partial=False):
        self.world, self.states, self.allow_partial, self.read = world, dict(states), allow_partial, []

    def result(self, row, arrays):
        values = {spec.name: self.world.value(spec, row) for spec in arrays}
        if row not in self.states:
            return values
        kind, in_part = self.states[row]
        video_id = self.world.videos(ROWS).ids[row]
        damage = RowFailure(row, video_id, f"folder/{video_id}.mp4", kind, f"row {row} is {kind}")
        if not (in_part and self.allow_partial):
            return damage
        # What is seen of a damaged video depends on the damage.
        return PartialRow({name: value + np.asarray(len(kind), value.dtype) for name, value in values.items()}, damage)

    def recompute(self, part, view, rows, arrays):
        for row in rows:
            self.read.append((view, row, frozenset(spec.name for spec in arrays)))
            yield row, self.result(row, arrays)


def extract(store, passes, videos):
    """Write what the store lacks; `passes` are (arrays, view, videos as they are at that time)."""
    for specs, view, then in passes:
        declare_arrays(store, "train", specs, view)
        for shard in range(store.num_shards("train")):
            stored = store.committed_arrays("train", shard, view)
            missing = [spec for spec in specs if spec.name not in stored]
            if missing:
                write(store, shard, missing, view, videos or then)
    return store


def write(store, shard, specs, view, videos):
    with ShardWriter(store, "train", shard, specs, view) as writer:
        for row in store.shard_rows("train", shard):
            result = videos.result(row, specs)
            if isinstance(result, RowFailure):
                writer.fail(result)
            elif isinstance(result, PartialRow):
                writer.write(row, result.arrays, partial=result.damage)
            else:
                writer.write(row, result)


def built(world, path, passes):
    """A store that was extracted in passes, with the lock file that every extraction leaves."""
    with world.create(path, ROWS, ROWS_PER_SHARD) as store, sole_writer(path):
        extract(store, passes, None)
    return path


def retry(path, videos, passes=(), **options):
    """What `vcache extract --retry-failed` does: the failed rows, and then whatever is not extracted."""
    with FeatureStore.open(path) as store, sole_writer(path):
        clean_temporary(store)
        summary = retry_rows(store, videos, ["train"], **options)
        extract(store, passes, videos)
        return summary


def stats(path):
    """Inode and time of modification of every file."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
