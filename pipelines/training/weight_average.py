"""An exponential moving average of a head's weights, for validation and for what a run keeps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """After update n (from 0): average = d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)).

    The warm-up of the decay lets the average forget the weights that training began with, also in runs of a few hundred steps.
    Only trainable parameters are averaged, in float32; what else a head holds is as it is in the head. It begins with the
    weights when it is made.
    """

    def __init__(self, head: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self._weights = {name: p.detach().clone() for name, p in _trainable(head).items()}

    @torch.no_grad()
    def update(self, head: nn.Module) -> None:
        """Take in the weights of the head. Without waiting for the device."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [p.detach() for p in _trainable(head).values()]
        get_ema_multi_avg_fn(decay)(list(self._weights.values()), weights, self.num_updates)
        self.num_updates += 1

    def averaged(self, head: nn.Module) -> dict[str, Tensor]:
        """A state dict of the head with averaged weights; not copies, the next update changes them."""
        return {**head.state_dict(), **self._weights}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; not copies."""
        return {"num_updates": torch.tensor(self.num_updates), **self._weights}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()` of a head with the same parameters."""
        self.num_updates = int(state["num_updates"])
        for name, weight in self._weights.items():
            weight.copy_(state[name])


def _trainable(head: nn.Module) -> dict[str, nn.Parameter]:
    """By every name that a state dict has for them."""
    return {name: p for name, p in head.named_parameters(remove_duplicate=False) if p.requires_grad}
