"""The random numbers of one head, apart from those of every other: what it draws does not depend on who trains beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import UInt8
from torch import Tensor


class RandomState:
    """torch's generators of the CPU and of one device, as one head left them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._states: list[Tensor] = []
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin anew."""
        with self._generators_restored():
            torch.manual_seed(seed)
            self._states = self._current()

    @contextmanager
    def active(self) -> Iterator[None]:
        """What is drawn inside continues what was drawn in here before; outside, nothing changes."""
        with self._generators_restored():
            self._set(self._states)
            try:
                yield
            finally:
                self._states = self._current()

    def state(self) -> UInt8[Tensor, " bytes"]:
        """For a checkpoint."""
        return torch.cat(self._states)

    def load_state(self, state: UInt8[Tensor, " bytes"]) -> None:
        """Continue from `state()`; of another kind of device, whose numbers cannot be continued, with the CPU's."""
        of_cpu = len(self._states[0])
        parts = [part.clone() for part in (state[:of_cpu], state[of_cpu:])]
        self._states = [part if len(part) == len(own) else own for own, part in zip(self._states, parts, strict=False)]

    @contextmanager
    def _generators_restored(self) -> Iterator[None]:
        before = self._current()
        try:
            yield
        finally:
            self._set(before)

    def _current(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return states + ([torch.cuda.get_rng_state(self._device)] if self._device else [])

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device:
            torch.cuda.set_rng_state(states[1], self._device)
