"""Small features for the heads: all sizes different, so that a swapped axis fails."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from vcache.heads.prompt_learning import ClassPrompts
from vcache.heads.registry import get_head
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_stem import StemShape
from vcache.heads.text import ClassText


@dataclass(frozen=True)
class Sizes:
    """B clips, T frames, a grid of h x w patches, D width, H heads of the backbone, K classes, E embedding width,
    patches of p x p pixels, L layers."""

    B: int = 2
    T: int = 4
    h: int = 3
    w: int = 5  # more than one column block of the T-CA, the last one thin
    D: int = 24
    H: int = 6
    K: int = 7
    E: int = 10
    p: int = 2
    L: int = 3

    @property
    def P(self) -> int:
        return self.h * self.w


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers, alone or behind others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    return Sizes()


@pytest.fixture(scope="session")
def make_features(sizes: Sizes) -> Callable[..., ClipFeatures]:
    """`make_features(layers, dtype=..., seed=...)`: everything that any head can ask for, of these layers."""

    def make(layers: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> ClipFeatures:
        s, generator = sizes, torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        return ClipFeatures(
            tokens={layer: draw(s.B, s.T, 1 + s.P, s.D) for layer in layers},
            cls={layer: draw(s.B, s.T, s.D) for layer in layers},
            maps={layer: draw(s.B, s.T - 1, 2, s.P, s.P).softmax(dim=-1) for layer in layers},
            stem=draw(s.B, s.T, 1 + s.P, s.D),
            embed=draw(s.B, s.T, s.E),
            pixels=torch.randint(256, (s.B, 2 * s.T, s.h * s.p, s.w * s.p, 3), dtype=torch.uint8, generator=generator),
        )

    return make


@pytest.fixture(scope="session")
def class_text(sizes: Sizes) -> ClassText:
    """Text embeddings of the classes in two templates."""
    embeddings = torch.randn(sizes.K, 2, sizes.E, generator=torch.Generator().manual_seed(5))
    return ClassText(embeddings=embeddings, logit_scale=2.0)


@pytest.fixture(scope="session")
def class_prompts(sizes: Sizes) -> ClassPrompts:
    """Prompts of the classes of three lengths, with room for four learnt vectors, and a tower of one product; width E."""
    generator = torch.Generator().manual_seed(6)
    tokens, weight = (torch.randn(*shape, sizes.E, generator=generator) for shape in ((sizes.K, 9), (sizes.E,)))

    def encode(filled: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return filled.sin().cumsum(dim=1)[torch.arange(len(ends)), ends] @ weight

    return ClassPrompts(tokens, 6 + torch.arange(sizes.K) % 3, encode, logit_scale=2.0)


@pytest.fixture(scope="session")
def frozen_tail(sizes: Sizes) -> FrozenTail:
    """All blocks of a randomly drawn backbone, and its patch embedding."""
    block = BlockShape(width=sizes.D, num_heads=sizes.H, mlp_dim=2 * sizes.D)
    stem = StemShape(patch_size=sizes.p, grid=(sizes.h, sizes.w))
    shape = TailShape(num_layers=sizes.L, num_blocks=sizes.L, block=block, embed_dim=sizes.E, stem=stem)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        weights = {
            name: x.new_empty(x.shape).normal_(float(name.endswith("weight") and x.ndim == 1), 0.2)
            for name, x in FrozenTail(shape).state_dict().items()
        }
    return FrozenTail.of(shape, weights)


@pytest.fixture(scope="session")
def on_tail(sizes: Sizes, frozen_tail: FrozenTail, class_text: ClassText) -> Callable[..., Any]:
    """`on_tail(name, **settings)`: that head on `frozen_tail` in evaluation mode, with `drawn=True` no parameter left at zero."""

    def make(name: str, *, drawn: bool = False, **settings: Any) -> Any:
        s, head_class = sizes, get_head(name)
        known = {"num_classes": s.K, "num_frames": s.T, "width": s.D, "num_heads": s.H, "num_layers": s.L}
        known |= {"embed_dim": s.E, "grid": (s.h, s.w), "patch_size": s.p}
        names = {field.name for field in fields(head_class.Config)}
        of_store = {name: value for name, value in known.items() if name in names}
        with torch.random.fork_rng():
            torch.manual_seed(4)
            head = head_class(head_class.Config(**(of_store | settings)))
            for parameter in head.parameters():
                if drawn and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.3)
        head.set_tail(frozen_tail)
        if head.requires(head.config).text:
            head.set_text(class_text)
        return head.eval()

    return make


@pytest.fixture(scope="session")
def refusal() -> Callable[[Any, dict[str, Any]], str]:
    """`refusal(config, settings)`: what the config says against them. Type checks of the tests would refuse some before it."""

    def of(config: Any, settings: dict[str, Any]) -> str:
        config = copy(config)
        for name, value in settings.items():
            object.__setattr__(config, name, value)
        with pytest.raises(ValueError) as error:
            config.__post_init__()
        return str(error.value)

    return of
