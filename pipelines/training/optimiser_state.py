"""The states of AdamW and of the gradient scaler as flat tensors, which safetensors keeps; torch's own are pickles."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def optimiser_state(optimiser: torch.optim.Optimizer, head: nn.Module) -> dict[str, Tensor]:
    """ "exp_avg/PARAMETER" and the like, of the parameters that have had a gradient; not copies."""
    state: dict[str, Tensor] = {}
    for name, p in head.named_parameters():
        state |= {f"{kind}/{name}": value for kind, value in optimiser.state.get(p, {}).items()}
    return state


def load_optimiser(optimiser: torch.optim.Optimizer, head: nn.Module, state: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: the state is of other parameters.
    """
    parameters = dict(head.named_parameters())
    optimiser.state.clear()
    for key, value in state.items():
        kind, _, name = key.partition("/")
        p = parameters.get(name)
        if p is None or (value.ndim and value.shape != p.shape):
            there = "has none of this name" if p is None else f"has it as {tuple(p.shape)}"
            raise ValueError(f"the state of the optimiser has {key} {tuple(value.shape)}, and the head {there}")
        # A copy: the optimiser writes into it.
        optimiser.state[p][kind] = value.detach().to(p.device, copy=True)


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """Of float16 the scale and how long it has held; of other precisions nothing. Waits for the device."""
    state = scaler.state_dict()
    if not state:
        return {}
    return {
        "scale": torch.tensor(state["scale"], dtype=torch.float64),
        "growth_tracker": torch.tensor(state["_growth_tracker"]),
    }


def load_scaler(scaler: torch.amp.GradScaler, state: Mapping[str, Tensor]) -> None:
    """
    Raises:
        KeyError: float16 is to continue from another precision.
    """
    own = scaler.state_dict()
    if own:
        scale, tracker = float(state["scale"]), int(state["growth_tracker"])
        scaler.load_state_dict({**own, "scale": scale, "_growth_tracker": tracker})
