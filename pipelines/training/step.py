"""One optimiser step of a head: forward, loss, backward, AdamW."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vcache.heads.requirements import ClipFeatures, Recipe
from vcache.pipelines.training.mixed_precision import MixedPrecision


@dataclass(frozen=True)
class StepResult:
    """Before the update: `loss` is the mean over the clips, `hits` is how many of them have their largest logit at the label."""

    loss: float
    hits: int


class TrainingStep:
    """Trains a head on one batch per call. The parameters must be on the device of the precision."""

    def __init__(self, head: nn.Module, recipe: Recipe, precision: MixedPrecision) -> None:
        self.head, self.recipe, self.precision = head, recipe, precision
        # Fused: one pass over memory in place of a dozen, several times as fast on a CPU; the same update but for the last bit.
        self.optimiser = torch.optim.AdamW(
            head.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        self.scaler = precision.gradient_scaler()

    def __call__(self, features: ClipFeatures, labels: Int[Tensor, " B"], rate: float) -> StepResult:
        """One step with this learning rate; in float16 it is left out where gradients overflow, and the next is scaled less."""
        loss, logits = self.backward(features, labels)
        self.update(rate)
        hits = (logits.argmax(dim=1) == labels).sum()
        loss_value, num_hits = torch.stack([loss, hits]).tolist()  # one wait for the device, not one each
        return StepResult(loss_value, int(num_hits))

    def backward(
        self, features: ClipFeatures, labels: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B K"]]:
        """Gradients of the parameters, the loss and the logits, both in float32."""
        with self.precision.autocast():
            logits = self.head(features)
        logits = logits.float()
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        return loss.detach(), logits.detach()

    def update(self, rate: float) -> None:
        """Move the parameters along their gradients."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimiser)
        self.scaler.update()
