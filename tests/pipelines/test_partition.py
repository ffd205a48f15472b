"""--part I/N: every shard belongs to one process, and all of them agree on which, whatever is done already."""

import re
from pathlib import Path

import pytest
from growing import X, grown_store, table

from vcache.pipelines.partition import part_of
from vcache.pipelines.request import ExtractionConfig, ExtractionError, parse_part
from vcache.pipelines.shards import ShardTask, missing_shards
from vcache.store.reader import FeatureStore
from vcache.store.writer import add_split, add_videos, declare_arrays


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Shards of 2 rows: 4 of "train", 2 of "val", 3 of "train+1"; none is written but those of "train"."""
    store, _ = grown_store(tmp_path / "s.zarr", [7])
    add_split(store, "val", table("v", 3))
    declare_arrays(store, add_videos(store, "train", table("b", 5)), [X])
    declare_arrays(store, store.parts("val")[0], [X])
    return store


def all_tasks(store: FeatureStore, splits: tuple[str, ...] = ("train", "val")) -> list[ShardTask]:
    return [
        ShardTask(part, shard, store.shard_rows(part, shard), (X,))
        for split in splits
        for part in store.parts(split)
        for shard in range(store.num_shards(part))
    ]


def names(tasks: list[ShardTask]) -> list[tuple[str, int]]:
    return [(task.part, task.shard) for task in tasks]


@pytest.mark.parametrize("num_parts", range(1, 12))
def test_every_shard_belongs_to_one_part_and_the_parts_are_even(store: FeatureStore, num_parts: int) -> None:
    tasks = all_tasks(store)
    parts = [part_of(store, tasks, part, num_parts) for part in range(1, num_parts + 1)]
    assert sorted(names([task for part in parts for task in part])) == sorted(names(tasks))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_the_order_is_that_in_which_splits_and_parts_were_added(store: FeatureStore) -> None:
    assert names(part_of(store, all_tasks(store), 3, 4)) == [("train", 2), ("train+1", 0)]


def test_who_owns_a_shard_depends_neither_on_what_is_written_nor_on_the_splits_asked_for(store: FeatureStore) -> None:
    for part in (1, 2, 3):
        owned = set(names(part_of(store, all_tasks(store), part, 3)))
        assert set(names(part_of(store, all_tasks(store, ("val",)), part, 3))) == {
            name for name in owned if name[0] == "val"
        }
        assert set(names(part_of(store, missing_shards(store, ["train", "val"], [X]), part, 3))) == {
            name for name in owned if name[0] != "train"
        }


def test_videos_that_are_added_change_no_owner(store: FeatureStore) -> None:
    before = [names(part_of(store, all_tasks(store), part, 5)) for part in range(1, 6)]
    add_videos(store, "train", table("c", 9))
    after = [names(part_of(store, all_tasks(store), part, 5)) for part in range(1, 6)]
    assert all(set(old) <= set(new) for old, new in zip(before, after, strict=True))


def test_a_part_is_written_as_a_fraction() -> None:
    assert [parse_part(text) for text in ("3/16", "1/1", "16/16")] == [(3, 16), (1, 1), (16, 16)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "--part 'x': must be I/N, as 3/16"),
        ("3", "--part '3': must be I/N"),
        ("3/", "--part '3/': must be I/N"),
        ("-1/4", "--part '-1/4': must be I/N"),
        ("\u0663/4", "must be I/N"),
        ("1/2/3", "--part '1/2/3': must be I/N"),
        ("0/4", "--part 0/4: parts are counted from 1/4 to 4/4"),
        ("5/4", "--part 5/4: parts are counted from 1/4 to 4/4"),
        ("1/0", "--part 1/0: parts are counted"),
    ],
)
def test_another_part_than_one_of_those_is_refused_with_the_form(text: str, words: str) -> None:
    with pytest.raises(ExtractionError, match=re.escape(words)):
        parse_part(text)


def test_a_request_checks_its_part_and_that_a_retry_is_alone() -> None:
    with pytest.raises(ExtractionError, match="--part 5/4"):
        ExtractionConfig(dataset="k400", part=(5, 4))
    with pytest.raises(ExtractionError, match="--retry-failed writes shards anew and needs the store alone"):
        ExtractionConfig(dataset="k400", part=(1, 4), retry_failed=True)
