"""The DiST head against the official network (golden made at 4b3a09b), its numbers of parameters, and what it asks for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vcache.heads.dist import DiST
from vcache.heads.dist_channels_last import stem
from vcache.heads.dist_temporal import S
from vcache.heads.requirements import ClipFeatures
from vcache.heads.text import ClassText

GOLDEN = Path(__file__).parents[1] / "goldens" / "dist_network"
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
FORMULATIONS = ["channels_last", "plain"]
B_16 = {"num_classes": 174}
L_14 = {"num_classes": 174, "width": 1024, "num_layers": 24, "patch_size": 14, "grid": (16, 16), "embed_dim": 768}


def load_golden(formulation: str) -> tuple[DiST, ClipFeatures, dict[str, Tensor]]:
    """The head with the golden's weights and text, its tokens, and all arrays of the golden."""
    facts = json.loads(GOLDEN.with_suffix(".json").read_text())
    with np.load(GOLDEN.with_suffix(".npz")) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    T, layers = facts["num_input_frames"] // facts["sparse_alpha"], len(facts["selected_layers"])
    head = DiST(
        DiST.Config(
            num_classes=len(arrays["in/text"]),
            num_frames=T,
            num_layers=layers,
            width=facts["d_model"],
            grid=tuple(facts["grid"]),
            patch_size=facts["s_patch"],
            embed_dim=facts["output_dim"],
            gamma=facts["sparse_alpha"],
            integration_dim=facts["integration_dim"],
            temporal_dim=facts["temporal_dim"],
            adaptive_pooling_layers=facts["ada_pooling_layers"],
            formulation=formulation,
        )
    )
    weights = {key[2:]: value for key, value in arrays.items() if key.startswith("w/")}
    missing, unexpected = head.load_state_dict(weights, strict=False)
    assert unexpected == [] and set(missing) == {"text.embeddings", "text.logit_scale"}
    head.set_text(ClassText(arrays["in/text"].unsqueeze(1), arrays["in/logit_scale"].item()))
    tokens = {i: arrays[f"in/mid_feat{i}"].unflatten(1, (-1, T)).permute(1, 2, 0, 3) for i in range(layers)}
    return head, ClipFeatures(tokens=tokens), arrays


def stemmed(head: DiST, arrays: dict[str, Tensor]) -> Tensor:
    """Z of the golden's images, which are normalised noise and so no pixels."""
    images = arrays["in/images"].unflatten(0, (-1, head.config.num_frames * head.config.gamma)).transpose(1, 2)
    z = head.temporal_stem(images)
    return z if head.config.formulation == "plain" else S * z.movedim(1, -1).contiguous()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_embedding_logits_and_gradients_equal_the_official_ones(formulation):
    head, features, arrays = load_golden(formulation)
    embedding = head._embed(stemmed(head, arrays), features)
    torch.testing.assert_close(embedding, arrays["out/cls_x"], **TOLERANCE)
    torch.testing.assert_close(head.classify_embedding(embedding), arrays["out/logits"], rtol=1e-5, atol=1e-3)
    embedding.square().sum().backward()
    gradients = {key.removeprefix("grad/"): value for key, value in arrays.items() if key.startswith("grad/")}
    assert gradients
    for parameter, expected in gradients.items():
        torch.testing.assert_close(head.get_parameter(parameter).grad, expected, **TOLERANCE)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_each_part_of_the_first_layer_equals_the_official_one(formulation):
    head, features, arrays = load_golden(formulation)
    ways, z = head._ways, stemmed(head, arrays)
    T, grid = head.config.num_frames, head.config.grid

    def by_patch(official: str) -> Tensor:  # (B, c, F, h, w)
        return arrays[official].flatten(3).permute(0, 2, 3, 1)

    def by_token(official: str) -> Tensor:  # (N, B*T, d)
        return arrays[official].unflatten(1, (-1, T)).permute(1, 2, 0, 3)

    torch.testing.assert_close(ways.z_by_patch(z), by_patch("out/stem_out"), **TOLERANCE)
    z = ways.t_block(head.temporal_nets["0"], z)
    torch.testing.assert_close(ways.z_by_patch(z), by_patch("out/tnet0_out"), **TOLERANCE)
    m = ways.read(head.input_linears["0"], lambda: features.tokens[0], None)
    u = ways.add_down(head.temporal2integration_nets["0"], m, z)
    torch.testing.assert_close(u - m, by_token("out/t2i0_out"), **TOLERANCE)
    added = ways.z_by_patch(ways.add_up(head.integration2temporal_nets["0"], m, z)) - ways.z_by_patch(z)
    torch.testing.assert_close(added, by_patch("out/i2t0_out"), **TOLERANCE)
    torch.testing.assert_close(ways.i_block(head.integration_nets["0"], u), by_token("out/inet0_out"), **TOLERANCE)
    assert len(set(grid)) == 1  # the golden's; other grids in test_dist_variants.py


def count(module: nn.Module | nn.Parameter) -> int:
    return module.numel() if isinstance(module, nn.Parameter) else sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        (B_16, 19_001_184),
        ({**B_16, "adaptive_pooling_layers": 4}, 26_105_184),
        ({**B_16, "adaptive_pooling_layers": 4, "num_frames": 32}, 26_252_640),
        ({**L_14, "num_frames": 32}, 32_745_312),
        ({**L_14, "adaptive_pooling_layers": 4}, 39_609_696),
        ({**L_14, "adaptive_pooling_layers": 4, "num_frames": 32}, 39_867_744),
    ],
)
def test_as_many_parameters_as_the_official_network(settings, parameters):
    with torch.device("meta"):
        assert count(DiST(DiST.Config(**settings))) == parameters


def test_each_part_has_as_many_parameters_as_the_official_one():
    with torch.device("meta"):
        head = DiST(DiST.Config(**B_16))
    parts = {
        "temporal_stem": 368_736,
        "input_linears": 3_543_552,
        "integration2temporal_nets": 443_520,
        "temporal2integration_nets": 926_208,
        "temporal_nets": 1_331_712,
        "integration_nets": 4_790_016,
        "adapooling_nets": 7_104_000,
        "proj_spatial_cls_token": 295_296,
        "proj": 196_608,
    }
    assert {name: count(getattr(head, name)) for name in parts} == parts


def test_starts_as_the_official_network_does():
    torch.manual_seed(0)
    head = DiST(DiST.Config(num_classes=3, num_layers=1))
    starts: dict[str, float] = {
        "proj": 384**-0.5,
        "adapooling_nets.0.spatial_transformer.attn.in_proj_weight": (2 / 4 / 384) ** 0.5,
    }
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln" in name.split(".")[-2:][0]:
            assert (parameter == 1).all(), name
        else:  # of as few as 384 numbers
            expected = starts.get(name.replace("nets.1", "nets.0").replace("temporal_t", "spatial_t"), 0.02)
            assert parameter.std().item() == pytest.approx(expected, rel=0.12), name


def giga_products(**settings: object) -> float:
    """Multiply-adds of one ViT-B/16 clip, as the paper writes the head, in 10^9."""
    with torch.device("meta"):
        head = DiST(DiST.Config(**B_16, formulation="plain", **settings))
        config, asked = head.config, DiST.requires(head.config)
        pixels = torch.empty(1, config.num_frames * config.gamma, 224, 224, 3, dtype=torch.uint8)
        tokens = dict.fromkeys(asked.tokens, torch.empty(1, config.num_frames, 197, 768))
        with FlopCounterMode(display=False) as counter:
            head.embed(ClipFeatures(tokens=tokens, pixels=pixels if asked.pixels else None))
    return counter.get_total_flops() / 2e9


def test_products_are_those_of_the_official_network_and_of_the_papers_tables():
    whole = giga_products()
    unused = 8 * 196 * 384 * 96 / 1e9  # the last lateral up, which the official network computes and we do not
    assert whole + unused == pytest.approx(21.43, abs=0.01)
    # Differences between the rows of Tables 1c and 1d, to one decimal: C3D 168.2, TAda 162.0, default 163.1; gamma 1, 4, 8.
    assert giga_products(temporal_block="c3d") - whole == pytest.approx(168.2 - 163.1, abs=0.11)
    assert giga_products(temporal_block="tada") - whole == pytest.approx(162.0 - 163.1, abs=0.11)
    patch_embed = (
        196 * 768 * 768 / 1e9
    )  # of the backbone, which the official network computes of all frames that it sees
    for gamma, total in ((1, 158.7), (4, 171.6), (8, 188.8)):
        frames = 8 * (gamma - 2)
        assert giga_products(gamma=gamma) - whole + frames * patch_embed == pytest.approx(total - 163.1, abs=0.15)
    assert giga_products(temporal_block="joint") - whole == pytest.approx(22.7, abs=0.05)  # as dist_temporal.py says


def test_the_stem_of_pixels_is_the_convolution_of_normalised_ones(sizes):
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 6, (5, sizes.p, sizes.p), stride=(1, sizes.p, sizes.p), padding=(2, 0, 0)).double()
    mean, std = (0.1, 0.4, 0.8), (0.5, 0.2, 0.3)
    for frames in (1, 2, 7):  # shorter than the kernel, too
        pixels = torch.randint(256, (2, frames, sizes.h * sizes.p, sizes.w * sizes.p, 3), dtype=torch.uint8)
        normalised = (pixels.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
        expected = S * conv(normalised.permute(0, 4, 1, 2, 3)).movedim(1, -1)
        got = stem(conv, pixels, mean, std)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # the constants are rounded to float32
        weights = torch.randn_like(got)
        of_ours = torch.autograd.grad((got * weights).sum(), list(conv.parameters()))
        of_conv = torch.autograd.grad((expected * weights).sum(), list(conv.parameters()))
        torch.testing.assert_close(of_ours, of_conv, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "tokens", "pixels"),
    [
        ({}, (0, 1, 2), 2),
        ({"gamma": 8, "layers": (-2, -1)}, (-2, -1), 8),
        ({"temporal_encoder": False}, (0, 1, 2), 0),
        ({"integration_branch": False}, (2,), 2),
        ({"integration_branch": False, "temporal_encoder": False, "layers": (-3, -1)}, (-1,), 0),
    ],
)
def test_asks_for_what_it_reads_and_no_more(settings, tokens, pixels):
    asked = DiST.requires(DiST.Config(num_classes=7, num_layers=3, num_frames=5, templates="clip", **settings))
    assert (asked.tokens, asked.pixels, asked.num_frames) == (tokens, pixels, 5)
    assert asked.text == "clip" and asked.streamed


def test_classifies_names_that_it_was_not_trained_on(sizes):
    head = DiST(DiST.Config(num_classes=sizes.K, embed_dim=sizes.E, num_layers=1, integration_dim=6, temporal_dim=4))
    videos, text = torch.randn(2, sizes.E), torch.randn(sizes.K + 3, 1, sizes.E)
    head.set_text(ClassText(text, 2.0))
    expected = torch.tensor(2.0).exp() * F.cosine_similarity(videos[:, None], text[None, :, 0], dim=-1)
    torch.testing.assert_close(head.classify_embedding(videos), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0}, r"gamma \(0\) must be at least 1"),
        ({"layers": (1, 1)}, r"layers \(\(1, 1\)\) must name at least one layer, each once"),
        ({"integration_dim": 193}, r"integration_dim \(193\) must be a multiple of its 3 attention heads"),
        ({"temporal_block": "joint", "temporal_dim": 97}, r"temporal_dim \(97\) must be a multiple of its 3"),
        (
            {"temporal_encoder": False, "temporal_block": "c3d"},
            r"temporal_block \('c3d'\) has no effect with temporal_encoder off; leave it at 'r2plus1d'",
        ),
        ({"integration_to_temporal": False, "up_sampling": "deconv"}, "has no effect with integration_to_temporal off"),
        ({"integration_branch": False, "up_sampling": "deconv"}, "has no effect with integration_branch off"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiST.Config(num_classes=7, **settings)


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("temporal_block", "'r2plus1d', 'c3d', 'tada', 'joint'"),
        ("down_sampling", "'dconv', 'avg', 'max'"),
        ("up_sampling", "'nearest', 'trilinear', 'deconv'"),
        ("formulation", "'channels_last', 'plain'"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(setting, known):
    config = DiST.Config(num_classes=2)
    object.__setattr__(config, setting, "2d")  # the type checker of the tests refuses it on the way in
    with pytest.raises(ValueError, match=rf"{setting} \('2d'\) must be one of {known}"):
        config.__post_init__()


def test_features_of_other_shapes_are_refused(sizes, make_features):
    head = DiST(
        DiST.Config(
            num_classes=7, num_frames=sizes.T, num_layers=1, width=sizes.D, grid=(sizes.w, sizes.h + 1), patch_size=sizes.p
        )
    )  # fmt: skip
    features = make_features([0])
    with pytest.raises(ValueError, match=r"pixels must be \(8, 10, 8, 3\) per clip .*, got \(8, 6, 10, 3\)"):
        head.embed(features)
    pixels = torch.zeros(sizes.B, 8, 10, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"tokens of layer 0 must be \(4, 21, 24\) per clip .*, got \(4, 16, 24\)"):
        head.embed(ClipFeatures(tokens=features.tokens, pixels=pixels))
