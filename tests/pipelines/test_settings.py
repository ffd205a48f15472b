"""--set pairs: typed by the field, unknown names refused with the nearest."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from vcache.pipelines.settings import SettingError, build, parse_pairs, split_settings


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: tuple[int, ...] = (-1,)
    width: int = 4
    gain: float = 1.0
    norm: bool = True
    dim: int | None = None
    name: str = "x"
    patterns: tuple[str, ...] = ()
    factors: tuple[tuple[str, float], ...] = ()
    pair: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    lr: float = 0.1


def test_text_is_read_as_the_type_of_the_field() -> None:
    pairs = parse_pairs(["layers=-2,-1", "width=7", "gain=3e-2", "norm=off", "dim=5", "name=a=b"])
    assert build(Config, pairs) == Config(layers=(-2, -1), width=7, gain=0.03, norm=False, dim=5, name="a=b")
    assert build(Config, {"dim": "none"}).dim is None


def test_values_that_are_not_text_are_taken_as_they_are() -> None:
    assert build(Config, {"gain": 2.0, "norm": False}) == Config(gain=2.0, norm=False)


def test_patterns_and_pairs_are_read_from_text() -> None:
    pairs = parse_pairs(["patterns=*.cls_token, [ab]*x[12]", "factors=visual.*:0.1,a:b:2", "pair=(0.9,0.98)"])
    patterns, factors = ("*.cls_token", "[ab]*x[12]"), (("visual.*", 0.1), ("a:b", 2.0))
    assert build(Config, pairs) == Config(patterns=patterns, factors=factors, pair=(0.9, 0.98))
    for text in ("visual.*", "visual.*:much"):
        with pytest.raises(SettingError, match=r"--set factors=(visual\.\*: pairs|much: float) expected"):
            build(Config, {"factors": text})


def test_lists_and_whole_numbers_of_json_and_toml_take_the_type_of_the_field() -> None:
    config = Config(layers=(1, 2), gain=2.0, factors=(("a", 1.0), ("b", 0.5)), pair=(1.0, 0.5), norm=True, dim=3)
    values = dataclasses.asdict(config) | {
        "gain": 2,
        "factors": [["a", 1], ["b", 0.5]],
        "pair": [1, 0.5],
        "layers": [1, 2],
    }
    built = build(Config, json.loads(json.dumps(values)))
    assert built == config
    assert repr(built) == repr(config)


def test_settings_go_to_the_class_that_has_the_field() -> None:
    assert split_settings({"lr": "1", "width": "2"}, Config, Recipe) == ({"width": "2"}, {"lr": "1"})


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        SettingError, match=r"unknown setting 'widht'\. Did you mean 'width'\? There are: depth, dim, factors, gain"
    ):
        split_settings({"widht": "2"}, Config, Recipe)


@pytest.mark.parametrize(
    ("pair", "words"),
    [("width=wide", "--set width=wide: int expected"), ("norm=maybe", "--set norm=maybe: true or false expected")],
)
def test_a_value_of_another_type_is_refused(pair: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        build(Config, parse_pairs([pair]))


@pytest.mark.parametrize("pairs", [["width"], ["=3"], ["width=1", "width=2"]])
def test_a_pair_that_is_no_pair_or_given_twice_is_refused(pairs: list[str]) -> None:
    with pytest.raises(SettingError):
        parse_pairs(pairs)


@dataclass(frozen=True, kw_only=True)
class Choosy:
    layers: tuple[int, ...] | None = None
    norm: int | None = 3


def test_an_empty_list_is_not_taken_for_none() -> None:
    assert build(Choosy, {"layers": "", "norm": ""}) == Choosy(layers=(), norm=None)
    assert build(Choosy, {"layers": "none"}) == Choosy()


@dataclass(frozen=True, kw_only=True)
class Deep:
    depth: int = 3
    layers: tuple[int, ...] = (-1,)


@pytest.mark.parametrize("depth", [2, "2", "02"])
def test_depth_is_short_for_the_last_layers(depth: object) -> None:
    shared = split_settings({"width": 7, "depth": depth, "lr": "1"}, Config, Recipe)
    assert shared == ({"width": 7, "layers": "-2:"}, {"lr": "1"})


def test_a_head_with_a_depth_of_its_own_keeps_it() -> None:
    assert split_settings({"depth": 2, "layers": "-1"}, Deep) == ({"depth": 2, "layers": "-1"},)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": "2", "layers": "-1"}, "depth=2 and layers=-1 both say which layers are read"),
        ({"depth": "0"}, "--set depth=0: a number of layers expected, 1 or more"),
        ({"depth": "-2:"}, "--set depth=-2:: a number of layers"),
        ({"depht": "2"}, "unknown setting 'depht'. Did you mean 'depth'"),
    ],
)
def test_a_depth_that_says_nothing_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        split_settings(settings, Config, Recipe)
