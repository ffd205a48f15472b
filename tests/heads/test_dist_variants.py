"""Every variant of DiST: the default formulation against the paper written out, and what each variant is."""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from vcache.heads.dist import DiST
from vcache.heads.requirements import ClipFeatures, OnDemand
from vcache.heads.text import ClassText

VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "c3d": {"temporal_block": "c3d"},
    "tada": {"temporal_block": "tada", "temporal_dim": 16},
    "joint": {"temporal_block": "joint", "temporal_dim": 64},
    "avg": {"down_sampling": "avg"},
    "max": {"down_sampling": "max"},
    "trilinear": {"up_sampling": "trilinear", "gamma": 4},
    "deconv": {"up_sampling": "deconv"},
    "deconv, gamma 1": {"up_sampling": "deconv", "gamma": 1},
    "deconv, gamma 4": {"up_sampling": "deconv", "gamma": 4},
    "gamma 1": {"gamma": 1},
    "gamma 8": {"gamma": 8, "num_frames": 3},
    "one frame": {"gamma": 1, "num_frames": 1},
    "no up": {"integration_to_temporal": False},
    "no down": {"temporal_to_integration": False},
    "no laterals": {"integration_to_temporal": False, "temporal_to_integration": False},
    "no temporal encoder": {"temporal_encoder": False},
    "no integration branch": {"integration_branch": False},
    "neither": {"temporal_encoder": False, "integration_branch": False},
    "two layers": {"layers": (-1, 0)},
    "one layer": {"layers": (1,)},
    "4 pooling layers, 2 heads": {"adaptive_pooling_layers": 4, "integration_dim": 128},
}


def make_head(sizes, **settings: object) -> DiST:
    """With all parameters drawn: what starts at zero would hide what flows through it."""
    fields = {
        "num_classes": sizes.K,
        "num_frames": sizes.T,
        "num_layers": sizes.L,
        "width": sizes.D,
        "grid": (sizes.h, sizes.w),
        "patch_size": sizes.p,
        "embed_dim": sizes.E,
        "integration_dim": 12,
        "temporal_dim": 6,
    }
    torch.manual_seed(1)
    head = DiST(DiST.Config(**{**fields, **settings}))
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def features_of(head: DiST, seed: int = 0, dtype: torch.dtype = torch.float32) -> ClipFeatures:
    config, asked, generator = head.config, DiST.requires(head.config), torch.Generator().manual_seed(seed)
    (h, w), p, frames = config.grid, config.patch_size, config.num_frames * asked.pixels
    shape = (2, config.num_frames, 1 + h * w, config.width)
    return ClipFeatures(
        tokens={layer: torch.randn(*shape, generator=generator).to(dtype) for layer in asked.tokens},
        pixels=torch.randint(256, (2, frames, h * p, w * p, 3), dtype=torch.uint8, generator=generator)
        if frames
        else None,
    )


def plain(head: DiST) -> DiST:
    """The same head, as the paper writes it."""
    other = DiST(dataclasses.replace(head.config, formulation="plain")).to(head.proj.dtype)
    other.load_state_dict(head.state_dict())
    return other


def embedding_and_gradients(head: DiST, features: ClipFeatures) -> tuple[Tensor, dict[str, Tensor]]:
    embedding = head.embed(features)
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, embedding.numel(), dtype=embedding.dtype).view_as(embedding)
    gradients = torch.autograd.grad((embedding * weights).sum(), list(trained.values()))
    return embedding, dict(zip(trained, gradients, strict=True))


@pytest.fixture(params=VARIANTS)
def head(request, sizes) -> DiST:
    return make_head(sizes, **VARIANTS[request.param])


def test_both_formulations_give_the_same_embedding_and_gradients(head):
    head = head.double()
    features = features_of(head)
    got, expected = embedding_and_gradients(head, features), embedding_and_gradients(plain(head), features)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-9)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-12)
        torch.testing.assert_close(got[1][name] / scale, gradient / scale, rtol=0, atol=1e-7, msg=name)


def test_of_no_clips_there_are_no_embeddings_and_no_gradients(head):  # a process may have none of a batch
    one = features_of(head)
    features = ClipFeatures(
        tokens={layer: x[:0] for layer, x in one.tokens.items()},
        pixels=None if one.pixels is None else one.pixels[:0],
    )
    for of in (head, plain(head)):
        embedding, gradients = embedding_and_gradients(of, features)
        assert embedding.shape == (0, head.config.embed_dim)
        assert not any(gradient.any() for gradient in gradients.values())


def test_both_formulations_show_the_same_inner_features(head):
    features = features_of(head)
    ours, papers = head.inner_features(features), plain(head).inner_features(features)
    assert [inner.layer for inner in ours] == list(DiST.requires(head.config).tokens)
    for inner, other in zip(ours, papers, strict=True):
        torch.testing.assert_close(dataclasses.asdict(inner), dataclasses.asdict(other), rtol=1e-4, atol=1e-4)
        assert (inner.temporal is not None) == head.config.temporal_encoder


def test_a_variant_has_no_parameter_that_it_does_not_use(head):
    head.embed(features_of(head)).square().sum().backward()
    unused = [name for name, p in head.named_parameters() if p.grad is None]
    frozen = [name for name, p in head.named_parameters() if not p.requires_grad]
    assert unused == frozen
    last = len(head.config.read_layers) - 1  # as in official checkpoints
    assert all(name.startswith(f"integration2temporal_nets.{last}.") for name in frozen)
    assert bool(frozen) == head.config.has_up


def test_clips_do_not_mix(head):
    features = features_of(head)
    second = ClipFeatures(
        tokens={layer: x[1:] for layer, x in features.tokens.items()},
        pixels=None if features.pixels is None else features.pixels[1:],
    )
    torch.testing.assert_close(head.embed(second), head.embed(features)[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_stays_close_to_float32(head, dtype):
    for parameter in head.parameters():
        parameter.data.mul_(0.5)
    features = features_of(head, dtype=torch.float16)
    exact, of_exact = embedding_and_gradients(head, features)
    with torch.autocast("cpu", dtype=dtype):
        close, of_close = embedding_and_gradients(head, features)
    bound = 0.02 if dtype == torch.float16 else 0.1
    assert (close - exact).norm() < bound * exact.norm()
    flat, exact_flat = (torch.cat([g.flatten() for g in each.values()]) for each in (of_close, of_exact))
    assert flat.dtype == torch.float32
    assert (flat - exact_flat).norm() < 2 * bound * exact_flat.norm()


@pytest.mark.parametrize("variant", ["c3d", "deconv", "avg", "max"])
def test_other_blocks_and_laterals_do_something_else(sizes, variant):
    default, other = make_head(sizes), make_head(sizes, **VARIANTS[variant])
    of_other = other.state_dict()
    common = {
        name: p for name, p in default.state_dict().items() if name in of_other and of_other[name].shape == p.shape
    }
    other.load_state_dict(common, strict=False)
    assert not torch.allclose(other.embed(features_of(other)), default.embed(features_of(other)), rtol=1e-2)


def test_tada_starts_as_a_convolution(sizes):
    torch.manual_seed(0)
    block = DiST(make_head(sizes, temporal_block="tada").config).temporal_nets["1"]
    n = torch.randn(2, 5, 6)
    torch.testing.assert_close(block.factors(n), torch.ones(2, 5, 6), rtol=0, atol=0)


@pytest.mark.parametrize("formulation", ["channels_last", "plain"])
def test_of_frames_that_patches_do_not_fill_the_rest_is_left_out(
    sizes, formulation
):  # as the backbone's convolution does
    head = make_head(sizes, formulation=formulation)
    features = features_of(head)
    wider = nn.functional.pad(features.pixels, (0, 0, 0, sizes.p - 1, 0, 1), value=255)
    assert wider.shape != features.pixels.shape
    got = head.embed(ClipFeatures(tokens=features.tokens, pixels=wider))
    torch.testing.assert_close(got, head.embed(features), rtol=0, atol=0)


def test_every_order_of_layers_is_another_network(sizes):
    one, other = make_head(sizes, layers=(0, 2)), make_head(sizes, layers=(2, 0))
    other.load_state_dict(one.state_dict())
    features = features_of(one)
    assert not torch.allclose(one.embed(features), other.embed(features), rtol=1e-2)


def test_a_copy_gives_the_same(sizes):  # as for moving averages of the weights
    head = make_head(sizes)
    features = features_of(head)
    torch.testing.assert_close(copy.deepcopy(head).embed(features), head.embed(features), rtol=0, atol=0)


class Watched:
    """Tokens made on demand, whose lives are counted."""

    def __init__(self, tokens: dict[int, Tensor]) -> None:
        self.stored, self.alive, self.most, self.made = tokens, 0, 0, 0

    def make(self, layer: int) -> Tensor:
        x = self.stored[layer].float().clone()
        self.made, self.alive = self.made + 1, self.alive + 1
        self.most = max(self.most, self.alive)
        weakref.finalize(x, self.gone)
        return x

    def gone(self) -> None:
        self.alive -= 1

    def features(self, pixels: Tensor | None) -> ClipFeatures:
        return ClipFeatures(tokens=OnDemand(self.stored, self.make), pixels=pixels)


def test_of_streamed_tokens_one_layer_at_a_time_is_in_memory(sizes):
    head = make_head(sizes)
    stored = features_of(head, dtype=torch.float16)
    watched = Watched(dict(stored.tokens))
    embedding = head.embed(watched.features(stored.pixels))
    assert (watched.most, watched.alive) == (1, 0)
    forward = watched.made
    embedding.sum().backward()
    assert (watched.most, watched.alive) == (1, 0)
    assert watched.made - forward == sizes.L  # once for each layer's weight
    kept = Watched(dict(stored.tokens))  # the count can fail: the plain formulation keeps them all for the gradients
    plain(head).embed(kept.features(stored.pixels))
    assert kept.most > 1 or kept.alive > 1


def saved_for_backward(run: Callable[[], Tensor]) -> Iterator[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run()
    yield from saved


def test_no_tokens_and_no_pixels_are_kept_for_the_gradients(sizes):
    head = make_head(sizes, width=40, patch_size=5)  # 40 numbers a token and 75 a patch, as nothing else has
    features = features_of(head)

    def widths(of: DiST) -> set[int]:
        own = {p.untyped_storage().data_ptr() for p in of.parameters()}
        saved = [x for x in saved_for_backward(lambda: of.embed(features)) if x.untyped_storage().data_ptr() not in own]
        return {x.shape[-1] for x in saved if x.numel() > 2 * 4 * 40}  # more than the mean CLS

    assert not widths(head) & {40, 75}
    assert 40 in widths(plain(head))


def test_half_as_much_is_kept_for_the_gradients_as_by_the_plain_formulation(sizes):
    head = make_head(sizes, num_frames=8, grid=(7, 6), width=96, integration_dim=64, temporal_dim=16)
    features = features_of(head)

    def kept(of: DiST) -> int:
        own = {p.untyped_storage().data_ptr() for p in of.parameters()}
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage() for x in saved_for_backward(lambda: of.embed(features))
        }
        return sum(storage.nbytes() for at, storage in storages.items() if at not in own)

    assert kept(head) < 0.5 * kept(plain(head))


def test_a_gradient_of_the_features_is_refused(sizes):
    head = make_head(sizes)
    features = features_of(head)
    tokens = {layer: x.requires_grad_() for layer, x in features.tokens.items()}
    with pytest.raises(ValueError, match="the features require a gradient, and this formulation gives them none"):
        head.embed(ClipFeatures(tokens=tokens, pixels=features.pixels))


def test_logits_are_float32_under_autocast(sizes):
    head = make_head(sizes)
    head.set_text(ClassText(torch.randn(sizes.K, 1, sizes.E), 4.6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(features_of(head)).dtype == torch.float32
