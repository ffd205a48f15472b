"""What the top blocks of a backbone cost that a head runs on cached tokens: multiply-adds of one clip, by formula."""

from vcache.heads.tail_classifier import decoder_config
from vcache.heads.tail_head import TailConfig
from vcache.heads.tail_memory import reads_cls_alone
from vcache.pipelines import counting_evl


def tokens_per_clip(config: TailConfig) -> int:
    """CLS and patches of all frames."""
    return config.num_frames * (1 + config.grid[0] * config.grid[1])


def wanted_per_clip(config: TailConfig, *, cls_alone: bool) -> int:
    """Tokens of which a block makes queries, and what comes behind its attention."""
    return config.num_frames if cls_alone else tokens_per_clip(config)


def projection_macs(config: TailConfig) -> int:
    """Q, K, V and the output of one attention layer, for all tokens."""
    return 4 * tokens_per_clip(config) * config.width**2


def score_macs(config: TailConfig, length: int) -> int:
    """Scores of each token with `length` of them, and the weighted sum."""
    return 2 * tokens_per_clip(config) * length * config.width


def weight_macs(config: TailConfig, *, cls_alone: bool = False) -> int:
    """The products with weights of one block: keys and values of all tokens, the rest of those that are wanted."""
    wanted = wanted_per_clip(config, cls_alone=cls_alone)
    return (2 * tokens_per_clip(config) + 10 * wanted) * config.width**2


def block_macs(config: TailConfig, *, cls_alone: bool = False) -> int:
    """One block of CLIP on all frames: attention within each, and the MLP, which is four times as wide."""
    wanted, length = wanted_per_clip(config, cls_alone=cls_alone), tokens_per_clip(config) // config.num_frames
    return weight_macs(config, cls_alone=cls_alone) + 2 * wanted * length * config.width


def run_macs(config: TailConfig) -> int:
    """The blocks that are run in training, with nothing added, and of the last block CLS alone where nothing else is read."""
    return (config.num_blocks - 1) * block_macs(config) + block_macs(config, cls_alone=reads_cls_alone(config))


def classifier_macs(config: TailConfig) -> int:
    """Of the mean CLS; with text the projection of each frame comes before it. EVL's decoder is counted as it is computed."""
    if config.classifier == "evl":
        return counting_evl.computed_macs(decoder_config(config))
    if config.classifier == "text":
        return config.embed_dim * (config.num_frames * config.width + config.num_classes)
    return config.width * config.num_classes
