"""T-Conv: a depthwise convolution of every token over the frames of its clip, with its residual.

Lin et al. 2022 (EVL), eq. 5; temporal_conv, model.py at b282e8b. CLS is convolved as every other token.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class TemporalConvolution(nn.Conv1d):
    """x + depthwise convolution of x over its frames (kernel 3, zero padding). Parameters and start are Conv1d's."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=3, padding=1, groups=width)

    def forward(
        self, input: Float[Tensor, "B T N D"], shift: Float[Tensor, "T D"] | None = None
    ) -> Float[Tensor, "B T N D"]:
        """As the paper writes it, with `shift` of each frame added; `filter_frames` is the same without two copies."""
        B, _, N, _ = input.shape
        columns = input.permute(0, 2, 3, 1).flatten(0, 1)  # (B*N, D, T)
        convolved = super().forward(columns.to(self.weight.dtype)).unflatten(0, (B, N)).permute(0, 3, 1, 2)
        return input + convolved if shift is None else input + convolved + shift.unsqueeze(1)

    def taps(self) -> Float[Tensor, "3 D"]:
        """What frame t takes of frames t-1, t and t+1, the residual included."""
        return (self.weight.squeeze(1) + self.weight.new_tensor([0.0, 1.0, 0.0])).T


def filter_frames(x: Tensor, taps: Tensor | None, shift: Tensor | None) -> Tensor:
    """`x` (B, T, N, D) filtered by `taps` (3, D), plus `shift` (T, D) of each frame; without both, x itself."""
    if taps is None:
        return x if shift is None else x + shift.unsqueeze(1)
    y = x * taps[1] if shift is None else torch.addcmul(shift.unsqueeze(1), x, taps[1])
    y[:, 1:].addcmul_(x[:, :-1], taps[0])
    y[:, :-1].addcmul_(x[:, 1:], taps[2])
    return y


def filter_adjoint(grad: Tensor, taps: Tensor | None) -> Tensor:
    """The gradient of x from that of y."""
    return grad if taps is None else filter_frames(grad, taps.flip(0), None)


def taps_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the taps from x and the gradient of y, in float32 at least."""
    B, T, N, D = x.shape
    sums = x.new_zeros(3, B, N, D, dtype=torch.promote_types(grad.dtype, torch.float32))
    # Frame by frame the sums stay in the cache: 0.45 of the time of three products of the size of x, each summed.
    for t in range(T):
        for tap in range(max(0, 1 - t), min(3, T + 1 - t)):
            sums[tap].addcmul_(grad[:, t], x[:, t + tap - 1])
    return sums.sum(dim=(1, 2))


def sum_in_float32(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    return x.sum(dim=dim, dtype=torch.promote_types(x.dtype, torch.float32))
