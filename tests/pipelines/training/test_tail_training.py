"""Heads in the top blocks of the backbone are trained, stopped, swept and evaluated like any other."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logged import metrics_of
from safetensors.torch import load_file
from stops import stop_after

from vcache.extract import backbone
from vcache.heads.aim import AIM
from vcache.heads.requirements import Recipe
from vcache.heads.tail_memory import activation_bytes
from vcache.pipelines.class_text import give_text
from vcache.pipelines.console import size
from vcache.pipelines.evaluation.class_choice import ClassChoice
from vcache.pipelines.evaluation.head_evaluation import evaluate_head
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.frozen_tail import tail_of_store
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config, match
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run
from vcache.pipelines.tail_file import TAIL
from vcache.pipelines.training.checkpoints import Checkpoints
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.head_training import HeadTraining
from vcache.pipelines.training.mixed_precision import training_precision
from vcache.pipelines.training.preparation import prepare_head
from vcache.pipelines.training.reports import TailPlan, TrainingPlan
from vcache.pipelines.training.screen_lines import plan_lines
from vcache.pipelines.training.step import TrainingStep
from vcache.pipelines.training.stopping import TrainingStopped
from vcache.pipelines.training.sweep import Sweep, run_sweep
from vcache.pipelines.training.sweep_file import read_sweep
from vcache.pipelines.training.sweep_plan import demand_of, plan_sweep
from vcache.pipelines.training.train_head import resume_run, train_head
from vcache.pipelines.zero_shot import evaluate_untrained
from vcache.store.reader import FeatureStore

Vcache = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
SHORT = {"blocks": 2, "epochs": 2, "batch_size": 5, "lr": 0.01, "warmup_epochs": 0.0, "drop_path": 0.4, "dropout": 0.3}


def config(store: Path, out: Path, **settings: object) -> TrainingConfig:
    """12 clips in batches of 5, with what is drawn at random in every step."""
    return TrainingConfig(head="aim", store=store, out=out, device="cpu", settings={**SHORT, **settings})


def no_checkpoint(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise backbone.RandomWeightsRefused("there is no such file.")

    patch.setattr(backbone, "load_backbone", refuse)


@pytest.fixture(scope="module")
def whole(pixel_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped; read only."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train_head(config(pixel_store, out))
    return out


def same_run(one: Path, other: Path) -> None:
    for file in ("head", "best", "tail"):
        weights = (load_file(run / f"{file}.safetensors") for run in (one, other))
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert metrics_of(one) == metrics_of(other)


def test_a_run_holds_the_frozen_weights_once_and_apart(whole: Path, pixel_store: Path) -> None:
    for file in ("head", "best"):
        assert not any(
            ".attn." in name or name.startswith("blocks.") for name in load_file(whole / f"{file}.safetensors")
        )
    assert {name.split(".")[1] for name in load_file(whole / TAIL) if name.startswith("blocks.")} == {"1", "2"}
    with FeatureStore.open(pixel_store) as store:
        digest = store.manifest.spec["weights_sha256"]
    told = {"num_blocks": 2, "dtype": "float32", "weights_sha256": digest, "stem": False}
    assert json.loads((whole / "config.json").read_text())["tail"] == told


def test_a_stopped_run_goes_on_bit_for_bit_without_the_checkpoint(
    pixel_store: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 2)
        train_head(config(pixel_store, run))
    kept = Checkpoints(run).load(2).tensors
    assert kept and not any(".attn." in name or "/blocks." in name for name in kept)
    shutil.copytree(run, tmp_path / "damaged")
    with monkeypatch.context() as patch:
        no_checkpoint(patch)
        resume_run(run)
    same_run(run, whole)
    damaged = tmp_path / "damaged" / TAIL
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with monkeypatch.context() as patch, pytest.raises(HeadStoreMismatch) as refused:
        no_checkpoint(patch)
        resume_run(damaged.parent)
    assert "Put the checkpoint back where it was." in str(refused.value) and f"{damaged} is damaged" in str(
        refused.value
    )
    resume_run(damaged.parent)  # of the checkpoint it is made again
    same_run(damaged.parent, whole)


def test_a_sweep_over_blocks_reads_the_checkpoint_once_and_each_head_is_what_it_is_alone(
    pixel_store: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that is lost, whose memory is given back, and in groups one after the other."""
    loads, original = [], backbone.load_backbone

    def load(*args: Any, **options: Any) -> Any:
        loads.append(args)
        return original(*args, **options)

    monkeypatch.setattr(backbone, "load_backbone", load)
    fixed = {name: str(value) for name, value in SHORT.items() if name != "blocks"}
    fixed |= {"store": str(pixel_store), "device": "cpu"}
    members = (
        *read_sweep("aim", {**fixed, "lr": "1e30"}, {"blocks": ("2",)}),
        *read_sweep("aim", fixed, {"blocks": ("1", "2")}),
    )
    names = ("lost", "one", "two")
    members = tuple(replace(m, name=name, folder=name) for m, name in zip(members, names, strict=True))
    summary = run_sweep(Sweep.create(tmp_path / "sweep", plan_sweep(members, together=2)))
    assert [result.status for result in summary.results] == ["failed", "finished", "finished"]
    assert len(loads) == 1
    same_run(tmp_path / "sweep" / "two", whole)
    with monkeypatch.context() as patch:
        no_checkpoint(patch)
        head: Any = Run.open(tmp_path / "sweep" / "one").load_head()
    assert head.tail.shape.num_blocks == 1


def test_an_average_of_the_weights_runs_the_same_tail(
    pixel_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, original = [], HeadTraining.evaluated

    def evaluated(self: HeadTraining) -> Any:
        averaged: Any = original(self)
        shared.append(averaged is not self.head and averaged.tail is self.head.tail)  # type: ignore[union-attr]
        return averaged

    monkeypatch.setattr(HeadTraining, "evaluated", evaluated)
    mixed = {"mixup": 0.8, "cutmix": 1.0, "checkpointing": True}
    summary = train_head(replace(config(pixel_store, tmp_path / "run", ema_decay=0.5, epochs=9, **mixed), patience=1))
    assert shared and all(shared)
    assert summary.stopped_early and summary.last is not None and np.isfinite(summary.last.train_loss)


def test_the_plan_says_which_blocks_run_and_what_they_take(pixel_store: Path, tmp_path: Path, vcache: Vcache) -> None:
    settings = " ".join(f"--set {name}={value}" for name, value in {**SHORT, "blocks": 1}.items())
    line = f"train-head aim --store {pixel_store} --device cpu {settings}"
    status, out, err = vcache(f"{line} --set frozen_dtype=float16 --out {tmp_path / 'run'} --json")
    assert status == 0, err
    tail = json.loads(out)["tail"]
    assert (tail["num_layers"], tail["num_blocks"], tail["dtypes"]) == (3, 1, ["float16"])
    weights = load_file(tmp_path / "run" / TAIL)
    assert tail["num_weights"] == sum(x.numel() for x in weights.values())
    assert tail["num_bytes"] == sum(x.nbytes for x in weights.values())
    assert 0 < tail["activation_bytes"] < tail["checkpointed_bytes"] and not tail["checkpointing"]
    assert f"A step keeps about {size(tail['activation_bytes'])} for its backward pass\n" in err
    assert f"Runs block 2 of 3 of {tail['model']}: {tail['num_weights']:,} frozen weights in float16, " in err


def test_a_sweep_counts_the_blocks_that_its_heads_run(pixel_store: Path, whole: Path) -> None:
    """Before any is read: but for biases and norms."""
    fixed = {name: str(value) for name, value in SHORT.items()} | {"store": str(pixel_store), "device": "cpu"}
    (member,) = read_sweep("aim", fixed, {})
    with FeatureStore.open(pixel_store) as store:
        demand = demand_of("aim", prepare_head(member.config, store, CPU), store.manifest)
    assert demand.frozen == {"float32": sum(x.nbytes for x in load_file(whole / TAIL).values() if x.ndim > 1)}
    config = Run.open(whole).head_config()
    tail: Any = Run.open(whole).load_head()
    assert demand.kept == activation_bytes(config, tail.tail.shape.block, 5) > demand.features["tokens/0"]


def test_two_dtypes_and_trained_blocks_are_said(make_plan: Callable[..., TrainingPlan]) -> None:
    tail = TailPlan(
        model="ViT-B-16",
        num_layers=12,
        num_blocks=6,
        trained=True,
        num_weights=42_922_752,
        dtypes=("float16", "float32"),
        num_bytes=257_000_000,
        activation_bytes=3_200_000_000,
        checkpointed_bytes=610_000_000,
        checkpointing=False,
    )
    said = "\n".join(plan_lines(make_plan(tail=tail)))
    assert (
        "Trains copies of blocks 6 to 11 of 12 of ViT-B-16; "
        "the originals are 42,922,752 frozen weights in float16 and float32, 257 MB" in said
    )
    nothing_kept = replace(tail, activation_bytes=0, checkpointed_bytes=0)
    assert "keeps about" in said and "keeps about" not in "\n".join(plan_lines(make_plan(tail=nothing_kept)))
    assert "blocks" not in "\n".join(plan_lines(make_plan()))


def aim(store: FeatureStore, **settings: object) -> tuple[AIM, Any]:
    head = AIM(build_head_config("aim", {"blocks": 2, **settings}, store.manifest))
    head.set_tail(tail_of_store(store, 2, "auto", CPU))
    plan = match("aim", head.requires(head.config), store, ["train", "val"])
    give_text(head, plan.text, store)
    return head, plan


@pytest.mark.parametrize("frozen_dtype", ["float32", "float16", "bfloat16"])
def test_half_precision_is_within_its_rounding_of_float32(pixel_store: Path, frozen_dtype: str) -> None:
    """Frozen weights in half precision, and a training step of bfloat16 products: logits and gradients."""
    outcomes = []
    for kept, precision in (("float32", "float32"), (frozen_dtype, "bfloat16")):
        torch.manual_seed(4)
        with FeatureStore.open(pixel_store) as store:
            head, plan = aim(store, frozen_dtype=kept, drop_path=0.0, dropout=0.0)
            for block in head.adapters.values():
                for name, p in block.named_parameters():
                    if name.endswith("D_fc2.weight"):
                        torch.nn.init.normal_(p, std=0.1)
            (batch, *_) = ClipLoader(store, "train", plan, batch_size=6, device=CPU).in_order()
        recipe = Recipe(lr=1e-3, weight_decay=0.0, steps=3, batch_size=6)
        step = TrainingStep(head, recipe, training_precision(precision, CPU), num_steps=3, steps_per_epoch=3)
        result = step.backward(batch.features(plan), batch.targets, 6)
        gradients = torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])
        assert gradients.dtype == torch.float32
        outcomes.append((result.loss, gradients))
    (loss, exact), (half_loss, half) = outcomes
    assert 0 < abs(float(loss - half_loss)) < 0.01 * float(loss)
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.999


def test_before_its_first_step_an_aim_of_text_is_zero_shot_clip(pixel_store: Path) -> None:
    """The mean of the embeddings of the frames, as `vcache zero-shot` has it."""
    with FeatureStore.open(pixel_store) as store:
        head, _ = aim(store, classifier="text")
        names = store.manifest.class_names
        choice = ClassChoice(which="named", names=names, templates="label")
        asked = {"asked": choice, "split": "val", "batch_size": 4}
        ours = evaluate_head(head, store, name="aim", requirements=head.requires(head.config), **asked)  # type: ignore[arg-type]
        clip = evaluate_untrained(store, choice, "val", ensemble="embeddings")
    np.testing.assert_allclose(ours.predictions.scores, clip.predictions.scores, rtol=0, atol=1e-3)
    assert np.ptp(ours.predictions.scores) > 1


def test_classes_that_were_left_out_are_told_apart_by_their_text(
    pixel_store: Path, tmp_path: Path, vcache: Vcache
) -> None:
    text = config(pixel_store, tmp_path / "run", classifier="text", epochs=1)
    train_head(replace(text, leave_out=("jump",)))
    for classes, number in (("trained", 2), ("left-out", 1), ("all", 3)):
        status, out, err = vcache(f"eval {tmp_path / 'run'} --classes {classes} --device cpu --json")
        assert status == 0, err
        assert json.loads(out)["num_videos"] == 2 * number


def test_a_run_is_refused_on_features_of_another_backbone(
    whole: Path,
    worded_clip: Path,
    tmp_path: Path,
    tiny_extraction: Callable[..., ExtractionConfig],
    vcache: Vcache,
) -> None:
    other = tmp_path / "other.zarr"
    run_extraction(tiny_extraction(store=other, layers="0:", model=f"local-dir:{worded_clip}", cross_frame="none"))
    status, _, err = vcache(f"eval {whole} --store {other} --device cpu")
    assert status == 1 and "weights_sha256" in err and str(other) in err
    foreign = tmp_path / "foreign"
    shutil.copytree(whole, foreign)
    train_head(config(other, tmp_path / "own", epochs=1))
    shutil.copy(tmp_path / "own" / TAIL, foreign / TAIL)
    status, _, err = vcache(f"eval {foreign} --device cpu")
    assert status == 1 and f"{foreign / TAIL} is of another run: it is of weights" in err and "Traceback" not in err


def test_runs_are_evaluated_and_ensembled_without_the_checkpoint(
    whole: Path, tmp_path: Path, vcache: Vcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_checkpoint(monkeypatch)
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        shutil.copytree(whole, run)
        status, out, err = vcache(f"eval {run} --device cpu --json")
        assert status == 0, err
        assert json.loads(out)["top1"] == metrics_of(whole)[-1]["val_top1"]
    status, out, err = vcache(f"ensemble {runs[0]} {runs[1]} --json")
    assert status == 0, err


def test_the_classes_of_a_linear_classifier_are_compared(whole: Path, tmp_path: Path, vcache: Vcache) -> None:
    status, out, err = vcache(f"correlation {whole} --out {tmp_path / 'c.png'} --json")
    assert status == 0, err
    rows = load_file(whole / "head.safetensors")["classifier.fc_cls.weight"]
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert json.loads(out)["maps"][0]["mean_of_pairs"] == pytest.approx(
        float(cosines[~torch.eye(3).bool()].mean()), abs=1e-4
    )


def test_what_cannot_be_looked_into_is_refused_with_the_reason(whole: Path, vcache: Vcache) -> None:
    status, _, err = vcache(f"explain {whole} --row 0")
    assert status == 1 and "has no query that attends to tokens" in err
    status, _, err = vcache(f"cka {whole}")
    assert status == 1 and "'aim'" in err
