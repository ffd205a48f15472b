"""The checks that stand in for jaxtyping's own refuse what those refuse, in the package as the tests import it."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from shape_checks import checked
from torch import Tensor

from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures

REFUSED = (BeartypeCallHintViolation, TypeCheckError)
B, D = 2, 5


def product(x: Float[Tensor, "B D"], y: Float[Tensor, "D B"]) -> Float[Tensor, "B B"]:
    return x @ y


def lost_row(x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    return x[1:]


def resized(x: Tensor, size: int) -> Float[Tensor, "{size} D"]:
    return x[:2]


def length(words: list[str] | None) -> int:
    return words  # type: ignore[return-value]


def rows(x: Float[Tensor, "B D"]) -> Iterator[Float[Tensor, " D"]]:
    yield from x


@dataclass(frozen=True)
class Pair:
    x: Float[Tensor, "B D"]
    y: Float[Tensor, " B"]


@pytest.mark.parametrize(
    ("function", "sound", "refused"),
    [
        (product, (torch.rand(B, D), torch.rand(D, B)), (torch.rand(B, D), torch.rand(B, D))),
        (product, (torch.rand(B, D), torch.rand(D, B)), (torch.rand(B, D), torch.rand(D, B).long())),
        (lost_row, (torch.rand(0, D),), (torch.rand(B, D),)),  # the result, of the axes of the argument
        (resized, (torch.rand(B, D), 2), (torch.rand(B, D), 3)),
        (length, None, ([1],)),
        (length, None, (None,)),  # the result
        (rows, (torch.rand(B, D),), (torch.rand(D),)),
        (Pair, (torch.rand(B, D), torch.rand(B)), (torch.rand(B, D), torch.rand(D))),
    ],
)
def test_wrong_shapes_and_types_are_refused(
    function: Callable[..., object], sound: tuple[object, ...] | None, refused: tuple[object, ...]
) -> None:
    call = checked(function, beartype)
    if sound is not None:
        call(*sound)
    with pytest.raises(REFUSED):
        call(*refused)


def test_axes_are_those_of_one_call_also_within_another_and_in_other_threads() -> None:
    inner = checked(product, beartype)

    def outer(x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        inner(torch.rand(B + 1, D + 1), torch.rand(D + 1, B + 1))
        thread = threading.Thread(target=inner, args=(torch.rand(3, 4), torch.rand(4, 3)))
        thread.start()
        thread.join()
        return x

    for rows_of_x in (B, B + 2):
        checked(outer, beartype)(torch.rand(rows_of_x, D))


def test_the_package_is_checked() -> None:
    head = get_head("linear")
    with pytest.raises(REFUSED):
        ClipFeatures(embed=torch.rand(B, D))  # of (B, T, E)
    with pytest.raises(REFUSED):
        head.Config(num_classes="three")
