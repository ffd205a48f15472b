"""Heads on top blocks trained from stores: rates, a stop in between, evaluation, and other classes by their names."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from logged import metrics_of
from safetensors.torch import load_file
from stops import stop_after

from vcache.heads.registry import get_head
from vcache.pipelines.evaluation.evaluate import evaluate
from vcache.pipelines.frozen_tail import TAIL
from vcache.pipelines.runs import Run
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.parameter_groups import parameter_groups
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.train_head import resume_run, train_head


def told(store: Path, out: Path, head: str, settings: dict[str, Any]) -> TrainingConfig:
    short = {"epochs": 2, "batch_size": 4, "lr": 0.01, "warmup_epochs": 0.0, "schedule_every": 1}
    return TrainingConfig(head=head, store=store, out=out, device="cpu", settings={**short, **settings})


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("finetune-top", {"blocks": 2, "classifier": "text"}),
        ("st-adapter", {"blocks": 1, "classifier": "evl", "checkpointing": True}),
    ],
)
def test_a_stop_changes_no_bit_of_the_run_and_it_evaluates_without_the_checkpoint(
    pixel_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, settings: dict[str, Any]
) -> None:
    train_head(told(pixel_store, tmp_path / "whole", head, settings))
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 4)
        train_head(told(pixel_store, tmp_path / "run", head, settings))
    resume_run(tmp_path / "run")
    for file in ("head.safetensors", "best.safetensors", TAIL):
        torch.testing.assert_close(
            load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file), rtol=0, atol=0
        )
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    monkeypatch.setattr("vcache.extract.backbone.load_backbone", None)  # what is called would fail
    assert evaluate(tmp_path / "run", device="cpu").metrics.loss == pytest.approx(
        metrics_of(tmp_path / "run")[-1]["val_loss"], rel=1e-4
    )
    frozen, trained = load_file(tmp_path / "run" / TAIL), load_file(tmp_path / "run" / "head.safetensors")
    changed = {name for name, x in frozen.items() if name in trained and not torch.equal(x, trained[name])}
    if head == "finetune-top":
        assert {name for name in frozen if name.startswith("blocks.")} <= changed
        assert not torch.equal(frozen["proj"], trained["classifier.proj"])
    else:
        assert changed == set()


def test_by_text_classes_are_told_apart_that_were_not_trained_on(pixel_store: Path, tmp_path: Path) -> None:
    settings = {"classifier": "text", "blocks": 1, "epochs": 1}
    train_head(replace(told(pixel_store, tmp_path / "run", "finetune-top", settings), leave_out=("jump",)))
    assert Run.open(tmp_path / "run").class_names() == ("clap hands", "wave")
    assert evaluate(tmp_path / "run", classes="all", device="cpu").metrics.num_videos == 6


def names_by_rate(name: str, classifier: str) -> dict[float, set[str]]:
    """The trained parameters of a head that trains its blocks, by what its own recipe multiplies the rate with."""
    sizes = {"num_classes": 3, "width": 24, "num_heads": 2, "num_layers": 2, "grid": (2, 3), "embed_dim": 5}
    head_class = get_head(name)
    with torch.device("meta"):
        head = head_class(head_class.Config(**sizes, classifier=classifier, train_blocks=True))
    names, found = {id(p): name for name, p in head.named_parameters()}, defaultdict(set)
    for group in parameter_groups(head, head_class.recipe):
        found[group["lr_multiplier"]] |= {names[id(p)] for p in group["params"]}
    return found


@pytest.mark.parametrize("name", ["aim", "finetune-top", "tokent1d", "shift", "st-adapter"])
@pytest.mark.parametrize("classifier", ["linear", "evl", "text"])
def test_what_comes_from_the_backbone_has_a_tenth_of_the_rate(name: str, classifier: str) -> None:
    rates = names_by_rate(name, classifier)
    of_backbone = {"blocks", "control_points"} | (
        {"ln_post"} if name != "aim" else set()
    )  # AIM trains it with its adapters
    assert {parameter for parameter in rates[1.0] if parameter.split(".")[0] in of_backbone} == set()
    assert {parameter.split(".")[0] for parameter in rates[0.1]} <= of_backbone | {"classifier"}
    assert "blocks.1.attn.in_proj_weight" in rates[0.1]
    assert ("classifier.proj" in rates[0.1]) == (classifier == "text")
