"""A grid becomes members: their order, their names and folders, and what is refused before anything is read."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.heads.registry import UnknownHead
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.sweep_spec import LONGEST_FOLDER, HeadGrid, SweepMember, expand, parse_grids

VALUES = {
    "lr": ("1e-3", "1e-2"),
    "layer": ("-1", "-2", "-3"),
    "norm": ("on", "off"),
    "fraction": ("0.5", "1"),
    "views": ("1",),
}


def test_a_grid_is_every_combination_in_the_order_given_then_the_seeds() -> None:
    grid = parse_grids(["depth=1,2,4", "temporal-conv=on,off"])
    members = expand([HeadGrid(head="evl", settings={"epochs": "3", "shots": "5"}, grid=grid, seeds=(0, 1))])
    assert [member.name for member in members[:3]] == [
        "depth=1 temporal_conv=on seed=0",
        "depth=1 temporal_conv=on seed=1",
        "depth=1 temporal_conv=off seed=0",
    ]
    assert members[-1].name == "depth=4 temporal_conv=off seed=1"
    assert members[-1].label == "depth=4 temporal_conv=off"
    assert members[-1].folder == "evl-depth4-temporal_conv_off-seed1"
    assert members[-1].varied == {"depth": "4", "temporal_conv": "off"}
    settings = {"epochs": "3", "layers": "-4:", "temporal_conv": "off"}
    assert members[-1].config == TrainingConfig(head="evl", settings=settings, shots=5, seed=1)


@given(
    names=st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=4),
    seeds=st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=3),
)
def test_members_are_the_product_and_have_names_and_folders_of_their_own(names: list[str], seeds: list[int]) -> None:
    grid = {name: VALUES[name] for name in names}
    members = expand([HeadGrid(head="linear", grid=grid, seeds=tuple(seeds))])
    expected = [(choice, seed) for choice in itertools.product(*grid.values()) for seed in seeds]
    varied = [name for name in names if len(VALUES[name]) > 1]
    assert [(tuple(m.varied.values()), m.config.seed) for m in members] == [
        (tuple(value for name, value in zip(names, choice, strict=True) if name in varied), seed)
        for choice, seed in expected
    ]
    assert len({m.name for m in members}) == len({m.folder for m in members}) == len(members)
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_.+-]*", m.folder) for m in members)
    assert [SweepMember.from_json(json.loads(json.dumps(m.to_json()))) for m in members] == list(members)


def test_only_what_differs_is_in_the_names_and_heads_where_there_are_several() -> None:
    common = {"epochs": "3"}
    members = expand(
        [
            HeadGrid(head="evl", settings={**common, "cls_dropout": "0.1"}, grid={"depth": ("1", "2")}),
            HeadGrid(head="evl", settings={**common, "temporal_conv": "off"}),
            HeadGrid(head="linear", settings={**common, "norm": "off"}),
        ]
    )
    assert [member.name for member in members] == [
        "evl cls_dropout=0.1 depth=1",
        "evl cls_dropout=0.1 depth=2",
        "evl temporal_conv=off",
        "linear",
    ]
    assert [member.name for member in expand([HeadGrid(head="evl", seeds=(4, 7))])] == ["evl seed=4", "evl seed=7"]


def test_lists_are_values_in_brackets() -> None:
    grid = parse_grids(["layers=[8,9],-2:, [10]"])
    assert grid == {"layers": ("8,9", "-2:", "10")}
    members = expand([HeadGrid(head="evl", grid=grid)])
    assert [member.config.settings["layers"] for member in members] == ["8,9", "-2:", "10"]
    assert [member.folder for member in members] == ["evl-layers8_9", "evl-layers_-2", "evl-layers10"]


def test_folders_that_would_be_the_same_or_too_long_get_their_number() -> None:
    members = expand([HeadGrid(head="evl", grid={"layers": ("-2", "-2:", ",".join(["-1"] * 90))})])
    assert members[1].folder == "evl-layers_-2-1"
    assert members[2].folder.endswith("-2") and len(members[2].folder) <= LONGEST_FOLDER + 2


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("depth", "--grid 'depth' is not of the form name=a,b,c"),
        ("depth=", "not of the form"),
        ("=1,2", "not of the form"),
        ("depth=1,,2", "depth=1,,2: a value is empty"),
        ("layers=[8,9", "brackets do not match"),
        ("layers=8]", "brackets do not match"),
        ("layers=[[8]]", "brackets do not match"),
    ],
)
def test_a_grid_that_cannot_be_read_is_refused(pair: str, words: str) -> None:
    with pytest.raises(SettingError, match=re.escape(words)):
        parse_grids([pair])


def test_a_name_varied_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="--grid lr is given twice. Give all its values at once"):
        parse_grids(["lr=1", "lr=2"])


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (HeadGrid(head="evl", grid={"depht": ("1",)}), "head 'evl': unknown setting 'depht'. Did you mean 'depth'"),
        (HeadGrid(head="evl", settings={"shot": "1"}), "unknown setting 'shot'. Did you mean 'shots'"),
        (HeadGrid(head="linear", grid={"depth": ("1",)}), "head 'linear': unknown setting 'depth'"),
        (HeadGrid(head="evl", settings={"lr": "1"}, grid={"lr": ("1", "2")}), "lr is set to 1 and varied over 1, 2"),
        (HeadGrid(head="evl", settings={"layers": "-1"}, grid={"depth": ("1", "2")}), "depth=1 and layers=-1 both"),
        (HeadGrid(head="evl", grid={"lr": ("1", "2", "1")}), "lr is varied over 1, 2, 1: 1 comes twice"),
        (HeadGrid(head="evl", seeds=(3, 3)), "seed is varied over 3, 3: 3 comes twice"),
        (HeadGrid(head="evl", grid={"device": ("cpu", "cuda")}), "device is the same for all heads of a sweep"),
        (HeadGrid(head="evl", settings={"shots": "few"}), "shots=few: int expected"),
        (HeadGrid(head="evl", grid={"shots": ("0", "2")}), "shots .0. must be at least 1"),
        (HeadGrid(head="evl", settings={"patience": "0"}), "patience .0. must be at least 1"),
        (HeadGrid(head="evl", settings={"out": "x"}), "unknown setting 'out'"),
        (HeadGrid(head="evl", seeds=()), "there is nothing to train"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_words(block: HeadGrid, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        expand([block])


def test_the_same_member_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="the sweep has evl twice"):
        expand([HeadGrid(head="evl"), HeadGrid(head="evl")])
    with pytest.raises(UnknownHead, match="Did you mean 'evl'"):
        expand([HeadGrid(head="evk")])
