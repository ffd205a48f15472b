"""Attention between adjacent frames: the maps, and EVL's temporal cross-attention (T-CA) that makes features of them.

Lin et al. 2022 (EVL), eq. 7 and 8; TemporalCrossAttention, model.py at b282e8b.
Differs from the paper, as the official code does: scores are divided by sqrt(d).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

PREV, NEXT = 0, 1


def cross_frame_maps(q: Float[Tensor, "B T H N d"], k: Float[Tensor, "B T H N d"]) -> Float[Tensor, "B T-1 2 N-1 N-1"]:
    """Attention of each patch over the patches of the frame before and of the frame after, averaged over the heads.

    Pair p is frames p and p+1: `maps[b, p, PREV]` is softmax(q[p+1] k[p] / sqrt(d)) and `maps[b, p, NEXT]` is
    softmax(q[p] k[p+1] / sqrt(d)). Rows are query patches; CLS (token 0) is neither query nor key.
    q and k are the backbone's biased projections, not yet scaled; half precision is computed and returned in float32.
    """
    B, T, H, N, d = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    maps = torch.zeros(B, T - 1, 2, N - 1, N - 1, dtype=dtype, device=q.device)
    # Head by head: all H at once would need H times the memory of the result.
    for head in range(H):
        queries = q[:, :, head, 1:].to(dtype) * d**-0.5
        keys = k[:, :, head, 1:].to(dtype)
        maps[:, :, PREV] += (queries[:, 1:] @ keys[:, :-1].mT).softmax(dim=-1)
        maps[:, :, NEXT] += (queries[:, :-1] @ keys[:, 1:].mT).softmax(dim=-1)
    return maps.div_(H)


class TemporalCrossAttention(nn.Module):
    """A learnt vector per displacement, summed with how much each patch attends to the patch that lies there.

    Patch (i, j) attending with weight a to patch (i', j') of the frame before receives a * w1[i-i'+h-1, j-j'+w-1], and
    likewise of w2 for the frame after. w1 and w2 are ((2h-1)*(2w-1), D), start at zero, and serve all heads.
    CLS receives nothing; the first and the last frame lack one neighbour and simply its term.
    """

    def __init__(self, grid: tuple[int, int], width: int, gain: float = 1.0) -> None:
        """`gain` multiplies the output; 1 is the paper. Ours: for backbones whose maps are nearly flat."""
        super().__init__()
        self.grid, self.gain = grid, gain
        num_displacements = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.w1 = nn.Parameter(torch.zeros(num_displacements, width))
        self.w2 = nn.Parameter(torch.zeros(num_displacements, width))

    def forward(self, y: Float[Tensor, "B T N D"], maps: Float[Tensor, "B T-1 2 N-1 N-1"]) -> Float[Tensor, "B T N D"]:
        """y + T-CA as the paper writes it, with a vector for every pair of patches; `add_displacements` needs no such table.

        Raises:
            ValueError: the maps require a gradient. They are features, constants, and none is computed for them.
        """
        refuse_gradient(maps)
        maps, index = maps.to(self.w1.dtype), self._displacements()
        before = torch.einsum("btqk,qkd->btqd", maps[:, :, PREV], self.w1[index])
        after = torch.einsum("btqk,qkd->btqd", maps[:, :, NEXT], self.w2[index])
        # The first frame has none before it, the last none after it; CLS is token 0.
        return y + self.gain * (F.pad(before, (0, 0, 1, 0, 1, 0)) + F.pad(after, (0, 0, 1, 0, 0, 1)))

    def vectors(self) -> Float[Tensor, "rows 2 columns D"]:
        """Both tables times the gain, laid out by displacement: (2h-1, 2, 2w-1, D)."""
        rows, columns = (2 * side - 1 for side in self.grid)
        return self.gain * torch.stack([w.view(rows, columns, -1) for w in (self.w1, self.w2)], dim=1)

    def _displacements(self) -> Tensor:
        """(P, P): the row of w1 and w2 for each query and key patch."""
        h, w = self.grid
        patch = torch.arange(h * w, device=self.w1.device)
        row, column = patch // w, patch % w
        return (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1


def refuse_gradient(maps: Tensor | None) -> None:
    if maps is not None and maps.requires_grad:
        raise ValueError("maps must not require a gradient: T-CA treats them as constants")


# T-CA by displacement. The queries in row i and columns j..j+c-1 meet only displacement rows i..i+h-1 and columns
# j..j+c+w-2: one matrix product with one contiguous window of the vectors. The direct way, a (P, P, D) table, is 118 MB at
# 14x14x768 and costs 60 ms to gather before it is used; these windows are 11 MB together.


def displacement_windows(vectors: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """A contiguous copy of the vectors (2h-1, 2, 2w-1, D) that each block of query columns meets."""
    return [vectors[:, :, window].contiguous() for _, window in _column_blocks(grid)]


def add_displacements(y: Tensor, maps: Tensor, windows: list[Tensor], grid: tuple[int, int]) -> None:
    """Add T-CA of the maps to the patches of `y` (B, T, N, D), in place."""
    maps = maps.to(y.dtype)
    for (columns, _), window in zip(_column_blocks(grid), windows, strict=True):
        for i, weights in enumerate(_by_displacement(maps, grid, columns)):
            patches = _patches(y, grid, i, columns)
            patches += (weights @ window[i : i + grid[0]].flatten(0, 2)).view(patches.shape)


def add_window_gradients(d_windows: list[Tensor], grad: Tensor, maps: Tensor, grid: tuple[int, int]) -> None:
    """Add to `d_windows` what the gradient of y says; they may be of higher precision than it."""
    maps = maps.to(grad.dtype)
    for (columns, _), d_window in zip(_column_blocks(grid), d_windows, strict=True):
        for i, weights in enumerate(_by_displacement(maps, grid, columns)):
            patches = _patches(grad, grid, i, columns).flatten(0, 2)
            d_here = d_window[i : i + grid[0]].flatten(0, 2)
            if grad.dtype == d_here.dtype:
                d_here.addmm_(weights.mT, patches)
            else:
                d_here += weights.mT @ patches


def sum_windows(d_windows: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """The gradient of the vectors (2h-1, 2, 2w-1, D), which neighbouring windows share."""
    h, w = grid
    d_vectors = d_windows[0].new_zeros(2 * h - 1, 2, 2 * w - 1, d_windows[0].shape[-1])
    for (_, window), d_window in zip(_column_blocks(grid), d_windows, strict=True):
        d_vectors[:, :, window] += d_window
    return d_vectors


_COLUMNS = 4
"""Query columns per block. One would do the fewest multiply-adds, but in products too thin to run at full speed; of
fourteen, four at once do 1.2 times as many and all at once 1.9 times. Four was the fastest of 2, 3, 4, 7 and 14."""


def _column_blocks(grid: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Blocks of query columns, each with the window of displacement columns that its queries meet."""
    w = grid[1]
    for start in range(0, w, _COLUMNS):
        stop = min(start + _COLUMNS, w)
        yield slice(start, stop), slice(start, stop + w - 1)


def _patches(tokens: Tensor, grid: tuple[int, int], row: int, columns: slice) -> Tensor:
    """View (B, T, c, D) of the patches in one row and a block of columns; token 0 is CLS."""
    first = 1 + row * grid[1]
    return tokens[:, :, first + columns.start : first + columns.stop]


def _by_displacement(maps: Tensor, grid: tuple[int, int], columns: slice) -> Tensor:
    """The maps (B, T-1, 2, P, P) of the queries in c columns, keys laid out by displacement: (h, B*T*c, h*2*(c+w-1)).

    Item qi, row (b, t, j) holds at (di, side, dj) the weight on the key in row ki = h-1-di and column kj = w-1-(dj-j)
    of the frame before (side 0) or after (side 1). Drawn for one row of keys a b c:

        j = 0   c b a . .
        j = 1   . c b a .      each query's keys, flipped and moved by its column: a write with a stride one longer
        j = 2   . . c b a
    """
    (h, w), (B, pairs), c = grid, maps.shape[:2], columns.stop - columns.start
    out = maps.new_zeros(h, B, pairs + 1, c, h, 2, c + w - 1)
    stride = list(out.stride())
    stride[3] += 1
    skewed = out.as_strided((h, B, pairs + 1, c, h, 2, w), stride)
    keys = maps.reshape(B, pairs, 2, h, w, h, w)[:, :, :, :, columns].flip(5, 6)
    keys = keys.permute(3, 0, 1, 4, 5, 2, 6)  # (h, B, pairs, c, h, 2, w)
    skewed[:, :, 1:, ..., PREV, :] = keys[..., PREV, :]
    skewed[:, :, :-1, ..., NEXT, :] = keys[..., NEXT, :]
    return out.flatten(1, 3).flatten(2)
