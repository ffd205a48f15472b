"""Text4Vis: a fixed classifier of text embeddings over what a small transformer makes of the frames' embeddings.

Wu et al. 2023, "Revisiting Classifier: Transferring Vision-Language Models for Video Recognition", sections 2.2 and 4.2;
VideoCLIP, modules/video_clip.py at d61b34d (whwu95/Text4Vis). x are CLIP's embeddings of the frames, not normalised:

    v = fusion(x)                               temporal_fusion.py
    logits = exp(logit_scale) cos(v, w_k)       in training; the scale starts at CLIP's and is trained
    logits = 100 cos(v, w_k)                    in evaluation

and w_k is one of the classifiers of Table 1, fixed or, as in Table A.2, trained along. Here the image tower is frozen; in the
paper it is trained.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe
from vcache.heads.temporal_fusion import FrameConv, FrameTransformer, MeanPooling
from vcache.heads.text import ClassText, TextClassifier

EVALUATION_SCALE = 100.0
"""exp(logit_scale) in evaluation, as coded, whatever was trained. It changes no ranking of one view."""
OPENAI_LOGIT_SCALE = math.log(100)


@register_head("text4vis")
class Text4Vis(nn.Module):
    """Temporal modelling of the frames' embeddings, and a classifier that is given and not learnt."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        embed_dim: int = 512
        temporal: Literal["t_trans", "tap", "t1d"] = "t_trans"
        """Table 2: a transformer of 6 blocks, the mean, or a depthwise convolution over time."""
        temporal_heads: int | None = None
        """Of the transformer. None: one per 64 channels, as official."""
        classifier: Literal["text", "random", "orthogonal"] = "text"
        """Table 1: text embeddings of the class names, rows of a normal distribution, orthogonal rows."""
        frozen: bool = True
        """Whether the classifier stays as it is given; Table A.2."""
        templates: str = "text4vis"
        """Table 4: the set of templates whose text embeddings classify (`vcache text`)."""

    summary = "temporal transformer on the frame embeddings, classified by fixed text embeddings"
    # As coded, on 8 GPUs with 32 clips each. The paper has a batch of 128.
    recipe = Recipe(
        lr=5e-5,
        weight_decay=0.2,
        epochs=30,
        batch_size=256,
        warmup_epochs=5.0,
        warmup_start=0.0,
        schedule_every=10,
        lr_multipliers=(("*logit_scale", 0.1),),
    )
    view_average = "embeddings"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.fusion_model = _fusion(config)
        self.classifier = TextClassifier(
            config.num_classes, config.embed_dim, train_embeddings=not config.frozen, train_scale=True
        )
        if config.classifier != "text":
            self.classifier.assign(_random_rows(config), OPENAI_LOGIT_SCALE)

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        return HeadRequirements(embed=True, text=config.templates if config.classifier == "text" else None)

    def set_text(self, text: ClassText) -> None:
        """Classify by the embeddings of these class names; of more, fewer or other classes than trained on, too."""
        self.classifier.set(text)

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        return self.classify_embedding(self.embed(features))

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B E"]:
        """The video in the space of the text, not normalised."""
        assert features.embed is not None
        return self.fusion_model(features.embed.to(self.classifier.logit_scale.dtype))

    def classify_embedding(self, embedding: Float[Tensor, "B E"]) -> Float[Tensor, "B K"]:
        return self.classifier(embedding, None if self.training else EVALUATION_SCALE)


def _fusion(config: Text4Vis.Config) -> nn.Module:
    width = config.embed_dim
    if config.temporal == "tap":
        return MeanPooling()
    if config.temporal == "t1d":
        return FrameConv(width)
    return FrameTransformer(width, config.temporal_heads or max(1, width // 64))


def _random_rows(config: Text4Vis.Config) -> Float[Tensor, "K E"]:
    """Section 2.2, i and ii."""
    K, E = config.num_classes, config.embed_dim
    if config.classifier == "random":
        return torch.randn(K, E)
    return torch.linalg.qr(torch.randn(E, E))[0][:K]
