"""Outputs put together from batches in any order and from several ranks; and a head left as it was."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vcache.pipelines.evaluation.predicting import Predicted, evaluating

K = 3


def outputs_of(rows: np.ndarray) -> Tensor:
    """Outputs that tell their row."""
    return torch.from_numpy(rows)[:, None] * 10.0 + torch.arange(K)


def targets_of(rows: np.ndarray, multi_label: bool) -> Tensor:
    return outputs_of(rows) % 2 if multi_label else torch.from_numpy(rows % K)


def filled(predicted: Predicted, rows: np.ndarray, size: int, multi_label: bool = False) -> Predicted:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        predicted.add(outputs_of(part), targets_of(part, multi_label), part)
    return predicted


@given(st.permutations(range(0, 22, 2)), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_any_order_and_any_ranks_give_the_same_result(
    order: list[int], size: int, num_ranks: int, multi_label: bool
) -> None:
    """Also of more ranks than batches, of which some have nothing."""
    rows, everything = np.array(order), np.arange(0, 22, 2)
    ranks = [
        filled(Predicted(K, multi_label=multi_label), rows[r::num_ranks].copy(), size, multi_label)
        for r in range(num_ranks)
    ]
    kept: list[list[Tensor]] = [[], [], []]
    for rank in ranks:
        for tensors, x in zip(kept, handed_over(rank), strict=True):
            tensors.append(x)
    answers = iter([torch.cat(tensors) for tensors in kept])
    joined = ranks[0].gathered(lambda x: next(answers))
    assert joined.rows.tolist() == everything.tolist()
    outputs, targets = joined.result(expected=everything)
    torch.testing.assert_close(outputs, outputs_of(everything), rtol=0, atol=0)
    torch.testing.assert_close(targets, targets_of(everything, multi_label), rtol=0, atol=0)


def handed_over(rank: Predicted) -> list[Tensor]:
    """What a rank gives to `gather`: outputs, targets, rows."""
    given: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        given.append(x)
        return x

    rank.gathered(keep)
    return given


def test_a_row_that_is_there_twice_or_not_at_all_is_refused() -> None:
    predicted = filled(Predicted(), np.array([4, 1, 2]), 2)
    with pytest.raises(ValueError, match="3 rows were predicted, and not the 2 that were expected"):
        predicted.result(np.array([1, 2]))
    with pytest.raises(ValueError, match="3 rows were predicted, and not the 3"):
        predicted.result(np.array([1, 2, 3]))
    assert len(predicted.result(np.array([4, 2, 1]))[0]) == 3
    with pytest.raises(ValueError, match="2 rows were predicted twice, the first is 1"):
        filled(predicted, np.array([2, 1]), 2).result()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("end", [lambda: None, lambda: 1 / 0])
def test_the_training_mode_of_a_head_is_given_back_whatever_happens(training: bool, end: Callable[[], None]) -> None:
    head = nn.Linear(2, 3).train(training)
    try:
        with evaluating(head):
            assert not head.training and not torch.is_grad_enabled()
            end()
    except ZeroDivisionError:
        pass
    assert head.training is training and torch.is_grad_enabled()
