"""Queries and keys made again: as nn.MultiheadAttention makes them, and the maps as from Q/K of the whole batch."""

import torch
from torch import nn

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.query_key import QueryKeyProjection

B, T, N, H, d = 11, 3, 5, 2, 4  # more clips than are held at once
D = H * d


def frozen_block() -> tuple[nn.LayerNorm, nn.MultiheadAttention, QueryKeyProjection]:
    torch.manual_seed(0)
    ln, attention = nn.LayerNorm(D, eps=1e-3).double(), nn.MultiheadAttention(D, H, batch_first=True).double()
    for parameter in (*ln.parameters(), *attention.parameters()):
        nn.init.normal_(parameter)
    projection = QueryKeyProjection(
        ln.weight.data,
        ln.bias.data,
        attention.in_proj_weight.data[: 2 * D],
        attention.in_proj_bias.data[: 2 * D],
        num_heads=H,
        ln_eps=1e-3,
    )
    return ln, attention, projection


def test_attention_of_the_queries_and_keys_is_that_of_the_module():
    ln, attention, projection = frozen_block()
    x = torch.randn(B, T, N, D, dtype=torch.float64)
    q, k = projection(x)
    assert q.shape == (B, T, H, N, d)
    frames = ln(x).flatten(0, 1)
    _, expected = attention(frames, frames, frames, average_attn_weights=False)
    torch.testing.assert_close((q @ k.mT / d**0.5).softmax(-1).flatten(0, 1), expected)


def test_maps_clip_by_clip_are_those_of_the_whole_batch():
    _, _, projection = frozen_block()
    x = torch.randn(B, T, N, D, dtype=torch.float64)
    torch.testing.assert_close(projection.maps(x), cross_frame_maps(*projection(x)))


def test_half_precision_tokens_are_projected_in_the_precision_of_the_weights():
    _, _, projection = frozen_block()
    x = torch.randn(2, T, N, D).half()
    assert projection(x)[0].dtype == torch.float64
    torch.testing.assert_close(projection(x), projection(x.double()))
