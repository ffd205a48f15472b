"""What DiST costs: multiply-adds of its formulation and of vcache's, and the paper's numbers beside them.

The paper counts one clip, and parameters with the image tower, less the tower's ln_post and projection, which DiST has none of.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vcache.heads.dist_config import DiSTConfig
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.head_presets import HeadPreset

REMARKS = (
    "Table 1's GFLOPs are of 2 pooling layers, as on Something-Something: so counted all are met within 0.3, but for joint.",
    "Kinetics has 4 such layers, which take 1.0 more, and 3.8 at alpha768.",
    "Tables 4 and 6 give TFLOPs, the smallest to two digits, and lose up to 2% by it.",
    "joint: 165.0 cannot be those of attention over all patches of 16 frames, whose scores and weighted sums alone take 22.7.",
)
SHOWN = (
    "layers",
    "gamma",
    "integration_dim",
    "temporal_dim",
    "adaptive_pooling_layers",
    "temporal_encoder",
    "integration_branch",
    "integration_to_temporal",
    "temporal_to_integration",
    "temporal_block",
    "down_sampling",
    "up_sampling",
)
"""Fields of the Config that are told beside a count."""


def head_macs(config: DiSTConfig) -> int:
    """MACs of one clip as the official code makes them, with the lateral up(M) of the last layer, which goes nowhere."""
    per_layer = _num_layers(config)
    return (
        _stem(config)
        + per_layer["t_block"] * _t_block(config)
        + per_layer["read"] * config.num_frames * (1 + _patches(config)) * config.width * config.integration_dim
        + per_layer["i_block"] * _i_block(config)
        + per_layer["down"] * _down(config)
        + per_layer["up"] * _up(config, with_cls=False)
        + config.adaptive_pooling_layers * _pooling(config, absorbed=False)
        + _classifier(config)
    )


def computed_macs(config: DiSTConfig) -> int:
    """MACs of the matrix products of vcache's formulation: no last up(M), keys and values of the pooling not projected."""
    num_up = _num_layers(config)["up"]
    saved = num_up * _up(config, with_cls=False) - max(0, num_up - 1) * _up(config, with_cls=True)
    saved += config.adaptive_pooling_layers * (_pooling(config, absorbed=False) - _pooling(config, absorbed=True))
    return head_macs(config) - saved


def embedded_for_nothing_macs(config: DiSTConfig) -> int:
    """MACs of the backbone's patch embedding of the frames that only the temporal encoder sees.

    The official code embeds the patches of all frames and drops these; the paper's GFLOPs have them (Table 1d). vcache encodes
    the frames of the clip alone.
    """
    num_frames = (config.gamma - 1) * config.num_frames if config.temporal_encoder else 0
    return num_frames * _patches(config) * 3 * config.patch_size**2 * config.width


def _num_layers(config: DiSTConfig) -> dict[str, int]:
    """How many there are of each part."""
    depth = len(config.read_layers)
    both = config.temporal_encoder and config.integration_branch
    down = depth if both and config.temporal_to_integration else int(config.temporal_encoder)
    return {
        "t_block": depth if config.temporal_encoder else 0,
        "i_block": depth if config.integration_branch else 0,
        "read": depth if config.integration_branch else 1,
        "down": down,
        "up": depth if both and config.integration_to_temporal else 0,
    }


def _patches(config: DiSTConfig) -> int:
    return config.grid[0] * config.grid[1]


def _dense(config: DiSTConfig) -> int:
    """Patches that the temporal encoder sees of a clip."""
    return config.gamma * config.num_frames * _patches(config)


def _stem(config: DiSTConfig) -> int:
    return _dense(config) * config.temporal_dim * 3 * 5 * config.patch_size**2 if config.temporal_encoder else 0


def _t_block(config: DiSTConfig) -> int:
    n, c, inner = _dense(config), config.temporal_dim, max(1, config.temporal_dim // 4)
    frames = config.gamma * config.num_frames
    return {
        "r2plus1d": n * 12 * c**2,  # 3x1x1 and 1x3x3
        "c3d": n * 27 * c**2,
        "tada": n * 9 * c**2 + c**2 + 2 * frames * 3 * c * inner,  # 1x3x3; the calibration of its weights
        "joint": n * 12 * c**2 + 2 * n**2 * c,  # projections 4 c^2 a token, the MLP 8; scores and values
    }[config.temporal_block]


def _i_block(config: DiSTConfig) -> int:
    d, inner = config.integration_dim, max(1, config.integration_dim // 4)
    return config.num_frames * (1 + _patches(config)) * (2 * d**2 + 2 * d * inner + 3 * inner**2)


def _down(config: DiSTConfig) -> int:
    taps = config.gamma if config.down_sampling == "dconv" else 1
    return config.num_frames * _patches(config) * taps * config.temporal_dim * config.integration_dim


def _up(config: DiSTConfig, *, with_cls: bool) -> int:
    T, P, c = config.num_frames, _patches(config), config.temporal_dim
    linear = T * (P + int(with_cls)) * c * config.integration_dim
    if config.up_sampling != "deconv":
        return linear
    return linear + T * P * (config.gamma + 2 * max(1, config.gamma // 2)) * c**2


def _pooling(config: DiSTConfig, *, absorbed: bool) -> int:
    """One layer: a query per frame over its tokens, one per clip over the frames, and an MLP of each."""
    T, N, d = config.num_frames, 1 + _patches(config), config.integration_dim
    H = config.num_pooling_heads
    spatial = T * (4 * d**2 + 2 * H * N * d) if absorbed else T * (2 * d**2 + 2 * N * d**2 + 2 * N * d)
    temporal = 2 * d**2 + 2 * T * d**2 + 2 * T * d
    return spatial + temporal + (T + 1) * 8 * d**2


def _classifier(config: DiSTConfig) -> int:
    """The projected mean CLS, the projection to the text, and a cosine with each class."""
    d, E = config.integration_dim, config.embed_dim
    return config.width * d + d * E + E * config.num_classes


def beside_the_paper(preset: HeadPreset, config: DiSTConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the table has besides its count: of one clip, and the parameters with the tower, as in the paper."""
    clip_gmacs = row["total_gmacs"] / row["num_views"] + embedded_for_nothing_macs(config) / 1e9
    return {
        "with_tower": row["parameters"] + CLIP_TOWERS[preset.model].num_trunk_parameters,
        "clip_gmacs": clip_gmacs,
        "deviation": clip_gmacs / preset.gmacs - 1 if preset.gmacs else None,
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield _columns("preset", "parameters", "+ tower", "paper", "GMACs", "paper", "off", "head")
    for row in rows:
        millions, gmacs, off = row["paper_millions"], row["paper_gmacs"], row["deviation"]
        yield _columns(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['with_tower'] / 1e6:.2f} M",
            f"{millions:.0f} M" if millions else "",
            f"{row['clip_gmacs']:,.1f}",
            f"{gmacs:,}" if gmacs else "",
            f"{off:+.1%}" if off is not None else "",
            f"{row['head_macs'] / 1e9:,.2f}",
        )
    yield "  + tower: with CLIP's image tower, without its ln_post and projection, as the paper counts."
    yield "  GMACs: 10^9 multiply-adds of backbone and head for one view, of 3; the paper calls them GFLOPs. With the patch"
    yield "  embedding of all frames, as the official code has it; vcache embeds the frames of the clip alone."


def _columns(name: str, *numbers: str) -> str:
    widths = (11, 10, 6, 8, 7, 7, 7)
    return f"{name:<23}{''.join(f'{number:>{width}}' for number, width in zip(numbers, widths, strict=True))}".rstrip()
