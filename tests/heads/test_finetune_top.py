"""Blocks that are trained: copies of the backbone's, which stay as they are."""

import pytest
import torch
from torch import nn

from vcache.heads.finetune_top import FinetuneTop
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape

NAMES = ("aim", "st-adapter", "finetune-top", "tokent1d", "shift")


@pytest.fixture
def features(make_features) -> ClipFeatures:
    return make_features(range(-4, 0))


def test_it_is_the_frozen_backbone_at_initialisation(on_tail, features, frozen_tail):
    head = on_tail("finetune-top", blocks=2)
    expected = frozen_tail.embed(features.tokens[-3], 2)
    torch.testing.assert_close(head.ln_post(head.run_tail(features)[:, :, 0]) @ frozen_tail.proj, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_the_copies_and_no_bit_of_the_backbone(on_tail, features, frozen_tail, name):
    before = {name: x.clone() for name, x in frozen_tail.state_dict().items()}
    head = on_tail(name, blocks=2, train_blocks=True)
    copied = {name: x.clone() for name, x in head.blocks.state_dict().items()}
    torch.testing.assert_close(copied, {name: before[f"blocks.{name}"] for name in copied}, rtol=0, atol=0)
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.1)
    head(features).square().sum().backward()
    optimiser.step()
    torch.testing.assert_close(dict(frozen_tail.state_dict()), before, rtol=0, atol=0)
    assert all(not torch.equal(x, copied[name]) for name, x in head.blocks.state_dict().items())
    assert all(p.grad is None for p in frozen_tail.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_backbone_is_trained_without(on_tail, features, frozen_tail, name):
    head = on_tail(name, blocks=2, train_blocks=False)
    assert not any("blocks." in name for name in head.state_dict())
    head(features).sum().backward()
    assert all(p.grad is None for p in frozen_tail.parameters())


def test_names_are_those_of_the_tower_with_absolute_layers(on_tail, frozen_tail, sizes):
    head = on_tail("finetune-top", blocks=2)
    trained = {name for name in head.state_dict() if name.startswith("blocks.")}
    assert trained == {name for name in frozen_tail.state_dict() if name.startswith(("blocks.1.", "blocks.2."))}


def test_of_a_half_precision_tail_float32_copies_are_trained(on_tail, features, frozen_tail):
    half = FrozenTail.of(frozen_tail.shape, frozen_tail.state_dict(), torch.bfloat16)
    head = on_tail("finetune-top", blocks=2)
    head.set_tail(half)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    weight = frozen_tail.blocks["1"].mlp.c_fc.weight
    torch.testing.assert_close(head.blocks["1"].mlp.c_fc.weight.data, weight.bfloat16().float(), rtol=0, atol=0)


def test_a_head_that_is_loaded_gives_what_was_trained(on_tail, features):
    head = on_tail("finetune-top", classifier="text", drawn=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    again = on_tail("finetune-top", classifier="text")
    assert not torch.allclose(again(features), head(features))
    again.load_state_dict(head.state_dict())
    torch.testing.assert_close(again(features), head(features), rtol=0, atol=0)


def test_gradients_are_those_of_torchs_own_transformer_layers(sizes):
    s, D = sizes, sizes.D
    torch.manual_seed(6)
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(D, s.H, 3 * D, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)
    )
    norm = nn.LayerNorm(D)
    block = BlockShape(width=D, num_heads=s.H, mlp_dim=3 * D, activation="gelu")
    shape = TailShape(num_layers=2, num_blocks=2, block=block, embed_dim=s.E)
    weights = {f"blocks.{_clip_name(name)}": x.detach() for name, x in layers.named_parameters()}
    weights |= {"ln_post.weight": norm.weight, "ln_post.bias": norm.bias, "proj": torch.zeros(D, s.E)}
    config = FinetuneTop.Config(
        num_classes=s.K, num_frames=s.T, width=D, num_heads=s.H, num_layers=2, embed_dim=s.E, grid=(s.h, s.w), blocks=2
    )
    head = FinetuneTop(config).eval()
    head.set_tail(FrozenTail.of(shape, weights))

    stem = torch.randn(s.B, s.T, 1 + s.P, D)
    x = stem.flatten(0, 1)
    for layer in layers:
        x = layer(x)
    cls = norm(x[:, 0]).unflatten(0, (s.B, s.T)).mean(dim=1)
    logits = head.classifier.fc_cls(cls)
    expected = torch.autograd.grad(logits.square().sum(), list(layers.parameters()))
    parameters = [head.blocks.get_parameter(_clip_name(name)) for name, _ in layers.named_parameters()]
    got = torch.autograd.grad(head(ClipFeatures(stem=stem)).square().sum(), parameters)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def _clip_name(name: str) -> str:
    """CLIP's name of a parameter of torch's layer."""
    for torch_name, clip_name in {"self_attn": "attn", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}.items():
        name = name.replace(torch_name, clip_name)
    return name.replace("norm1", "ln_1").replace("norm2", "ln_2")


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_it_reads_what_enters_its_lowest_block(on_tail, blocks):
    head = on_tail("finetune-top", blocks=blocks)
    asked = head.requires(head.config)
    assert (asked.tokens, asked.stem, asked.tail) == (() if blocks == 3 else (-blocks - 1,), blocks == 3, blocks)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_neither_gradients_nor_what_is_drawn(on_tail, features, name):
    def gradients(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        head = on_tail(name, blocks=3, checkpointing=checkpointing, drawn=True).train()
        torch.manual_seed(9)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = head(features).square().sum()
        drawn_after = torch.rand(1)
        loss.backward()
        found = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        return found | {"drawn": drawn_after, "loss": loss.detach()}, sum(kept)

    (plain, plain_kept), (again, again_kept) = gradients(False), gradients(True)
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)
    assert again_kept < plain_kept / 2


@pytest.mark.parametrize("changed", [{"num_layers": 4}, {"width": 12}, {"embed_dim": 11}])
def test_a_tail_of_another_backbone_is_refused_and_nothing_is_taken_of_it(sizes, frozen_tail, changed):
    own = {"num_layers": sizes.L, "width": sizes.D, "embed_dim": sizes.E}
    head = FinetuneTop(FinetuneTop.Config(num_classes=sizes.K, num_heads=sizes.H, blocks=1, **(own | changed)))
    before = {name: x.clone() for name, x in head.state_dict().items()}
    with pytest.raises(ValueError, match=f"3 blocks of width {sizes.D} and embeddings of {sizes.E}; the head is for"):
        head.set_tail(frozen_tail)
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("cut", [(slice(None), slice(1, None)), (slice(None), slice(None), slice(1, None))])
def test_tokens_of_other_frames_or_patches_are_refused(on_tail, features, blocks, cut):
    head = on_tail("finetune-top", blocks=blocks)
    with pytest.raises(ValueError, match=r"tokens must be \(4, 16, 24\) per clip"):
        head(ClipFeatures(tokens={-3: features.tokens[-3][cut]}, stem=features.stem[cut]))


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_has_the_backbones_epsilon(on_tail, sizes, features, name):
    """SigLIP's and EVA's is 1e-6, and that of local models may be any: here one that shows."""
    head, block = (
        on_tail(name, blocks=2),
        BlockShape(width=sizes.D, num_heads=sizes.H, mlp_dim=2 * sizes.D, layer_norm_eps=0.5),
    )
    shape = TailShape(num_layers=sizes.L, num_blocks=2, block=block, embed_dim=sizes.E)
    torch.manual_seed(6)
    weights = {name: torch.randn_like(x) for name, x in FrozenTail(shape).state_dict().items()}
    head.set_tail(FrozenTail.of(shape, weights))
    cls = head.run_tail(features)[:, :, 0]
    cls = cls.mean(dim=1) if head.mean_first else cls
    normed = nn.functional.layer_norm(cls, (sizes.D,), weights["ln_post.weight"], weights["ln_post.bias"], eps=0.5)
    torch.testing.assert_close(head.embed(features), normed if head.mean_first else normed.mean(dim=1))
