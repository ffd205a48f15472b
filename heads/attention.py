"""Single-query attention with the key and value projections, and the gain and bias before them, absorbed into the query.

One query per clip attends over S = T*N tokens n. Projecting each to a key and a value costs 2*S*D*D multiply-adds; but

    score_h = q_h . (W_k,h n + b_k,h) = (W_k,h^T q_h) . n + const             the constant cancels in the softmax
    out_h   = sum_s a_s (W_v,h n_s + b_v,h) = W_v,h (sum_s a_s n_s) + b_v,h   since the weights a sum to 1

needs 2*H*S*D: the query is folded into token space, the tokens are pooled there, and the pooled vector is unfolded.

The gain and bias of the LayerNorm go the same way: they belong to the folded query and to the pooled vector. What is left
to do for each token is in modulated_pooling.py.
"""

from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vcache.heads.modulated_pooling import TemporalTerms, modulated_pooling


class SingleQueryAttention(nn.Module):
    """Multi-head attention of one query per clip over its tokens; equal to projecting all keys and values.

    Parameters are named as in EVL (Attention, vision_transformer.py at b282e8b) and start as there: weights
    Xavier-uniform, biases 0. There is no attention dropout.
    """

    def __init__(self, width: int, qkv_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, qkv_dim)
        self.k_proj = nn.Linear(width, qkv_dim)
        self.v_proj = nn.Linear(width, qkv_dim)
        self.out_proj = nn.Linear(qkv_dim, width)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Float[Tensor, "B D"], tokens: Float[Tensor, "B S D"], norm: nn.LayerNorm
    ) -> Float[Tensor, "B D"]:
        """Attend from `query`, which is used as it is, over `norm(tokens)`."""
        return self.attend(query, tokens.unsqueeze(1), None, TemporalTerms(), norm)

    def attend(
        self,
        query: Float[Tensor, "B D"],
        x: Float[Tensor, "B T N D"],
        maps: Float[Tensor, "B T-1 2 N-1 N-1"] | None,
        terms: TemporalTerms,
        norm: nn.LayerNorm,
    ) -> Float[Tensor, "B D"]:
        """Attend over norm(Y), where Y is x with its temporal terms; Y is never whole (modulated_pooling.py)."""
        return self.unfold(modulated_pooling(self.fold(query, norm), x, maps, terms, norm.eps), norm)

    def weights(
        self, query: Float[Tensor, "B D"], tokens: Float[Tensor, "B S D"], norm: nn.LayerNorm
    ) -> Float[Tensor, "B H S"]:
        """What `forward` gives each token, per attention head; sums to 1. For looking at: it makes a normalised copy."""
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)  # the norm's gain is in the folded query
        return (self.fold(query, norm) @ normed.mT).softmax(dim=-1)

    def fold(self, query: Float[Tensor, "B D"], norm: nn.LayerNorm) -> Float[Tensor, "B H D"]:
        """The query in the space of the tokens before the gain of `norm`: one vector per attention head."""
        q = rearrange(self.q_proj(query), "B (H d) -> B H d", H=self.num_heads)
        W_k = rearrange(self.k_proj.weight, "(H d) D -> H d D", H=self.num_heads)
        folded = einsum(q * q.shape[-1] ** -0.5, W_k, "B H d, H d D -> B H D") * norm.weight
        # The key bias has no effect and a gradient of exactly 0. It stays in the graph: DDP waits for every parameter.
        return folded + 0.0 * self.k_proj.bias.sum()

    def unfold(self, pooled: Float[Tensor, "B H D"], norm: nn.LayerNorm) -> Float[Tensor, "B D"]:
        """The output of attention from the normalised tokens that each head has pooled."""
        W_v = rearrange(self.v_proj.weight, "(H d) D -> H d D", H=self.num_heads)
        values = einsum(pooled * norm.weight + norm.bias, W_v, "B H D, H d D -> B H d")
        return self.out_proj(rearrange(values, "B H d -> B (H d)") + self.v_proj.bias)
