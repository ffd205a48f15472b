"""What heads show of their insides is what their papers call it, computed from their parameters alone."""

import torch
from torch.nn.functional import conv3d, layer_norm, linear

from vcache.heads.dist import DiST
from vcache.heads.evl import EVL


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def small_dist(sizes) -> DiST:
    config = DiST.Config(
        num_classes=sizes.K,
        num_frames=sizes.T,
        num_layers=sizes.L,
        width=sizes.D,
        grid=(sizes.h, sizes.w),
        patch_size=sizes.p,
        embed_dim=sizes.E,
        integration_dim=64,
        temporal_dim=6,
    )
    return DiST(config).eval()


def test_the_first_layer_of_dist_is_the_t_block_of_the_stem_and_the_sum_of_both_streams(sizes, make_features):
    head = small_dist(sizes)
    features = make_features(range(sizes.L))
    own = dict(head.named_parameters())

    def weights(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return own[f"{name}.weight"], own[f"{name}.bias"]

    with torch.no_grad():
        mean, std = torch.tensor(head.config.pixel_mean), torch.tensor(head.config.pixel_std)
        images = ((features.pixels / 255 - mean) / std).permute(0, 4, 1, 2, 3)
        z = conv3d(images, *weights("temporal_stem"), stride=(1, sizes.p, sizes.p), padding=(2, 0, 0))
        normed = layer_norm(z.movedim(1, -1), (6,), *weights("temporal_nets.0.ln")).movedim(-1, 1)
        inner = quick_gelu(conv3d(normed, *weights("temporal_nets.0.temporal_net.c_fc1"), padding=(1, 0, 0)))
        z = quick_gelu(z + conv3d(inner, *weights("temporal_nets.0.temporal_net.c_fc2"), padding=(0, 1, 1)))
        down = conv3d(z, *weights("temporal2integration_nets.0.linear_fuse"), stride=(2, 1, 1))
        patches = linear(features.tokens[0][:, :, 1:], *weights("input_linears.0"))
    first = head.inner_features(features)[0]
    torch.testing.assert_close(first.temporal, z.flatten(3).permute(0, 2, 3, 1))
    torch.testing.assert_close(first.integrated, patches + down.flatten(3).permute(0, 2, 3, 1))


def test_a_layer_of_dist_knows_the_layers_before_it_and_none_after(sizes, make_features):
    head, features = small_dist(sizes), make_features(range(sizes.L))
    before = head.inner_features(features)
    features.tokens[1] = features.tokens[1] + 1
    after = head.inner_features(features)
    same = [torch.equal(a.integrated, b.integrated) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, False]
    assert [torch.equal(a.temporal, b.temporal) for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_evl_shows_y_of_every_decoder_layer_also_of_one_that_is_read_twice(sizes, make_features):
    head = EVL(
        EVL.Config(
            num_classes=sizes.K,
            num_frames=sizes.T,
            width=sizes.D,
            num_heads=sizes.H,
            grid=(sizes.h, sizes.w),
            layers=(-2, -1, -2),
            temporal_conv=False,
            temporal_cross_attention=False,
        )
    ).eval()
    with torch.no_grad():
        for positions in head.decoder.temporal_pos_embed:
            positions.normal_()
    features = make_features((-2, -1))
    inner = head.inner_features(features)
    assert [one.layer for one in inner] == [-2, -1, -2]
    for one, positions in zip(inner, head.decoder.temporal_pos_embed, strict=True):
        torch.testing.assert_close(one.integrated, one.spatial + positions.detach()[:, None])
