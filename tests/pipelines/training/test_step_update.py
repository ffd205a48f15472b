"""What an update is made of: shares of several processes, clipping, multiplied rates, a head's own loss, mixing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vcache.heads.linear import LinearHead
from vcache.heads.requirements import ClipFeatures, Recipe
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.mixed_precision import MixedPrecision
from vcache.pipelines.training.step import TrainingStep, check_recipe
from vcache.pipelines.training.world import World

CPU = torch.device("cpu")
B, T, D, K = 7, 3, 16, 5  # small, and all different
RECIPE = Recipe(lr=0.02, weight_decay=0.05, steps=9, batch_size=B, schedule="constant")
GENERATOR = torch.Generator().manual_seed(1)
CLS, LABELS = torch.randn(B, T, D, generator=GENERATOR), torch.randint(0, K, (B,), generator=GENERATOR)
MULTI_HOT = (torch.rand(B, K, generator=GENERATOR) < 0.4).float()


def make_step(
    recipe: Recipe = RECIPE, precision: str = "float32", head: nn.Module | None = None, **options: Any
) -> TrainingStep:
    torch.manual_seed(3)
    step = TrainingStep(
        head or LinearHead(LinearHead.Config(num_classes=K, width=D)),
        recipe,
        MixedPrecision(name=precision, device=CPU),
        num_steps=9,
        steps_per_epoch=4,
        generator=torch.Generator().manual_seed(7),
        **options,
    )
    if precision == "float16":
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    return step


def clips(begin: int = 0, end: int = B) -> ClipFeatures:
    return ClipFeatures(cls={-1: CLS[begin:end]})


def gradients(step: TrainingStep) -> list[Tensor]:
    return [p.grad for p in step.head.parameters() if p.grad is not None]


class Others(World):
    """A process among several: the others' gradients are given, None where one had none."""

    def __init__(self, *others: list[Tensor | None]) -> None:
        object.__setattr__(self, "others", others)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for other in self.others:
            for p, grad in zip(parameters, other, strict=True):
                if grad is not None:
                    p.grad = grad.clone() if p.grad is None else p.grad + grad

    def gather_batch(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("targets", [LABELS, MULTI_HOT], ids=["one class", "several"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("cut", [2, 0, B])
def test_shares_of_a_batch_make_the_update_of_the_whole(cut: int, precision: str, targets: Tensor) -> None:
    """Also where a process has no clip of the batch, in its first step."""
    recipe = replace(RECIPE, clip_grad=0.05)
    whole = make_step(recipe, precision)
    expected = whole(clips(), targets, 0)
    other = make_step(recipe, precision)
    rest = other.backward(clips(cut), targets[cut:], B)
    theirs: list[Tensor | None] = [p.grad for p in other.head.parameters()]
    mine = make_step(recipe, precision, world=Others(theirs))
    found = mine(clips(0, cut), targets[:cut], 0, B)
    for p, q in zip(mine.head.parameters(), whole.head.parameters(), strict=True):
        if precision == "float32":
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        else:  # of a gradient near 0 the first update has the sign, whatever its size
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(found.loss + rest.loss, expected.loss)
    assert found.hits + rest.hits == expected.hits
    assert found.hits.dtype == expected.hits.dtype == torch.long


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_are_clipped_together_and_after_they_are_unscaled(precision: str) -> None:
    free, loose, tight = (make_step(replace(RECIPE, clip_grad=bound), precision) for bound in (None, 1e6, 0.01))
    for step in (free, loose, tight):
        step(clips(), LABELS, 0)
    norm = torch.stack([grad.norm() for grad in gradients(loose)]).norm()
    assert norm > 0.05
    clipped = gradients(tight)
    assert torch.stack([grad.norm() for grad in clipped]).norm() == pytest.approx(0.01, rel=1e-4)
    for one, other in zip(clipped, gradients(loose), strict=True):
        torch.testing.assert_close(one, other * 0.01 / norm, rtol=1e-4, atol=1e-8)
    for p, q in zip(free.head.parameters(), loose.head.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_multiplied_rate_is_that_rate() -> None:
    multiplied = make_step(replace(RECIPE, lr_multipliers=(("*", 0.5),)))
    halved = make_step(replace(RECIPE, lr=RECIPE.lr / 2))
    for step in (multiplied, halved):
        for i in range(3):
            step(clips(), LABELS, i)
    for p, q in zip(multiplied.head.parameters(), halved.head.parameters(), strict=True):
        assert torch.equal(p, q)


def test_several_classes_a_clip_are_trained_to_be_told() -> None:
    step = make_step(replace(RECIPE, weight_decay=0.0, lr=0.1))
    losses = [step(clips(), MULTI_HOT, i).loss.item() for i in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(step.head(clips()) > 0, MULTI_HOT > 0)
    assert step(clips(), MULTI_HOT, 60).hits == MULTI_HOT.any(dim=1).sum()


def test_mixing_gives_each_seed_batches_of_its_own_and_several_classes_too() -> None:
    recipe = replace(RECIPE, mixup=1.0)
    one, same, other = make_step(recipe), make_step(recipe), make_step(recipe)
    assert other.generator is not None
    other.generator.manual_seed(8)
    before = CLS.clone()
    losses = [step(clips(), targets, 0).loss for step in (one, same, other) for targets in (LABELS, MULTI_HOT)]
    assert torch.equal(torch.stack(losses[:2]), torch.stack(losses[2:4]))
    assert not torch.isclose(torch.stack(losses[:2]), torch.stack(losses[4:])).any()
    assert torch.equal(CLS, before)


class Contrastive(LinearHead):
    """Tells each clip from the others of the batch, also from those of other processes."""

    per_clip = True

    def training_loss(
        self, features: ClipFeatures, targets: Tensor, gather: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        logits = self(features)
        similar = logits @ gather(logits).T
        losses = nn.functional.cross_entropy(similar, torch.arange(len(logits)), reduction="none")
        return losses if self.per_clip else losses.sum(), logits


@pytest.mark.parametrize("per_clip", [True, False])
def test_a_heads_own_loss_is_what_is_made_small(per_clip: bool) -> None:
    torch.manual_seed(3)
    head = Contrastive(Contrastive.Config(num_classes=K, width=D))
    head.per_clip = per_clip
    step = make_step(head=head)
    logits = head(clips()).detach()
    expected = nn.functional.cross_entropy(logits @ logits.T, torch.arange(B), reduction="sum")
    results = [step(clips(), LABELS, i) for i in range(30)]
    torch.testing.assert_close(results[0].loss, expected)
    assert results[0].hits == (logits.argmax(dim=1) == LABELS).sum()
    assert results[-1].loss < 0.7 * results[0].loss


def test_a_heads_own_loss_is_given_the_rows_of_all_processes_also_without_clips_of_its_own() -> None:
    gathered = []

    class Gathering(Others):
        def gather_batch(self, x: Tensor) -> Tensor:
            gathered.append(len(x))
            return torch.cat([x, torch.ones(2, K)])

    torch.manual_seed(3)
    head = Contrastive(Contrastive.Config(num_classes=K, width=D))
    step = make_step(head=head, world=Gathering())
    assert step(clips(0, 0), LABELS[:0], 0, B).loss == 0
    step(clips(), LABELS, 0, B + 2)
    assert gathered == [0, B]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixup": 0.8}, "no targets for mixed clips.*--set mixup=0"),
        ({"label_smoothing": 0.1}, "not smoothed.*--set label_s"),
    ],
)
def test_what_a_heads_own_loss_cannot_have_is_refused(fields: dict[str, float], words: str) -> None:
    head = Contrastive(Contrastive.Config(num_classes=K, width=D))
    with pytest.raises(SettingError, match=f"Contrastive has a loss of its own, .*{words}"):
        check_recipe(head, replace(RECIPE, **fields))  # type: ignore[arg-type]
    check_recipe(head, RECIPE)


@pytest.mark.parametrize("targets", [LABELS, MULTI_HOT], ids=["one class", "several"])
def test_a_step_looks_at_no_number_on_the_device(targets: Tensor) -> None:
    """Each look is a wait; the one that is allowed is for the draw of the mix, on the CPU."""
    looks = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                looks.append(args[0])
            return function(*args, **(kwargs or {}))

    step = make_step(replace(RECIPE, mixup=0.8, clip_grad=0.1, ema_decay=0.9, label_smoothing=0.1))
    with Watch():
        step(clips(), targets, 0)
        torch.ones(()).item()
    assert [look.dtype for look in looks] == [torch.long, torch.float32]
