"""`vcache heads`: recipes on the screen and as JSON."""

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
from rich.console import Console

from vcache.heads.linear import LinearHead
from vcache.heads.requirements import Recipe
from vcache.pipelines import head_listing

Vcache = Callable[..., tuple[int, str, str]]


def test_a_recipe_is_shown_without_what_is_off_and_the_rest_is_named(vcache: Vcache) -> None:
    lines = {line.split()[0]: line for line in vcache("heads evl", columns=80)[1].splitlines() if line.strip()}
    assert lines["recipe"].split(maxsplit=1)[1] == (
        "lr=0.0004, weight_decay=0.05, betas=0.9,0.999, steps=50000, batch_size=256, schedule=cosine"
    )
    off = set(lines["off"].split(maxsplit=1)[1].split(", "))
    assert off == {field.name for field in fields(Recipe)} - {
        "lr", "weight_decay", "betas", "steps", "epochs", "batch_size", "schedule"
    }  # fmt: skip


def test_what_a_recipe_switches_on_is_shown_as_set_takes_it(vcache: Vcache, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(
        LinearHead.recipe, mixup=0.8, no_decay=("*cls_token", "*bias"), lr_multipliers=(("visual.*", 0.1),)
    )
    monkeypatch.setattr(LinearHead, "recipe", recipe)
    shown = "no_decay=*cls_token,*bias, lr_multipliers=visual.*:0.1, mixup=0.8\n"
    assert shown in vcache("heads linear")[1]
    assert shown in vcache("heads")[1]
    assert "mixup" not in next(line for line in vcache("heads linear")[1].splitlines() if line.startswith("  off"))


def test_on_a_terminal_long_lines_break_between_words_and_commands_stay_whole(
    vcache: Vcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(head_listing, "out", shown)
    assert vcache("heads dist --preset ssv2-b16-8f-gamma4", columns=80)[0] == 0
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in lines if "vcache " not in line and line.startswith("  "))
    after_recipe = lines[[line.startswith("  recipe ") for line in lines].index(True) + 1]
    assert after_recipe.startswith(" " * 13 + "batch_size=256,")
    assert any("vcache extract ssv2 " in line and line.endswith(" --cross-frame none") for line in lines)


def test_as_json_every_field_of_a_recipe_has_its_type_and_meaning(vcache: Vcache) -> None:
    described = json.loads(vcache("heads linear --json")[1])["recipe_fields"]
    assert list(described) == [field.name for field in fields(Recipe)]
    assert all(field["meaning"] for field in described.values())
    assert described["lr_multipliers"]["type"] == "list of NAME:NUMBER"
    assert described["schedule"]["type"] == "cosine | whole_cosine | constant"
