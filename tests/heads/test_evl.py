"""The EVL head against the official modules (goldens made at b282e8b), and its facts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.evl import EVL
from vcache.heads.official_evl import load_evl_state_dict
from vcache.heads.requirements import ClipFeatures, HeadRequirements

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def load_golden(name: str, formulation: str = "absorbed") -> tuple[EVL, ClipFeatures, dict[str, Tensor]]:
    """The head with the golden's weights, its features, and all arrays of the golden."""
    facts = json.loads((GOLDENS / f"{name}.json").read_text())
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    config = EVL.Config(
        num_classes=facts["num_classes"],
        num_frames=facts["T"],
        width=facts["C"],
        num_heads=facts["heads"],
        grid=tuple(facts["grid"]),
        layers=tuple(range(-facts["layers"], 0)),
        qkv_dim=facts["qkv_dim"],
        mlp_factor=facts["mlp_factor"],
        formulation=formulation,
        **{name: facts[name] for name in ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")},
    )
    head = EVL(config).eval()
    load_evl_state_dict(head, {key[2:]: value for key, value in arrays.items() if key.startswith("w/")})
    tokens, maps = {}, {}
    for i, layer in enumerate(config.layers):
        q, k = (arrays[f"in/layer{i}/{part}"].transpose(2, 3) for part in "qk")  # stored as (B, T, N, H, d)
        tokens[layer], maps[layer] = arrays[f"in/layer{i}/out"], cross_frame_maps(q, k)
    if not config.temporal_cross_attention:
        maps = {}
    return head, ClipFeatures(tokens=tokens, maps=maps), arrays


def drawn_head(sizes, **fields) -> EVL:
    """A head for `make_features` with every parameter drawn: what starts at zero would hide what flows through it."""
    torch.manual_seed(0)
    shapes = {"num_classes": sizes.K, "num_frames": sizes.T, "width": sizes.D, "num_heads": sizes.H}
    head = EVL(EVL.Config(**shapes, grid=(sizes.h, sizes.w), **fields)).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


GOLDEN_NAMES = ["evl_decoder_full", "evl_decoder_conv_pe", "evl_decoder_plain"]


@pytest.mark.parametrize("formulation", ["absorbed", "plain"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_and_gradients_equal_the_official_ones(name, formulation):
    head, features, arrays = load_golden(name, formulation)
    logits = head(features)
    torch.testing.assert_close(head.decoder(features), arrays["out/decoder"][:, 0], **TOLERANCE)
    torch.testing.assert_close(logits, arrays["out/logits"], **TOLERANCE)
    logits.square().sum().backward()
    gradients = {key.removeprefix("grad/"): value for key, value in arrays.items() if key.startswith("grad/")}
    assert gradients
    for parameter, expected in gradients.items():
        torch.testing.assert_close(head.get_parameter(parameter).grad, expected, **TOLERANCE)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_modulated_features_equal_the_official_ones(name):
    head, features, arrays = load_golden(name)
    maps = features.maps.get(head.config.layers[0])
    y = head.decoder.modulate(0, features.tokens[head.config.layers[0]], maps)
    torch.testing.assert_close(y, arrays["out/layer0_Y"], **TOLERANCE)
    if maps is not None:
        tca = head.decoder.cross_attention[0](torch.zeros_like(y), maps)
        torch.testing.assert_close(tca, arrays["out/layer0_tca"], **TOLERANCE)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_attention_is_what_pools_the_tokens_of_every_decoder_layer(name):
    head, features, _ = load_golden(name)
    head, decoder = head.double(), head.double().decoder
    features = ClipFeatures(
        tokens={layer: x.double() for layer, x in features.tokens.items()},
        maps={layer: x.double() for layer, x in features.maps.items()},
    )
    attention = head.attention(features)
    assert [layer for layer, _ in attention] == list(head.config.layers)
    query = decoder.cls_token.expand(len(features), -1)
    for i, (layer, weights) in enumerate(attention):
        block, x = decoder.decoder_layers[i], features.tokens[layer]
        assert weights.shape == (len(x), block.attn.num_heads, *x.shape[1:3])
        torch.testing.assert_close(weights.sum(dim=(2, 3)), torch.ones_like(weights[:, :, 0, 0]))
        values = block.attn.v_proj(block.norm3(decoder.modulate(i, x, features.maps.get(layer))))
        values = values.unflatten(-1, (block.attn.num_heads, -1))  # (B, T, N, H, d)
        pooled = torch.einsum("bhtn,btnhd->bhd", weights, values).flatten(1)
        query = query + block.attn.out_proj(pooled)
        query = query + block.mlp(block.norm2(query))
    torch.testing.assert_close(head.proj(query), head(features), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clips", [1, 2])
def test_going_clip_by_clip_gives_the_same(monkeypatch, clips):
    head, features, _ = load_golden("evl_decoder_full")
    together = torch.autograd.grad(head(features).square().sum(), list(head.parameters()))
    monkeypatch.setattr("vcache.heads.modulated_pooling._CPU_CHUNK_ELEMENTS", clips * features.tokens[-1][0].numel())
    in_parts = torch.autograd.grad(head(features).square().sum(), list(head.parameters()))
    torch.testing.assert_close(in_parts, together, **TOLERANCE)


NO_TCA = {"temporal_cross_attention": False}
VIT_L = {"width": 1024, "num_heads": 16, "grid": (16, 16)}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"layers": (-1,), **NO_TCA}, 7_408_528),
        (NO_TCA, 28_704_400),
        ({"num_frames": 32, **NO_TCA}, 28_778_128),
        ({}, 33_183_376),
        ({"layers": (-1,)}, 8_528_272),
        ({"num_frames": 16}, 33_207_952),
        ({"num_frames": 32}, 33_257_104),
        ({"layers": tuple(range(12)), "num_classes": 174}, 98_756_526),
        (VIT_L, 58_727_824),
        ({"num_frames": 32, **VIT_L}, 58_826_128),
        ({**VIT_L, **NO_TCA}, 50_855_312),
        ({"layers": tuple(range(24)), "num_classes": 174, **VIT_L}, 350_069_934),
        ({"num_frames": 32, **VIT_L, "grid": (24, 24)}, 69_049_744),
        ({"num_frames": 32, **VIT_L, "grid": (24, 24), **NO_TCA}, 50_953_616),
    ],
)
def test_parameter_counts_are_those_of_the_paper_and_the_official_code(settings, count):
    with torch.device("meta"):
        head = EVL(EVL.Config(**{"num_classes": 400, **settings}))
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_starts_as_the_official_code_does():
    torch.manual_seed(0)
    head = EVL(EVL.Config(num_classes=3, num_frames=4, width=64, num_heads=4, grid=(2, 3), layers=(-2, -1)))
    decoder = head.decoder
    assert not decoder.cls_token.any()  # the official method that would fill it is never called
    for i, layer in enumerate(decoder.decoder_layers):
        assert not decoder.temporal_pos_embed[i].any()
        assert not decoder.cross_attention[i].w1.any() and not decoder.cross_attention[i].w2.any()
        conv = decoder.temporal_conv[i]
        bound = 3**-0.5  # Conv1d's default with 3 inputs per output: neither zero nor the identity
        assert 0.9 * bound < conv.weight.abs().max() <= bound and conv.bias.abs().max() <= bound
        for linear in (layer.mlp.fc1, layer.mlp.fc2):
            xavier = (6 / (64 + 256)) ** 0.5
            assert 0.95 * xavier < linear.weight.abs().max() <= xavier
            assert 0 < linear.bias.abs().max() < 1e-5
        assert not layer.attn.q_proj.bias.any()


def test_the_query_token_can_start_from_a_normal_draw():
    torch.manual_seed(0)
    head = EVL(EVL.Config(num_classes=3, width=768, layers=(-1,), grid=(2, 3), query_init="normal"))
    token = head.decoder.cls_token
    assert abs(token.std() - 0.02) < 0.002 and abs(token.mean()) < 0.003


def test_maps_are_asked_for_only_with_cross_attention():
    layers = (-3, -1)
    full = EVL.requires(EVL.Config(num_classes=2, layers=layers))
    without = EVL.requires(EVL.Config(num_classes=2, layers=layers, temporal_cross_attention=False))
    assert full == HeadRequirements(tokens=layers, maps=layers, num_frames=8)
    assert without == HeadRequirements(tokens=layers, num_frames=8)


def test_cls_pooling_asks_for_cls_tokens_alone():
    config = EVL.Config(num_classes=2, layers=(-3, -1, -3), pooling="cls", **NO_TCA)
    assert EVL.requires(config) == HeadRequirements(cls=(-3, -1), num_frames=8)


@pytest.mark.parametrize(
    ("pooling", "tca"),
    [("cls", False)]
    + [(pooling, tca) for pooling in ("none", "spatial_mean", "temporal_mean") for tca in (False, True)],
)
def test_pooled_variants_equal_the_paper_written_as_loops(make_features, sizes, pooling, tca):
    head = drawn_head(sizes, layers=(-2, -1), pooling=pooling, temporal_cross_attention=tca).double()
    config, features = head.config, make_features((-2, -1), torch.float64)
    weights = {name: parameter.detach().numpy() for name, parameter in head.named_parameters()}
    expected = np.stack([loop_logits(config, weights, features, clip) for clip in range(sizes.B)])
    asked = EVL.requires(config)
    only = ClipFeatures(
        tokens={layer: features.tokens[layer] for layer in asked.tokens},
        cls={layer: features.tokens[layer][:, :, 0] for layer in asked.cls},
        maps={layer: features.maps[layer] for layer in asked.maps},
    )
    np.testing.assert_allclose(head(only).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def loop_logits(config: EVL.Config, w: dict[str, np.ndarray], features: ClipFeatures, clip: int) -> np.ndarray:
    """One clip by eq. 1-8, token by token: keys and values are projected, CLS of T-CA is zero, pooling is of Y."""
    query = w["decoder.cls_token"]
    for i, layer in enumerate(config.layers):
        x = features.tokens[layer][clip].numpy()
        y = loop_modulated(config, w, i, x, features.maps[layer][clip].numpy())
        tokens = {
            "none": [y[t, n] for t in range(len(y)) for n in range(y.shape[1])],
            "cls": [y[t, 0] for t in range(len(y))],
            "spatial_mean": [y[t, 1:].mean(axis=0) for t in range(len(y))],
            "temporal_mean": [y[:, n].mean(axis=0) for n in range(y.shape[1])],
        }[config.pooling]
        at = f"decoder.decoder_layers.{i}."
        query = query + loop_attention(config, w, at, query, tokens)
        hidden = loop_linear(w, f"{at}mlp.fc1", loop_norm(w, f"{at}norm2", query))
        query = query + loop_linear(w, f"{at}mlp.fc2", hidden / (1 + np.exp(-1.702 * hidden)))
    return loop_linear(w, "proj.2", loop_norm(w, "proj.0", query))


def loop_modulated(config: EVL.Config, w: dict[str, np.ndarray], i: int, x: np.ndarray, maps: np.ndarray) -> np.ndarray:
    (T, N, _), (h, wide) = x.shape, config.grid
    y = x + w[f"decoder.temporal_pos_embed.{i}"][:, None] + w[f"decoder.temporal_conv.{i}.bias"]
    kernel = w[f"decoder.temporal_conv.{i}.weight"][:, 0]
    for t, step in [(t, step) for t in range(T) for step in (-1, 0, 1) if 0 <= t + step < T]:
        y[t] += kernel[:, step + 1] * x[t + step]
        if not config.temporal_cross_attention or step == 0:
            continue
        name, pair, side = ("w1", t - 1, 0) if step == -1 else ("w2", t, 1)
        vectors = w[f"decoder.cross_attention.{i}.{name}"]
        for a, b in [(a, b) for a in range(N - 1) for b in range(N - 1)]:
            row, column = a // wide - b // wide + h - 1, a % wide - b % wide + wide - 1
            y[t, 1 + a] += maps[pair, side, a, b] * vectors[row * (2 * wide - 1) + column]
    return y


def loop_attention(
    config: EVL.Config, w: dict[str, np.ndarray], at: str, query: np.ndarray, tokens: list[np.ndarray]
) -> np.ndarray:
    normed = np.stack([loop_norm(w, f"{at}norm3", token) for token in tokens])
    q = loop_linear(w, f"{at}attn.q_proj", loop_norm(w, f"{at}norm1", query))
    k, v = (loop_linear(w, f"{at}attn.{name}_proj", normed) for name in "kv")
    d, out = len(q) // config.num_heads, np.zeros_like(q)
    for head in range(config.num_heads):
        own = slice(head * d, (head + 1) * d)
        scores = np.exp(k[:, own] @ q[own] / d**0.5)
        out[own] = scores / scores.sum() @ v[:, own]
    return loop_linear(w, f"{at}attn.out_proj", out)


def loop_linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def loop_norm(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


@pytest.mark.parametrize("layers", [(-1, -1, -1, -1), (-2, -1, -2, -1), (-2, -2, -1, -1)])
def test_a_layer_that_comes_several_times_is_asked_for_once(layers):
    required = EVL.requires(EVL.Config(num_classes=2, layers=layers))
    assert sorted(required.tokens) == sorted(set(layers)) and required.maps == required.tokens


def test_repeated_layers_equal_as_many_decoder_layers_over_copies_of_the_features(make_features, sizes):
    repeated = drawn_head(sizes, layers=(-2, -1, -2, -1))
    copied = EVL(replace(repeated.config, layers=(0, 1, 2, 3))).eval()
    copied.load_state_dict(repeated.state_dict())
    features = make_features((-2, -1))
    copies = ClipFeatures(
        tokens={i: features.tokens[layer].clone() for i, layer in enumerate(repeated.config.layers)},
        maps={i: features.maps[layer].clone() for i, layer in enumerate(repeated.config.layers)},
    )
    torch.testing.assert_close(repeated(features), copied(copies))


@pytest.mark.parametrize(
    ("setting", "where"), [("mlp_dropout", "decoder.decoder_layers.0.mlp.fc2"), ("cls_dropout", "proj.2")]
)
def test_dropout_is_before_the_last_linear_of_the_mlp_and_of_the_head(make_features, sizes, setting, where):
    s = sizes
    rates = {"mlp_dropout": 0.0, "cls_dropout": 0.0, setting: 0.3}
    torch.manual_seed(0)
    head = EVL(
        EVL.Config(
            num_classes=s.K, num_frames=s.T, width=s.D, num_heads=s.H, grid=(s.h, s.w), layers=(-1,), mlp_factor=30.0,
            **rates,
        )
    )  # fmt: skip
    seen: list[Tensor] = []
    head.get_submodule(where).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head.eval()(make_features((-1,)))
    head.train()(make_features((-1,)))
    whole, dropped = seen
    kept = dropped != 0
    assert 0.1 < 1 - kept.float().mean() < 0.5
    torch.testing.assert_close(dropped, kept * whole / 0.7)


def test_dropout_is_the_papers_unless_set():
    config = EVL.Config(num_classes=2)
    assert (config.mlp_dropout, config.cls_dropout) == (0.5, 0.5)


def test_the_recipe_is_the_papers():
    recipe = EVL.recipe
    assert (recipe.lr, recipe.weight_decay, recipe.steps, recipe.batch_size) == (4e-4, 0.05, 50_000, 256)
    assert (recipe.schedule, recipe.warmup_steps, recipe.label_smoothing) == ("cosine", 0, 0.0)


@pytest.mark.parametrize("modules", ["temporal_conv", "temporal_pos_embed", "temporal_cross_attention", None])
def test_each_temporal_module_alone_sees_the_order_of_frames_and_none_does_without(make_features, sizes, modules):
    names = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
    head = drawn_head(sizes, layers=(-1,), **{name: name == modules for name in names})
    features = make_features((-1,))
    backwards = ClipFeatures(
        tokens={-1: features.tokens[-1].flip(1)}, maps={-1: features.maps[-1].flip(1, 2)}
    )  # the same maps between the same frames: what was the previous one is now the next
    with torch.no_grad():
        difference = (head(features) - head(backwards)).abs().max()
    assert difference < 1e-5 if modules is None else difference > 1e-3


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("tca", [True, False])
def test_no_choice_of_temporal_modules_writes_to_the_features(make_features, sizes, conv, positions, tca):
    modules = {"temporal_conv": conv, "temporal_pos_embed": positions, "temporal_cross_attention": tca}
    head = drawn_head(sizes, layers=(-1,), **modules).train()
    features, untouched = make_features((-1,)), make_features((-1,))
    head(features).sum().backward()
    torch.testing.assert_close(features.tokens, untouched.tokens, rtol=0, atol=0)
    torch.testing.assert_close(features.maps, untouched.maps, rtol=0, atol=0)


def test_tca_gain_multiplies_the_cross_attention(make_features, sizes):
    def modulated(gain: float) -> Tensor:
        config = EVL.Config(
            num_classes=2, num_frames=4, width=24, num_heads=6, grid=(3, 5), layers=(-1,), temporal_conv=False,
            tca_gain=gain,
        )  # fmt: skip
        head = EVL(config)
        nn.init.constant_(head.decoder.cross_attention[0].w1, 0.5)
        features = make_features((-1,))
        return head.decoder.modulate(0, features.tokens[-1], features.maps[-1]) - features.tokens[-1]

    torch.testing.assert_close(modulated(3.0), 3 * modulated(1.0), **TOLERANCE)


def test_features_of_another_shape_are_refused_with_both_shapes(make_features, sizes):
    head = EVL(EVL.Config(num_classes=2, num_frames=8, width=24, num_heads=6, grid=(3, 5), layers=(-1,)))
    with pytest.raises(ValueError, match=r"layer -1 must be \(8, 16, 24\) .*got \(4, 16, 24\)"):
        head(make_features((-1,)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 0}, r"num_classes \(0\) must be at least 1"),
        ({"qkv_dim": 100}, r"qkv_dim \(100\) must be a positive multiple of num_heads \(12\)"),
        ({"width": 100}, r"qkv_dim \(100\) must be a positive multiple of num_heads \(12\)"),
        ({"layers": ()}, "layers must name at least one layer, as in layers=-2,-1"),
        ({"grid": (0, 4)}, r"grid \(\(0, 4\)\) must be two positive numbers"),
        ({"mlp_dropout": 1.0}, r"mlp_dropout \(1.0\) must be in \[0, 1\)"),
        ({"pooling": "cls"}, "pooling 'cls' .* set temporal_cross_attention=false"),
        ({"mlp_factor": 0.0}, r"mlp_factor \(0.0\) must be a number above 0"),
        ({"mlp_factor": float("nan")}, r"mlp_factor \(nan\) must be a number above 0"),
    ],
)
def test_configurations_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EVL.Config(**{"num_classes": 2, **settings})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("pooling", r"pooling \('mean'\) must be one of 'none', 'cls', 'spatial_mean', 'temporal_mean'"),
        ("query_init", r"query_init \('mean'\) must be one of 'zero', 'normal'"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(setting, words):
    config = EVL.Config(num_classes=2)
    object.__setattr__(config, setting, "mean")  # the type checker of the tests refuses it on the way in
    with pytest.raises(ValueError, match=words):
        config.__post_init__()
