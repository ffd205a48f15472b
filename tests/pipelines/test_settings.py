"""--set pairs: typed by the field, unknown names refused with the nearest."""

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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    lr: float = 0.1


def test_text_is_read_as_the_type_of_the_field() -> None:
    pairs = parse_pairs(["layers=-2,-1", "width=7", "gain=3e-2", "norm=off", "dim=5", "name=a=b"])
    assert build(Config, pairs) == Config(layers=(-2, -1), width=7, gain=0.03, norm=False, dim=5, name="a=b")
    assert build(Config, {"dim": "none"}).dim is None


def test_values_that_are_not_text_are_taken_as_they_are() -> None:
    assert build(Config, {"gain": 2.0, "norm": False}) == Config(gain=2.0, norm=False)


def test_settings_go_to_the_class_that_has_the_field() -> None:
    assert split_settings({"lr": "1", "width": "2"}, Config, Recipe) == ({"width": "2"}, {"lr": "1"})


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"unknown setting 'widht'\. Did you mean 'width'\? There are: dim, gain"):
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
