"""The moving average of the weights, against its formula in float64."""

import torch
from torch import nn

from vcache.pipelines.training.weight_average import WeightAverage


def make_head() -> nn.Module:
    torch.manual_seed(2)
    head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    head[3].weight = head[2].weight  # one parameter under two names
    head[0].bias.requires_grad_(False)
    return head


def move(head: nn.Module) -> None:
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.add_(1) if tensor.dtype == torch.long else tensor.add_(torch.randn(tensor.shape))


def test_it_is_the_recurrence_with_a_warm_up_of_the_decay_and_leaves_the_rest_alone() -> None:
    head = make_head()
    average = WeightAverage(head, 0.3)
    expected = {name: x.double() for name, x in head.state_dict().items()}
    for n in range(6):
        move(head)
        average.update(head)
        decay = min(0.3, (1 + n) / (10 + n))  # 0.1, 0.18, 0.25, 0.3, ...
        expected = {name: decay * x + (1 - decay) * head.state_dict()[name].double() for name, x in expected.items()}
    found, own = average.averaged(head), head.state_dict()
    assert found.keys() == own.keys()
    averaged = {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias"}
    for name in own:
        if name in averaged:
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(found[name], own[name])
        else:
            assert torch.equal(found[name], own[name])


def test_a_loaded_average_goes_on_bit_for_bit() -> None:
    head = make_head()
    one = WeightAverage(head, 0.9)
    move(head)
    one.update(head)
    other = WeightAverage(make_head(), 0.9)
    other.load_state({name: x.clone() for name, x in one.state().items()})
    move(head)
    for average in (one, other):
        average.update(head)
    for name, x in one.averaged(head).items():
        assert torch.equal(x, other.averaged(head)[name])
