"""EVL's decoder layer as the paper writes it: the reference that the default formulation is tested against.

Lin et al. 2022, eq. 4-8. Every token of Y becomes a key and a value, T-Conv is a Conv1d over frames, and T-CA has a vector
for every pair of patches. The parameters are those of the default formulation; only torch's own operations are used, so
that autograd differentiates them and FlopCounterMode counts them. `EVL.Config(formulation="plain")` runs it.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.attention import SingleQueryAttention
from vcache.heads.modulated_pooling import TemporalTerms, pool


def modulate(
    x: Float[Tensor, "B T N D"], maps: Float[Tensor, "B T-1 2 N-1 N-1"] | None, terms: TemporalTerms
) -> Float[Tensor, "B T N D"]:
    """Y: x plus the terms that are on, all from the raw x, which is left as it is."""
    y = x if terms.conv is None else terms.conv(x)
    if terms.positions is not None:
        y = y + terms.positions.unsqueeze(1)
    return y if terms.cross_attention is None or maps is None else terms.cross_attention(y, maps)


def attend(
    attention: SingleQueryAttention,
    query: Float[Tensor, "B D"],
    x: Float[Tensor, "B T N D"],
    maps: Float[Tensor, "B T-1 2 N-1 N-1"] | None,
    terms: TemporalTerms,
    norm: nn.LayerNorm,
) -> Float[Tensor, "B D"]:
    """Multi-head attention of one query per clip over the keys and values of norm(Y), pooled as the terms say."""
    y = norm(pool(modulate(x.to(norm.weight.dtype), maps, terms), terms.pooling).flatten(1, 2))  # (B, S, D)
    q = rearrange(attention.q_proj(query), "B (H d) -> B H 1 d", H=attention.num_heads)
    k = rearrange(attention.k_proj(y), "B S (H d) -> B H S d", H=attention.num_heads)
    v = rearrange(attention.v_proj(y), "B S (H d) -> B H S d", H=attention.num_heads)
    weights = (q @ k.mT * k.shape[-1] ** -0.5).softmax(dim=-1)
    return attention.out_proj(rearrange(weights @ v, "B H 1 d -> B (H d)"))
