"""Text4Vis: a fixed classifier of text embeddings over what a small transformer makes of the frames' embeddings.

Wu et al. 2023, "Revisiting Classifier: Transferring Vision-Language Models for Video Recognition", sections 2.2 and 4.2;
VideoCLIP, modules/video_clip.py at d61b34d (whwu95/Text4Vis). x are CLIP's embeddings of the frames, not normalised:

    v = fusion(x)                               temporal_fusion.py
    logits = exp(logit_scale) cos(v, w_k)       in training; the scale starts at CLIP's and is trained
    logits = 100 cos(v, w_k)                    in evaluation, as coded: it changes no ranking of one view

and w_k is one of the classifiers of Table 1, fixed or, as in Table A.2, trained along. Here the image tower is frozen; in the
paper it is trained.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from vcache.heads.lda import discriminants
from vcache.heads.offline_classifiers import orthogonal_rows, random_rows, span_projection
from vcache.heads.prompt_learning import ClassPrompts, PromptClassifier
from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe
from vcache.heads.temporal_fusion import FrameConv, FrameTransformer, MeanPooling
from vcache.heads.text import (
    EVALUATION_SCALE,
    OPENAI_LOGIT_SCALE,
    ClassText,
    TextClassifier,
    cosines,
    mean_of_templates,
)

Temporal = Literal["t_trans", "tap", "t1d"]
Classifier = Literal["text", "random", "orthogonal", "lda", "learned", "coop"]
DRAWN: Mapping[str, Callable[[int, int], Tensor]] = {
    "random": random_rows,
    "orthogonal": orthogonal_rows,
    "learned": random_rows,
}
"""(K, E) -> the rows that a classifier begins with, of those that are made when the head is."""


@register_head("text4vis")
class Text4Vis(nn.Module):
    """Temporal modelling of the frames' embeddings, and a classifier that is given and not learnt."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        embed_dim: int = 512
        temporal: Temporal = "t_trans"
        """Table 2: a transformer of 6 blocks, the mean, or a depthwise convolution over time."""
        temporal_heads: int | None = None
        """Of the transformer. None: one per 64 channels, as official."""
        adapter: bool = False
        """A linear layer after it that starts as the identity. Ours: of a frozen tower `tap` has nothing else to train."""
        classifier: Classifier = "text"
        """Table 1: text embeddings of the class names, rows of a normal distribution, orthogonal rows, or the rows of a linear
        discriminant analysis of the training clips. "learned" is the baseline without text of Table 3: random rows, trained.
        Table 4: "coop" is text embeddings with learnt vectors in place of a template (prompt_learning.py)."""
        frozen: bool = True
        """Whether the classifier stays as it is given; Table A.2. A learned one never does, whatever this says."""
        templates: str = "text4vis"
        """Table 4: the set of templates whose text embeddings classify (`vcache text`)."""
        training_templates: str | None = None
        """Table 4, "multiple fixed templates": each training step classifies by one of this set, drawn at random; `templates`
        classify in evaluation. None: by `templates` throughout."""
        initial_logit_scale: float | None = None
        """ln of the factor of the cosines that training starts with. None: CLIP's; ln 100 where the classifier is no text."""
        lda_videos: int = 60
        """Of each class, that the discriminant analysis takes; all of a class that has fewer."""
        lda_shrinkage: float = 0.1
        """Of its covariance within classes, in [0, 1]. The paper does not say it; the official file is called lda_0.1.pt, for
        this or for a tenth of the videos. Without any, few clips for the channels give rows of noise."""
        context_length: int = 4
        """Of classifier=coop: learnt vectors before the name of the class."""
        class_specific_context: bool = False
        """Of classifier=coop: whether each class has vectors of its own."""
        context_width: int | None = None
        """Of classifier=coop: channels of the text tower's tokens, which come from the store. None: embed_dim."""

        def __post_init__(self) -> None:
            for name, known in (("temporal", get_args(Temporal)), ("classifier", get_args(Classifier))):
                if getattr(self, name) not in known:
                    raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}")
            self._check_sizes()
            self._check_classifier()

        def _check_sizes(self) -> None:
            for name in ("num_classes", "embed_dim", "lda_videos", "context_length"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
            if self.embed_dim % self.num_temporal_heads:
                raise ValueError(
                    f"embed_dim ({self.embed_dim}) must be a multiple of its {self.num_temporal_heads} temporal_heads"
                )
            if not 0 <= self.lda_shrinkage <= 1:
                raise ValueError(f"lda_shrinkage ({self.lda_shrinkage}) must be in [0, 1]")
            if self.initial_logit_scale is not None and not math.isfinite(self.initial_logit_scale):
                raise ValueError(f"initial_logit_scale ({self.initial_logit_scale}) must be a number")

        def _check_classifier(self) -> None:
            if self.classifier == "orthogonal" and self.num_classes > self.embed_dim:
                raise ValueError(
                    f"classifier ('orthogonal') cannot have {self.num_classes} rows of {self.embed_dim} channels: in the paper "
                    "there are fewer. Choose another classifier"
                )
            if self.training_templates is not None and (self.classifier != "text" or not self.frozen):
                raise ValueError(
                    f"training_templates ({self.training_templates!r}) need classifier 'text', frozen: each step has another"
                )

        @property
        def num_temporal_heads(self) -> int:
            heads = max(1, self.embed_dim // 64) if self.temporal_heads is None else self.temporal_heads
            if heads < 1:
                raise ValueError(f"temporal_heads ({heads}) must be at least 1")
            return heads

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
    one_class = True
    any_text_width = True

    text_projection: Tensor | None
    """(W, E), of text of another width than the videos' embeddings; else None."""
    training_texts: Tensor | None
    """(K, M, E), of the templates that training draws from. A run is evaluated without them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.fusion_model = _fusion(config)
        self.adapter = _identity(config.embed_dim) if config.adapter else nn.Identity()
        self.classifier = _classifier(config)
        self.register_buffer("text_projection", None)
        self.register_buffer("training_texts", None, persistent=False)
        if config.initial_logit_scale is not None:
            nn.init.constant_(self.classifier.logit_scale, config.initial_logit_scale)
        if config.classifier in DRAWN:
            self._classify_by(DRAWN[config.classifier](config.num_classes, config.embed_dim))

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        by_text = config.classifier == "text"
        return HeadRequirements(
            embed=True,
            text=config.templates if by_text else None,
            training_text=config.training_templates,
            fitted_on=config.lda_videos if config.classifier == "lda" else 0,
            prompts=config.context_length if config.classifier == "coop" else 0,
            own_prompts=config.class_specific_context,
        )

    def set_text(self, text: ClassText) -> None:
        """Classify by the embeddings of these class names; of more, fewer or other classes than trained on, too.

        Embeddings of another encoder may have another width W. They are projected to E by a matrix that is made of the first ones
        that are given, and that stays: inner products of up to E classes are kept exactly (offline_classifiers.span_projection).
        The paper does not say how it brings DistilBERT's 768 channels to CLIP's 512; this is ours.

        Raises:
            ValueError: they have yet another width.
        """
        rows = mean_of_templates(text.embeddings)
        if self.text_projection is None and rows.shape[1] != self.config.embed_dim:
            self.text_projection = span_projection(rows, self.config.embed_dim).to(self._rows.embeddings)
        self._rows.assign(self._projected(rows), text.logit_scale)

    def set_training_text(self, text: ClassText) -> None:
        """Each training step classifies by one of these templates."""
        self.training_texts = self._projected(text.embeddings)

    def fit(self, batches: Iterable[tuple[ClipFeatures, Tensor]]) -> None:
        """Classify by the discriminant analysis of these clips and their classes, Int (B,).

        A clip is the mean of its frames' embeddings, not normalised; the paper says no more than "visual embeddings".

        Raises:
            ValueError: a class has no clip, or no two clips of a class differ.
        """
        pairs = [(_embeddings(features).float().mean(dim=1).cpu(), labels.cpu()) for features, labels in batches]
        features, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        rows = discriminants(features, labels, self.config.num_classes, shrinkage=self.config.lda_shrinkage)
        self._classify_by(rows.float())

    def set_prompts(self, prompts: ClassPrompts) -> None:
        """Classify by these class names behind the learnt context; of other classes too, unless each has its own context."""
        assert isinstance(self.classifier, PromptClassifier)
        self.classifier.set(prompts)

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        return self.classify_embedding(self.embed(features))

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B E"]:
        """The video in the space of the text, not normalised."""
        return self.adapter(self.fusion_model(_embeddings(features).to(self.classifier.logit_scale.dtype)))

    def classify_embedding(self, embedding: Float[Tensor, "B E"]) -> Float[Tensor, "B K"]:
        if not self.training:
            return self.classifier(embedding, EVALUATION_SCALE)
        if self.training_texts is None:
            return self.classifier(embedding)
        drawn = int(torch.randint(self.training_texts.shape[1], ()))
        return self.classifier.logit_scale.exp() * cosines(embedding, self.training_texts[:, drawn])

    @property
    def _rows(self) -> TextClassifier:
        assert isinstance(self.classifier, TextClassifier)
        return self.classifier

    def class_embeddings(self) -> Float[Tensor, "K E"]:
        return self.classifier.embeddings

    def _classify_by(self, rows: Float[Tensor, "K E"]) -> None:
        """Normalised, as text is: a cosine does not see it, but rows that are trained move in steps of one size."""
        self._rows.assign(normalize(rows, dim=-1), OPENAI_LOGIT_SCALE)

    def _projected(self, text: Float[Tensor, "*any W"]) -> Float[Tensor, "*any E"]:
        text, projection = text.to(self._rows.embeddings), self.text_projection
        width = self.config.embed_dim if projection is None else len(projection)
        if text.shape[-1] != width:
            raise ValueError(
                f"text embeddings have {text.shape[-1]} channels, those that were given before have {width}"
            )
        return text if projection is None else text @ projection

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """With the projection of the text that was given before the head was saved."""
        saved, device = state_dict.get(f"{prefix}text_projection"), self.classifier.logit_scale.device
        self.text_projection = None if saved is None else torch.empty_like(saved, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _embeddings(features: ClipFeatures) -> Float[Tensor, "B T E"]:
    assert features.embed is not None
    return features.embed


def _fusion(config: Text4Vis.Config) -> nn.Module:
    width = config.embed_dim
    if config.temporal == "tap":
        return MeanPooling()
    if config.temporal == "t1d":
        return FrameConv(width)
    return FrameTransformer(width, config.num_temporal_heads)


def _classifier(config: Text4Vis.Config) -> TextClassifier | PromptClassifier:
    if config.classifier == "coop":
        num_contexts = config.num_classes if config.class_specific_context else None
        return PromptClassifier(config.context_length, config.context_width or config.embed_dim, num_contexts)
    trained = config.classifier == "learned" or not config.frozen
    return TextClassifier(config.num_classes, config.embed_dim, train_embeddings=trained, train_scale=True)


def _identity(width: int) -> nn.Linear:
    linear = nn.Linear(width, width)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(width))
        linear.bias.zero_()
    return linear
