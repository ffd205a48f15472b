"""`--part I/N`: which shards belong to which of N processes that write one store, where no scheduler shares them out."""

from collections.abc import Iterable, Mapping

from vcache.pipelines.shards import ShardTask
from vcache.store.parts import PartName
from vcache.store.reader import FeatureStore


def part_of(store: FeatureStore, tasks: Iterable[ShardTask], part: int, num_parts: int) -> list[ShardTask]:
    """The tasks of process `part` of `num_parts`, counted from 1.

    The shards of the store are numbered through, in the order in which its splits and their parts were added, and dealt out in
    turn. So all processes agree, whatever is committed already and whichever splits they were asked for, and all views
    of a video go to the same one:

        train 0 1 2 3 | val 0 1 | train+1 0 1 2     of 4 processes the third has train 2 and train+1 0
    """
    num_shards = {name: store.num_shards(name) for name in store.manifest.splits}
    return share_of(num_shards, tasks, part, num_parts)


def share_of(
    num_shards: Mapping[PartName, int], tasks: Iterable[ShardTask], part: int, num_parts: int
) -> list[ShardTask]:
    """`part_of` a store of which only the number of shards of each of its parts is known, in their order."""
    first, number = dict[PartName, int](), 0
    for name, shards in num_shards.items():
        first[name] = number
        number += shards
    return [task for task in tasks if (first[task.part] + task.shard) % num_parts == part - 1]
