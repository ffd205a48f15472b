"""Which heads are trained side by side: never of two streams, never more than fit, and said before the start."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vcache.pipelines.training.sweep_groups import (
    USABLE,
    HeadDemand,
    SweepGroup,
    describe_groups,
    free_memory,
    plan_groups,
)


def demand(name: str, *, parameters: int = 100, features: Mapping[str, int] | None = None, **stream: Any) -> HeadDemand:
    features = {"tokens/1": 1000} if features is None else features
    return HeadDemand(
        name=name,
        stream={"batch_size": 8, "views": None} | stream,
        num_parameters=parameters,
        averaged=False,
        arrays={array: size // 2 for array, size in features.items()},
        features=features,
    )


def test_shared_batches_are_counted_once_and_weights_of_each() -> None:
    a = demand("a", features={"tokens/1": 1000})
    b = demand("b", features={"tokens/1": 1000, "tokens/2": 3000})
    stored, features, activations, state = 3 * (500 + 1500), 4000, 2 * 4000, 2 * 16 * 100
    assert SweepGroup(demands=(a, b)).num_bytes == stored + features + activations + state


def test_blocks_of_the_backbone_are_counted_once_for_each_dtype_by_the_head_that_runs_the_most() -> None:
    group = SweepGroup(demands=(demand("a"), demand("b"), demand("c")))
    frozen: tuple[dict[str, int], ...] = ({"float16": 500}, {"float16": 300}, {"float32": 70})
    running = tuple(replace(one, frozen=more) for one, more in zip(group.demands, frozen, strict=True))
    assert SweepGroup(demands=running).num_bytes == group.num_bytes + 570


demands = st.builds(
    demand,
    st.uuids().map(str),
    parameters=st.integers(0, 1000),
    features=st.dictionaries(st.sampled_from(["tokens/1", "tokens/2", "cls/2"]), st.integers(1, 9000), min_size=1),
    batch_size=st.sampled_from([4, 8]),
)


@given(st.lists(demands, max_size=9), st.integers(0, 100_000), st.none() | st.integers(1, 4))
def test_groups_are_of_one_stream_in_order_and_as_large_as_fit(
    given_demands: list[HeadDemand], free: int, together: int | None
) -> None:
    groups = plan_groups(given_demands, free, together)
    for batch_size in (4, 8):
        ours = [group for group in groups if group.demands[0].stream["batch_size"] == batch_size]
        grouped = [one for group in ours for one in group.demands]
        assert grouped == [one for one in given_demands if one.stream["batch_size"] == batch_size]
        for group in ours:
            many = len(group.demands) > 1
            assert not many or (
                group.num_bytes <= USABLE * free if together is None else len(group.demands) <= together
            )
        for group, after in itertools.pairwise(ours):
            larger = SweepGroup(demands=(*group.demands, after.demands[0]))
            assert larger.num_bytes > USABLE * free if together is None else len(larger.demands) > together


def test_one_group_says_that_batches_are_read_once() -> None:
    groups = plan_groups([demand("a"), demand("b"), demand("c")], 10**6)
    assert describe_groups(groups, 10**6) == [
        "3 heads in 1 group, every batch is read once for all; about 9.3 kB of 1.0 MB of free memory"
    ]


def test_several_groups_say_why_and_who_is_in_them() -> None:
    heads = [demand(name, parameters=1000) for name in "abcd"] + [demand("e", batch_size=4)]
    free = int(SweepGroup(demands=tuple(heads[:3])).num_bytes / USABLE) + 1
    lines = describe_groups(plan_groups(heads, free), free)
    assert lines[0] == "5 heads in 3 groups, one after the other; each reads its batches once"
    assert lines[1] == "  because heads share batches only with the same batch_size"
    assert lines[2] == "  because more heads do not fit into 90% of the 58.3 kB of memory that are free"
    assert lines[3:] == [
        "  1  3 heads, about 52.5 kB: a, b ... c",
        "  2  1 head, about 20.5 kB: d",
        "  3  1 head, about 6.1 kB: e",
    ]
    lines = describe_groups(plan_groups(heads[:4], 10**9, 2), 10**9, 2)
    assert lines[1] == "  because --together allows 2 at once"


def test_a_head_that_fits_nowhere_is_tried_and_said() -> None:
    (alone,) = groups = plan_groups([demand("a")], 100)
    assert len(alone.demands) == 1
    assert "a alone needs about 6.1 kB, and 100 B are free: it may fail." in describe_groups(groups, 100)[-1]


def test_free_memory_is_between_nothing_and_all_of_the_machine() -> None:
    total = 1024 * int(Path("/proc/meminfo").read_text().splitlines()[0].split()[1])
    assert 0 < free_memory(torch.device("cpu")) < total


@pytest.mark.parametrize("averaged", [False, True])
def test_averages_of_the_weights_are_counted(averaged: bool) -> None:
    one = demand("a", parameters=7)
    assert HeadDemand(**{**vars(one), "averaged": averaged}).state == (140 if averaged else 112)


def test_a_tenth_of_the_free_memory_is_left_to_the_allocator() -> None:
    """Two heads that take what is free to the last byte are two groups; with a ninth more they are one."""
    heads = [demand("a", parameters=10_000), demand("b", parameters=10_000)]
    needed = SweepGroup(demands=tuple(heads)).num_bytes
    assert [len(plan_groups(heads, free)) for free in (needed, needed * 10 // 9 + 1)] == [2, 1]
