"""`vcache heads`: recipes on the screen and as JSON."""

import json
from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from vcache.heads.linear import LinearHead
from vcache.heads.requirements import Recipe

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


def test_as_json_every_field_of_a_recipe_has_its_type_and_meaning(vcache: Vcache) -> None:
    described = json.loads(vcache("heads linear --json")[1])["recipe_fields"]
    assert list(described) == [field.name for field in fields(Recipe)]
    assert all(field["meaning"] for field in described.values())
    assert described["lr_multipliers"]["type"] == "list of NAME:NUMBER"
    assert described["schedule"]["type"] == "cosine | whole_cosine | constant"
