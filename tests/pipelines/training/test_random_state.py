"""What a head draws does not depend on who draws beside it."""

import pytest
import torch

from vcache.pipelines.training.random_state import RandomState

CPU = torch.device("cpu")


def drawn(state: RandomState, count: int) -> list[float]:
    with state.active():
        return torch.rand(count).tolist()


def test_a_state_draws_what_torch_draws_after_its_seed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(6).tolist()
    state = RandomState(5, CPU)
    assert drawn(state, 2) + drawn(state, 4) == expected


def test_others_and_the_outside_change_nothing_in_between() -> None:
    alone, beside, other = RandomState(1, CPU), RandomState(1, CPU), RandomState(2, CPU)
    torch.manual_seed(9)
    outside = torch.rand(3).tolist()
    torch.manual_seed(9)
    expected = drawn(alone, 9)
    found = drawn(beside, 4)
    drawn(other, 3)
    found += drawn(beside, 5)
    assert found == expected
    assert torch.rand(3).tolist() == outside


def test_a_saved_state_goes_on_where_it_was() -> None:
    state, resumed = RandomState(3, CPU), RandomState(4, CPU)
    drawn(state, 5)
    resumed.load_state(state.state())
    assert drawn(resumed, 5) == drawn(state, 5)


def test_a_draw_that_raises_still_counts_and_leaves_the_outside_alone() -> None:
    state, twin = RandomState(3, CPU), RandomState(3, CPU)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    try:
        with state.active():
            torch.rand(2)
            raise RuntimeError
    except RuntimeError:
        pass
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    drawn(twin, 2)
    assert drawn(state, 3) == drawn(twin, 3)


@pytest.mark.parametrize("of_device", [0, 16])
def test_a_state_of_another_kind_of_device_goes_on_with_the_cpus_part(of_device: int) -> None:
    """A checkpoint of a GPU has the GPU's state behind the CPU's."""
    one, other = RandomState(3, CPU), RandomState(4, CPU)
    other.load_state(torch.cat([one.state(), torch.zeros(of_device, dtype=torch.uint8)]))
    torch.testing.assert_close(other.state(), one.state(), rtol=0, atol=0)
