"""One optimiser step of a head: mixing, forward, loss, backward, AdamW, average of the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vcache.heads.requirements import ClipFeatures, Recipe
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.losses import ClipTargets, clip_losses, count_hits
from vcache.pipelines.training.mixed_precision import MixedPrecision
from vcache.pipelines.training.mixing import Mix, Mixing, check_mixing, mixed_targets
from vcache.pipelines.training.optimiser_state import load_optimiser, load_scaler, optimiser_state, scaler_state
from vcache.pipelines.training.parameter_groups import parameter_groups
from vcache.pipelines.training.schedule import learning_rate
from vcache.pipelines.training.weight_average import WeightAverage
from vcache.pipelines.training.world import ALONE, World


@dataclass(frozen=True)
class StepResult:
    """Before the update, of this process's clips: their losses summed, and how many have their largest logit at their class,
    or at one of several. On the device: to look at them is to wait for it."""

    loss: Float[Tensor, ""]
    hits: Int[Tensor, ""]


class TrainingStep:
    """Trains a head on one batch per call. The parameters must be on the device of the precision.

    Nothing in it waits for the device. With several processes each has its share of a batch, maybe none of it, and all make
    the same update, as of the whole batch.
    """

    def __init__(
        self,
        head: nn.Module,
        recipe: Recipe,
        precision: MixedPrecision,
        *,
        num_steps: int,
        steps_per_epoch: int,
        generator: torch.Generator | None = None,
        world: World = ALONE,
    ) -> None:
        """
        Args:
            num_steps: length of the training, which the schedule runs over.
            generator: on the CPU; what `mixup` and `cutmix` draw from.

        Raises:
            SettingError: the head cannot be trained by this recipe.
        """
        check_recipe(head, recipe)
        self.head, self.recipe, self.precision, self.world = head, recipe, precision, world
        self.num_steps, self.steps_per_epoch, self.generator = num_steps, steps_per_epoch, generator
        # Fused: one pass over memory in place of a dozen, several times as fast on a CPU; the same update but for the last bit.
        self.optimiser = torch.optim.AdamW(
            parameter_groups(head, recipe),
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.scaler = precision.gradient_scaler()
        self.average = None if recipe.ema_decay is None else WeightAverage(head, recipe.ema_decay)
        self.mixing = self._mixing()
        self._own_loss: Callable[..., tuple[Tensor, Tensor]] | None = getattr(head, "training_loss", None)

    def __call__(
        self, features: ClipFeatures, targets: ClipTargets, step: int, num_global: int | None = None
    ) -> StepResult:
        """Step `step` (0-based). In float16 it is left out where gradients overflow, and the next is scaled less.

        Args:
            num_global: clips of the batch in all processes; None: those given are all.
        """
        result = self.backward(features, targets, len(targets) if num_global is None else num_global)
        self.update(step)
        return result

    def backward(self, features: ClipFeatures, targets: ClipTargets, num_global: int) -> StepResult:
        """Gradients of the mean loss over the clips of all processes, summed over them."""
        multi_label = targets.is_floating_point()
        mix = self.mixing.draw(features) if self.mixing else None
        if mix and self.mixing:
            features = self.mixing.features(features, mix)
        self.optimiser.zero_grad(set_to_none=True)
        if len(targets) or self._own_loss:
            loss, hits = self._loss(features, targets, mix, multi_label=multi_label)
            self.scaler.scale(loss / num_global).backward()
        else:  # others have clips; the scaler begins to scale with them
            zero = torch.zeros((), device=targets.device)
            loss, hits = self.scaler.scale(zero), zero.long()
        self.world.sum_gradients(self._parameters)
        return StepResult(loss.detach(), hits)

    def update(self, step: int) -> None:
        """Move the parameters along their gradients."""
        rate = learning_rate(self.recipe, step, self.num_steps, self.steps_per_epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self._parameters, self.recipe.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            self.average.update(self.head)

    def averaged(self) -> dict[str, Tensor] | None:
        """A state dict with the averaged weights, not copies; None where the recipe does not average."""
        return self.average.averaged(self.head) if self.average else None

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on besides the head's weights and torch's own random state; not copies."""
        state = {f"optimiser/{name}": x for name, x in optimiser_state(self.optimiser, self.head).items()}
        state |= {f"scaler/{name}": x for name, x in scaler_state(self.scaler).items()}
        if self.average:
            state |= {f"average/{name}": x for name, x in self.average.state().items()}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()` of the same head and recipe, on any device.

        Raises:
            KeyError, ValueError: it is of another head or recipe.
        """
        parts = {name: _below(name, state) for name in ("optimiser", "scaler", "average")}
        load_optimiser(self.optimiser, self.head, parts["optimiser"])
        load_scaler(self.scaler, parts["scaler"])
        if self.average:
            self.average.load_state(parts["average"])
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())

    def _loss(
        self, features: ClipFeatures, targets: ClipTargets, mix: Mix | None, *, multi_label: bool
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """The sum over the clips, and the hits, in float32."""
        with self.precision.autocast():
            if self._own_loss:
                losses, logits = self._own_loss(features, targets, self.world.gather_batch)
            else:
                losses, logits = None, self.head(features)
        logits = logits.float()
        if mix:
            targets = mixed_targets(targets, mix, logits.shape[1])
        if losses is None:
            smoothing = self.recipe.label_smoothing
            losses = clip_losses(logits, targets, label_smoothing=smoothing, multi_label=multi_label)
        return losses.float().sum(), count_hits(logits.detach(), targets, multi_label=multi_label)

    def _mixing(self) -> Mixing | None:
        if not (self.recipe.mixup or self.recipe.cutmix):
            return None
        if self.generator is None:
            raise ValueError("a recipe with mixup or cutmix needs a generator to draw from")
        return Mixing(self.head, self.recipe, self.generator)

    @property
    def _parameters(self) -> list[Any]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]


def check_recipe(head: nn.Module, recipe: Recipe) -> None:
    """For asking before anything is read or written; a TrainingStep asks too.

    Raises:
        SettingError: the head cannot be trained by this recipe.
    """
    parameter_groups(head, recipe)
    check_mixing(head, recipe)
    if recipe.label_smoothing and hasattr(head, "training_loss"):
        raise SettingError(
            f"{type(head).__name__} has a loss of its own, which is not smoothed. Train with --set label_smoothing=0."
        )


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): x for name, x in state.items() if name.startswith(f"{prefix}/")}
