"""One optimiser step: AdamW as it is defined, in float32 or with half-precision products, and `train-head --precision`."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures, Recipe
from vcache.pipelines.evaluation.evaluate import evaluate_run
from vcache.pipelines.training.config import TrainingConfig, TrainingError
from vcache.pipelines.training.mixed_precision import MixedPrecision, PrecisionError, training_precision
from vcache.pipelines.training.step import TrainingStep
from vcache.pipelines.training.train_head import train_head

CPU = torch.device("cpu")
B, T, N, D, K = 6, 3, 7, 16, 5  # small, and all different
RECIPE = Recipe(lr=0.02, weight_decay=0.05, steps=9, batch_size=B, schedule="constant")
HEADS = {
    "linear": {"width": D},
    "evl": {
        "width": D,
        "num_heads": 4,
        "num_frames": T,
        "grid": (2, 3),
        "layers": (-2, -1),
        "mlp_dropout": 0.0,
        "cls_dropout": 0.0,
    },
}


def make_head(name: str) -> nn.Module:
    torch.manual_seed(3)
    head_class = get_head(name)
    return head_class(head_class.Config(num_classes=K, **HEADS[name]))


def make_batch() -> tuple[ClipFeatures, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    return ClipFeatures(
        tokens={layer: draw(B, T, N, D) for layer in (-2, -1)},
        cls={-1: draw(B, T, D)},
        maps={layer: draw(B, T - 1, 2, N - 1, N - 1).softmax(dim=-1) for layer in (-2, -1)},
    ), torch.randint(0, K, (B,), generator=generator)


def make_step(name: str, precision: str, recipe: Recipe = RECIPE, **options: Any) -> TrainingStep:
    """In float16 with a scale that nothing overflows at; the default begins high and leaves steps out until it has found one."""
    mixed = MixedPrecision(name=precision, device=CPU)
    generator = torch.Generator().manual_seed(7)
    step = TrainingStep(make_head(name), recipe, mixed, num_steps=9, steps_per_epoch=4, generator=generator, **options)
    if precision == "float16":
        assert step.scaler.is_enabled()
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    return step


def losses(name: str, precision: str, num_steps: int = 20) -> list[float]:
    step = make_step(name, precision)
    return [step(*make_batch(), i).loss.item() / B for i in range(num_steps)]


@pytest.mark.parametrize("name", HEADS)
def test_a_step_is_the_adamw_of_the_paper(name: str) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, with a rate that changes from step to step, in float64."""
    (features, labels), step = make_batch(), make_step(name, "float32", replace(RECIPE, schedule="cosine"))
    head = step.head
    expected = {key: p.detach().double() for key, p in head.named_parameters()}
    first = {key: torch.zeros_like(value) for key, value in expected.items()}
    second = {key: torch.zeros_like(value) for key, value in expected.items()}
    for t in (1, 2, 3):
        step(features, labels, t - 1)
        rate = 0.02 * (1 + math.cos(math.pi * (t - 1) / 9)) / 2
        for key, p in head.named_parameters():
            assert p.grad is not None
            grad = p.grad.double()
            first[key] = 0.9 * first[key] + 0.1 * grad
            second[key] = 0.999 * second[key] + 0.001 * grad**2
            update = first[key] / (1 - 0.9**t) / ((second[key] / (1 - 0.999**t)).sqrt() + 1e-8)
            expected[key] = expected[key] - rate * update - rate * RECIPE.weight_decay * expected[key]
    for key, p in head.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[key], rtol=1e-5, atol=1e-6)


def test_the_loss_and_the_hits_are_those_before_the_update() -> None:
    step, (features, labels) = make_step("linear", "float32"), make_batch()
    logits = step.head(features).detach()
    result = step(features, labels, 0)
    assert result.loss.item() / B == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result.hits == (logits.argmax(dim=1) == labels).sum()
    assert not torch.equal(step.head(features), logits)


def test_label_smoothing_is_of_the_loss_that_is_trained_and_told() -> None:
    features, labels = make_batch()
    smoothed = make_step("linear", "float32", replace(RECIPE, label_smoothing=0.2))
    log_p = smoothed.head(features).detach().double().log_softmax(dim=1)
    expected = -(0.8 * log_p[range(B), labels] + 0.2 * log_p.mean(dim=1)).sum().item()
    assert smoothed(features, labels, 0).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_trains_as_float32_does(name: str, precision: str, bound: float) -> None:
    """float16 on the CPU is for this test: it goes through the scaler that a GPU needs. Bounds of the first loss."""
    exact, half = losses(name, "float32"), losses(name, precision)
    assert max(abs(a - b) for a, b in zip(exact, half, strict=True)) < bound * exact[0]
    assert half != exact
    assert exact[-1] < 0.5 * exact[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", list(HEADS))
def test_parameters_gradients_and_the_optimisers_state_are_finite_float32(name: str, precision: str) -> None:
    step = make_step(name, precision)
    step(*make_batch(), 0)
    state = [value for values in step.optimiser.state.values() for value in values.values()]
    for tensor in [*step.head.parameters(), *(p.grad for p in step.head.parameters()), *state]:
        assert tensor is not None
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_a_step_whose_scaled_gradients_overflow_is_left_out_and_the_next_is_scaled_less() -> None:
    step = make_step("linear", "float16")
    head = step.head
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = [p.detach().clone() for p in head.parameters()]
    taken = 0
    while all(torch.equal(p, q) for p, q in zip(head.parameters(), before, strict=True)):
        step(*make_batch(), taken)
        taken += 1
    assert taken > 1
    assert step.scaler.get_scale() == 2.0 ** (31 - taken)
    assert all(p.isfinite().all() for p in head.parameters())


def test_auto_is_float32_on_a_cpu_and_what_it_cannot_do_is_refused() -> None:
    assert training_precision("auto", CPU).name == "float32"
    assert training_precision("bfloat16", CPU).name == "bfloat16"
    with pytest.raises(PrecisionError, match="float16 is for a GPU.*Use --precision bfloat16"):
        training_precision("float16", CPU)
    with pytest.raises(PrecisionError, match="'half' is none of auto, float32, bfloat16, float16"):
        training_precision("half", CPU)


@pytest.mark.parametrize(("computes_bfloat16", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_auto_on_a_gpu_is_bfloat16_where_it_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, computes_bfloat16: bool, expected: str
) -> None:
    """No GPU is needed to ask what would be chosen on one."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes_bfloat16)
    assert training_precision("auto", torch.device("cuda")).name == expected


def test_train_head_takes_a_precision_records_it_and_validates_in_float32(
    float32_store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    line = f"train-head linear --store {float32_store} --epochs 2 --batch-size 5 --device cpu --lr 0.01"
    for name, option in {"auto": "", "half": " --precision bfloat16"}.items():
        status, _, err = vcache(f"{line} --out {tmp_path / name}{option}")
        assert status == 0, err
    assert ", bfloat16" in err
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("auto", "half")]
    assert [config["precision"] for config in configs] == ["float32", "bfloat16"]
    weights = [load_file(tmp_path / name / "head.safetensors")["classify.weight"] for name in ("auto", "half")]
    assert not torch.equal(*weights)
    exact, half = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("auto", "half"))
    for a, b in zip(map(json.loads, exact), map(json.loads, half), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.01)
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=0.01)
    assert evaluate_run(tmp_path / "half", device="cpu").loss == pytest.approx(
        json.loads(half[-1])["val_loss"], rel=1e-5
    )


def test_a_loss_lost_in_half_precision_names_the_way_out(float32_store: Path, tmp_path: Path) -> None:
    settings = {"lr": 1e30, "epochs": 5, "batch_size": 5}
    config = TrainingConfig(
        head="linear", store=float32_store, out=tmp_path, device="cpu", precision="bfloat16", settings=settings
    )
    with pytest.raises(TrainingError, match="warmup_steps=N, or with --precision float32.$"):
        train_head(config)


def test_a_refused_precision_leaves_no_run(float32_store: Path, tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="float16 is for a GPU"):
        train_head(
            TrainingConfig(head="linear", store=float32_store, out=tmp_path / "run", device="cpu", precision="float16")
        )
    assert not (tmp_path / "run").exists()
