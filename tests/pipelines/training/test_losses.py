"""Losses and hits, against their definitions and torch's own."""

import pytest
import torch
from torch.nn import functional

from vcache.pipelines.training.losses import as_shares, clip_losses, count_hits

B, K = 6, 5


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, K, (B,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def multi_hot() -> torch.Tensor:
    return (torch.rand(B, K, generator=torch.Generator().manual_seed(2)) < 0.4).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_class_a_clip_is_cross_entropy_with_smoothing_by_its_definition(logits, labels, smoothing) -> None:
    log_p = logits.double().log_softmax(dim=1)
    expected = -(1 - smoothing) * log_p[range(B), labels] - smoothing * log_p.mean(dim=1)
    found = clip_losses(logits, labels, label_smoothing=smoothing, multi_label=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    shares = as_shares(labels, K)
    soft = clip_losses(logits, shares, label_smoothing=smoothing, multi_label=False)
    torch.testing.assert_close(soft, found, rtol=1e-5, atol=1e-6)


def test_the_mean_over_the_clips_is_torchs_bit_for_bit(logits, labels) -> None:
    """The sum over the clips divided by their number, which several processes need, has the gradients of the mean."""
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    functional.cross_entropy(one, labels).backward()
    (clip_losses(other, labels, label_smoothing=0.0, multi_label=False).sum() / B).backward()
    assert one.grad is not None and other.grad is not None
    assert torch.equal(one.grad, other.grad)


def test_several_classes_a_clip_are_binary_cross_entropies_averaged_over_the_classes(logits, multi_hot) -> None:
    p = logits.double().sigmoid()
    expected = -(multi_hot * p.log() + (1 - multi_hot) * (1 - p).log()).mean(dim=1)
    found = clip_losses(logits, multi_hot, label_smoothing=0.0, multi_label=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert found.mean() == pytest.approx(functional.binary_cross_entropy_with_logits(logits, multi_hot).item())


def test_smoothing_of_several_classes_moves_each_towards_a_half(logits, multi_hot) -> None:
    found = clip_losses(logits, multi_hot, label_smoothing=0.2, multi_label=True)
    moved = torch.where(multi_hot > 0, 0.9, 0.1)
    torch.testing.assert_close(found, clip_losses(logits, moved, label_smoothing=0.0, multi_label=True))


def test_hits_are_clips_with_their_largest_logit_at_a_class_of_theirs() -> None:
    logits = torch.eye(4)[[2, 0, 3]]  # largest at 2, 0, 3
    assert count_hits(logits, torch.tensor([2, 1, 3]), multi_label=False) == 2
    mixed = torch.tensor([[0.0, 0.4, 0.6, 0.0], [0.4, 0.6, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert count_hits(logits, mixed, multi_label=False) == 2
    assert count_hits(logits, mixed, multi_label=True) == 3
    assert count_hits(logits, torch.zeros(3, 4), multi_label=True) == 0
