"""Does it fit? The bytes that an extraction will write against the free space of the disk that it writes to."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from vcache.pipelines.console import size
from vcache.pipelines.shards import ShardTask

# What is not in the shard files: metadata, video tables, commit records, half a block for each small file.
_RESERVE_BYTES, _RESERVE_SHARE = 64 * 2**20, 0.01


class NotEnoughSpace(OSError):
    """What is to be written is larger than the free space; the message says how much, where, and what to do."""


def tasks_bytes(tasks: Iterable[ShardTask], rows_per_shard: int) -> int:
    """Size of the shard files of these tasks, to the byte if no video fails: a failed one takes no room."""
    alike: dict[
        tuple[int, int, tuple[str, ...]], list[ShardTask]
    ] = {}  # of 260,000 videos there are 4,000 tasks of two or three kinds
    for task in tasks:
        alike.setdefault((task.view, len(task.rows), tuple(spec.name for spec in task.arrays)), []).append(task)
    return sum(
        len(group) * sum(spec.shard_bytes(num_rows, rows_per_shard) for spec in group[0].arrays)
        for (_, num_rows, _), group in alike.items()
    )


def with_reserve(num_bytes: int) -> int:
    """The free space that `num_bytes` to be written ask for; nothing asks for nothing."""
    return num_bytes and num_bytes + _RESERVE_BYTES + int(num_bytes * _RESERVE_SHARE)


def nearest_folder(path: Path) -> Path:
    """The folder at `path` or the nearest one above it that is there."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_bytes(path: Path) -> int:
    """What a user may still write at `path`, which need not be there."""
    return shutil.disk_usage(nearest_folder(path)).free


def check_room(path: Path, num_bytes: int) -> None:
    """Raise NotEnoughSpace if `num_bytes` do not fit where `path` lies or is going to lie."""
    needed, free = with_reserve(num_bytes), free_bytes(path)
    if needed > free:
        raise NotEnoughSpace(
            f"the extraction will write {size(needed)}, and {size(free)} are free in {nearest_folder(path)}. Store less with "
            "another --dtype or --cross-frame or fewer --layers (`vcache plan` with the same options has the sizes), name "
            "another disk with --store, or begin anyway with --ignore-free-space: where the disk is full the run stops, and "
            "what is committed by then is kept."
        )
