"""What a step keeps, by formula and as autograd does it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail_head import TailHead
from vcache.heads.tail_memory import activation_bytes

CASES = {
    "as it is": {},
    "blocks=3": {"blocks": 3},
    "no temporal": {"blocks": 2, "temporal": False},
    "no spatial": {"blocks": 2, "spatial": False},
    "no joint": {"blocks": 2, "joint": False},
    "two T-adapters": {"blocks": 3, "temporal_adapters": 2},
    "every second": {"blocks": 3, "positions": "every_second"},
    "a wide bottleneck": {"blocks": 2, "bottleneck": 1.0},
}
TAIL_HEADS = [name for name in list_heads() if hasattr(get_head(name), "set_tail")]


def kept_bytes(head: nn.Module, features: ClipFeatures) -> int:
    """Of activations that autograd keeps, each memory once; without weights and what is cached."""
    others = {x.untyped_storage().data_ptr() for x in (*head.parameters(), *head.tail.parameters())}
    others |= {x.untyped_storage().data_ptr() for x in (*features.tokens.values(), features.stem)}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (address := x.untyped_storage().data_ptr()) not in others:
            kept[address] = x  # held, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = head(features)
        logits.sum().backward()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def assert_as_measured(head: TailHead, make_features: Callable[..., ClipFeatures]) -> None:
    config = head.config
    layers = [-config.num_blocks - 1] if config.num_blocks < config.num_layers else []
    features = make_features(layers, dtype=torch.float16)  # as a store has them, converted within the step
    features = dataclasses.replace(features, pixels=features.pixels[:, : config.num_frames])
    measured = kept_bytes(head.train(), features)
    assert activation_bytes(config, head.tail.shape.block, len(features.stem)) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("embedding", ["cut", "none"])
@pytest.mark.parametrize("case", CASES)
def test_aim_keeps_what_the_formula_says(case, embedding, make_features, on_tail):
    assert_as_measured(on_tail("aim", **CASES[case], temporal_embedding=embedding), make_features)


def test_with_the_embedding_below_ln_pre_what_enters_that_is_kept_too(sizes, make_features, on_tail):
    assert_as_measured(on_tail("aim", blocks=sizes.L, temporal_embedding="stem"), make_features)


@pytest.mark.parametrize("name", TAIL_HEADS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_head_on_a_tail_keeps_what_the_formula_says(name, blocks, make_features, on_tail):
    assert_as_measured(on_tail(name, blocks=blocks), make_features)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("aim", {"train_blocks": True}),
        ("aim", {"train_blocks": True, "joint": False, "temporal_embedding": "none"}),
        ("aim", {"train_blocks": True, "positions": "every_second", "temporal": False}),
        ("st-adapter", {"train_blocks": True}),
        ("st-adapter", {"train_blocks": True, "before_attention": True}),
        ("tokent1d", {"train_blocks": False}),
    ],
    ids=str,
)
def test_blocks_are_trained_below_adapters_or_frozen_below_convolutions(name, settings, make_features, on_tail):
    assert_as_measured(on_tail(name, blocks=2, **settings), make_features)


def test_checkpointing_keeps_one_block_and_what_enters_the_others(sizes, on_tail):
    head = on_tail("aim", blocks=3, classifier="evl")  # which reads all tokens of the last block
    whole, again = (
        activation_bytes(dataclasses.replace(head.config, checkpointing=on), head.tail.shape.block, sizes.B)
        for on in (False, True)
    )
    stream = 4 * sizes.B * sizes.T * (1 + sizes.P) * sizes.D
    assert again == (whole - stream) / 3 + 4 * stream


def test_half_precision_halves_what_products_keep(sizes, on_tail):
    head = on_tail("aim", blocks=2)
    config, block = head.config, head.tail.shape.block
    single, half = (activation_bytes(config, block, sizes.B, item) for item in (4, 2))
    assert 0.5 * single < half < 0.75 * single
    assert activation_bytes(config, block, 3 * sizes.B) == 3 * single
