"""A sweep as TOML: what a file says, what goes before what, and errors that say where."""

import re
from pathlib import Path

import pytest

from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.sweep_file import EXAMPLE, read_sweep, read_sweep_file
from vcache.pipelines.training.sweep_spec import HeadGrid, expand


def read(tmp_path: Path, text: str, **beside: object) -> list[HeadGrid]:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return read_sweep_file(path, **beside)  # type: ignore[arg-type]


def test_the_example_is_what_its_comments_say(tmp_path: Path) -> None:
    members = expand(read(tmp_path, EXAMPLE))
    assert len(members) == 11 and "= 11 members" in EXAMPLE
    assert {member.config.head for member in members} == {"evl", "linear"}
    assert all(member.config.settings["epochs"] == "20" for member in members)
    assert [member.config.seed for member in members[:4]] == [0, 1, 2, 0]


def test_a_file_is_the_grid_of_the_command_line(tmp_path: Path) -> None:
    text = """
        [[head]]
        head = "evl"
        seeds = [7, 8]
        set = { lr = 1e-3, betas = [0.9, 0.98] }
        shots = 5
        [head.grid]
        layers = [[1, 2], "-2:"]
        temporal_conv = [true, false]
    """
    assert read(tmp_path, text) == [
        HeadGrid(
            head="evl",
            settings={"shots": "5", "lr": "0.001", "betas": "0.9,0.98"},
            grid={"layers": ("1,2", "-2:"), "temporal_conv": ("true", "false")},
            seeds=(7, 8),
        )
    ]


def test_the_command_line_goes_before_a_head_and_a_head_before_what_is_common(tmp_path: Path) -> None:
    text = """
        [common]
        epochs = 20
        lr = 1e-3
        seeds = 3
        grid = { depth = [1, 2] }
        [[head]]
        head = "evl"
        steps = 100
        lr = 1e-4
        [[head]]
        head = "evl"
        layers = "-1"
        seeds = 1
        grid = { lr = [1, 2] }
    """
    first, second = read(tmp_path, text)
    assert first == HeadGrid(
        head="evl", settings={"steps": "100", "lr": "0.0001"}, grid={"depth": ("1", "2")}, seeds=(0, 1, 2)
    )
    assert second == HeadGrid(head="evl", settings={"epochs": "20", "layers": "-1"}, grid={"lr": ("1", "2")})
    first, second = read(tmp_path, text, settings={"epochs": "2", "depth": "3"}, grid={"lr": ("5", "6")}, seeds=(4,))
    expected = HeadGrid(head="evl", settings={"epochs": "2", "depth": "3"}, grid={"lr": ("5", "6")}, seeds=(4,))
    assert first == second == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head", "sweep.toml is not TOML: "),
        ("hed = 1", "unknown key 'hed'. Did you mean 'head'? There are: common, head."),
        ("", 'names no head. Add one:  [[head]]  and in the next line  head = "evl"'),
        ("head = 1", "names no head"),
        ("common = 3\n[[head]]\nhead = 'evl'", "[common]: a table expected, got 3"),
        ("[[head]]\nepochs = 1", "[[head]] 1: which head?"),
        ("[[head]]\nhed = 'evl'", "head = \"evl\"; it has 'hed', which is no setting"),
        ("[[head]]\nhead = 'evl'\ngrid = { lr = 1 }", "[[head]] 1 grid.lr: a list of values expected, got 1"),
        (
            "[[head]]\nhead = 'evl'\ngrid = { lr = [] }",
            "[[head]] 1 grid.lr: a list of values expected, and this one is empty",
        ),
        ("[[head]]\nhead = 'evl'\ngrid = [1]", "[[head]] 1 grid: a table expected, got [1]"),
        ("[[head]]\nhead = 'evl'\nlr = { a = 1 }", "[[head]] 1 lr: a number, a text, true, false or a list expected"),
        ("[[head]]\nhead = 'evl'\nlr = 2000-01-01", "[[head]] 1 lr: a number, a text, true, false or a list expected"),
        ("[[head]]\nhead = 'evl'\nlayers = [[1]]", "[[head]] 1 layers: a list of single values expected, got [1]"),
        ("[[head]]\nhead = 'evl'\nseeds = true", "seeds: a number of seeds, or a list of them, expected, got True"),
        ("[[head]]\nhead = 'evl'\nseeds = 0", "[[head]] 1 seeds: 1 or more expected, got 0"),
        ("[[head]]\nhead = 'evl'\nseeds = ['a']", "[[head]] 1 seeds: a list of numbers expected, got 'a'"),
        ("[[head]]\nhead = 'evl'\nlr = 1\nset = { lr = 2 }", "[[head]] 1: lr is set in the table and in its `set`"),
        ("[[head]]\nhead = 'evl'\nlr = 1\ngrid = { lr = [2] }", "[[head]] 1: lr is set and varied"),
    ],
)
def test_a_file_that_says_something_else_is_refused_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingError, match=re.escape(words)):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_answered_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="there is no .*none.toml. See what to write into it with:  vcache sweep --example"
    ):
        read_sweep_file(tmp_path / "none.toml")


def test_a_command_is_a_head_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "heads.toml").write_text("[[head]]\nhead = 'evl'\n[[head]]\nhead = 'linear'\nseeds = [5]")
    names = [member.name for member in read_sweep(str(tmp_path / "heads.toml"), {}, {}, 2)]
    assert names == ["evl seed=0", "evl seed=1", "linear seed=0", "linear seed=1"]
    assert [member.name for member in read_sweep("evl", {}, {"depth": ("1", "2")})] == ["depth=1", "depth=2"]


def test_seeds_are_counted_set_or_varied_but_not_twice() -> None:
    for settings, grid, num_seeds, seeds in (
        ({}, {}, 3, [0, 1, 2]),
        ({"seed": "4"}, {}, None, [4]),
        ({}, {"seed": ("5", "7")}, None, [5, 7]),
    ):
        assert [member.config.seed for member in read_sweep("linear", settings, grid, num_seeds)] == seeds
    with pytest.raises(SettingError, match="--seeds 2 and seed=5,7 both say which seeds"):
        read_sweep("linear", {}, {"seed": ("5", "7")}, 2)
    with pytest.raises(SettingError, match="seed=x: numbers of 0 or more expected"):
        read_sweep("linear", {"seed": "x"}, {})
