"""The absorbed attention is the plain one: same outputs, same gradients."""

import pytest
import torch
from torch import Tensor, nn

from vcache.heads.attention import SingleQueryAttention
from vcache.heads.modulated_pooling import modulated_pooling

B, S, D, QKV, H = 2, 11, 12, 20, 4


def plain_weights(attention: SingleQueryAttention, query: Tensor, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The softmax of the query's scores with every projected key: (B, H, S)."""
    q = attention.q_proj(query).view(B, H, 1, -1)
    k = attention.k_proj(norm(tokens)).view(B, S, H, -1).transpose(1, 2)
    return (q @ k.mT / k.shape[-1] ** 0.5).softmax(dim=-1).squeeze(2)


def project_everything(attention: SingleQueryAttention, query: Tensor, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The plain formulation: every token becomes a key and a value."""
    v = attention.v_proj(norm(tokens)).view(B, S, H, -1).transpose(1, 2)
    weights = plain_weights(attention, query, tokens, norm).unsqueeze(2)
    return attention.out_proj((weights @ v).flatten(1))


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter)


def results(attend, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    out = attend()
    return out, list(torch.autograd.grad(out.square().sum(), inputs))


@pytest.fixture
def case() -> tuple[SingleQueryAttention, nn.LayerNorm, Tensor, Tensor]:
    torch.manual_seed(3)
    attention, norm = SingleQueryAttention(D, QKV, H).double(), nn.LayerNorm(D).double()
    randomise(attention)
    randomise(norm)
    query = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    tokens = (5 + 3 * torch.randn(B, S, D, dtype=torch.float64)).requires_grad_()  # a mean, for the norm to remove
    return attention, norm, query, tokens


def test_equals_projecting_every_key_and_value_in_outputs_and_all_gradients(case):
    attention, norm, query, tokens = case
    inputs = [query, tokens, *attention.parameters(), *norm.parameters()]
    got = results(lambda: attention(query, tokens, norm), inputs)
    expected = results(lambda: project_everything(attention, query, tokens, norm), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-9)


def test_weights_are_the_softmax_over_every_projected_key_and_sum_to_1(case):
    attention, norm, query, tokens = case
    got = attention.weights(query, tokens, norm)
    torch.testing.assert_close(got, plain_weights(attention, query, tokens, norm), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.sum(dim=-1), torch.ones(B, H, dtype=torch.float64))


def test_equals_torch_multihead_attention(case):
    _, norm, query, tokens = case
    attention, torchs = SingleQueryAttention(D, D, H).double(), nn.MultiheadAttention(D, H, batch_first=True).double()
    randomise(attention)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    torchs.in_proj_weight.data = torch.cat([linear.weight for linear in projections]).detach()
    torchs.in_proj_bias.data = torch.cat([linear.bias for linear in projections]).detach()
    torchs.out_proj.load_state_dict(attention.out_proj.state_dict())
    y = norm(tokens)
    expected, _ = torchs(query.unsqueeze(1), y, y)
    torch.testing.assert_close(attention(query, tokens, norm), expected[:, 0], rtol=1e-10, atol=1e-10)


def test_pooling_passes_gradcheck():
    torch.manual_seed(0)
    query = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, y: modulated_pooling(q, y.unsqueeze(1)), (query, tokens))


def test_float32_stays_close_with_the_massive_channels_of_clip(case):
    attention, norm, query, tokens = case
    outliers = torch.ones(D, dtype=torch.float64)
    outliers[3] = 60.0
    tokens = (tokens * outliers).detach()
    expected = project_everything(attention, query, tokens, norm)
    got = attention.float()(query.float(), tokens.float(), norm.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_key_bias_changes_nothing_and_gets_a_zero_gradient(case):
    attention, norm, query, tokens = case
    before = attention(query, tokens, norm)
    nn.init.normal_(attention.k_proj.bias)
    after = attention(query, tokens, norm)
    after.sum().backward()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert attention.k_proj.bias.grad is not None and not attention.k_proj.bias.grad.any()


def test_starts_as_upstream_with_xavier_weights_and_zero_biases():
    attention = SingleQueryAttention(64, 96, 4)
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        bound = (6 / (64 + 96)) ** 0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
