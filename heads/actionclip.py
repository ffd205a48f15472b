"""ActionCLIP: videos and texts are matched, and a prompt after the image tower makes one embedding of those of the frames.

Wang et al. 2021, "ActionCLIP: A New Paradigm for Video Action Recognition", sections 3.2 and 3.3; visual_prompt of
modules/Visual_Prompt.py, train.py and test.py at 31c34df (sallymmx/ActionCLIP). x are CLIP's embeddings of the frames:

    v = prompt(x)                                                     temporal_fusion.py
    training    text i is one of the templates of the class of video i, drawn at random; s = exp(logit_scale), trained
                KL between the softmax of s cos(v_i, text_j) over j and what videos match what texts, and over i; their mean
    evaluation  p(class) = mean over the templates of softmax over the classes of 100 cos(v, text of class and template)

Where a video may have several classes, its text is of one of them, drawn at random, and matches every video that has that class.
A video without a class gets the text of any, which it does not match.

Here both towers are frozen: the row V1 of Table 5, 72.21% where the paper trains both to 78.36%.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize, softmax

from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe
from vcache.heads.temporal_fusion import (
    CLS_HEADS,
    FrameConv,
    FrameLSTM,
    FrameTransformer,
    FrameTransformerCls,
    MeanPooling,
)
from vcache.heads.text import EVALUATION_SCALE, NO_TEXT, ClassText, cosines, mean_of_templates

Prompt = Literal["meanp", "conv1d", "lstm", "transf", "transf_cls"]
Matches = Literal["softmax", "ideal"]
_DUAL_TEMPERATURE = 1000


@register_head("actionclip")
class ActionCLIP(nn.Module):
    """A visual prompt after the image tower, matched with the text of the classes in many templates."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        num_frames: int = 8
        """Of Transf_cls, which has a position for each. The others take clips of any number of frames, Transf of up to 77."""
        embed_dim: int = 512
        prompt: Prompt = "transf"
        """Table 4: what makes one embedding of those of the frames."""
        prompt_heads: int | None = None
        """Of Transf. None: one per 64 channels, as official."""
        scrambled: bool = False
        """Of Conv1D: read frames and channels in the wrong order, as the official code does. For its checkpoints."""
        matches: Matches = "softmax"
        """What the similarities are compared with: softmax of 10 times what matches, as coded, or equal shares of it, the
        ideal similarities of the paper."""
        dual_softmax: bool = False
        """Weigh each similarity by how much it is that of its column, before the loss: "DS" of Text4Vis's train_nce.py."""
        templates: str = "actionclip"
        """The set of templates whose text embeddings are matched (`vcache text`)."""

        def __post_init__(self) -> None:
            for name, known in (("prompt", get_args(Prompt)), ("matches", get_args(Matches))):
                if getattr(self, name) not in known:
                    raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}")
            for name in ("num_classes", "num_frames", "embed_dim", "prompt_heads"):
                if (value := getattr(self, name)) is not None and value < 1:
                    raise ValueError(f"{name} ({value}) must be at least 1")
            num_heads = {"transf": _num_heads(self), "transf_cls": CLS_HEADS}.get(self.prompt, 1)
            if self.embed_dim % num_heads:
                raise ValueError(
                    f"prompt {self.prompt!r} has {num_heads} heads, which do not divide the {self.embed_dim} channels of the "
                    "embeddings. Another prompt is chosen with --set prompt=NAME."
                )

    summary = "visual prompt on the frame embeddings, matched with text in many templates by a symmetric KL loss"
    # As coded: CLIP, of which only the scale is trained here, at a tenth of the rate.
    recipe = Recipe(
        lr=5e-5,
        weight_decay=0.2,
        betas=(0.9, 0.98),
        epochs=50,
        batch_size=128,
        warmup_epochs=5.0,
        warmup_start=0.0,
        schedule_every=10,
        lr_multipliers=(("*logit_scale", 0.1),),
    )

    texts: Tensor
    """(K, M, E), normalised."""
    mean_texts: Tensor
    """(K, E), of the templates of each class."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.fusion_model = _prompt(config)
        self.logit_scale = nn.Parameter(torch.tensor(torch.nan))
        # Their number of templates is known when they are given.
        self.texts = nn.Buffer(torch.full((config.num_classes, 1, config.embed_dim), torch.nan))
        self.mean_texts = nn.Buffer(self.texts[:, 0].clone(), persistent=False)
        self._has_text = False

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        num_frames = config.num_frames if config.prompt == "transf_cls" else None
        return HeadRequirements(embed=True, text=config.templates, num_frames=num_frames)

    @torch.no_grad()
    def set_text(self, text: ClassText) -> None:
        """Match with the embeddings of these class names; of more, fewer or other classes than trained on, too. Where there is a
        logit scale already, as after training, it stays.

        Raises:
            ValueError: they have another width than the videos' embeddings.
        """
        width = self.config.embed_dim
        if text.embeddings.shape[2] != width:
            raise ValueError(
                f"text embeddings have {text.embeddings.shape[2]} channels, those of the videos {width}: ActionCLIP matches both "
                "in the space of one CLIP"
            )
        self.texts = normalize(text.embeddings.to(self.texts), dim=-1)
        if not self.logit_scale.isfinite():
            self.logit_scale.fill_(text.logit_scale)
        self._keep_mean()

    def class_embeddings(self) -> Float[Tensor, "K E"]:
        """The mean of the templates of each class, normalised.

        Raises:
            ValueError: no text was given.
        """
        self._check_text()
        return self.mean_texts

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        """Log-probabilities, of which the softmax gives the probabilities."""
        return self.classify_embedding(self.embed(features))

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B E"]:
        """The video in the space of the text, not normalised."""
        assert features.embed is not None
        return self.fusion_model(features.embed.to(self.logit_scale.dtype))

    def classify_embedding(self, embedding: Float[Tensor, "B E"]) -> Float[Tensor, "B K"]:
        """
        Raises:
            ValueError: no text was given.
        """
        self._check_text()
        K, M, _ = self.texts.shape
        with torch.autocast(embedding.device.type, enabled=False):
            similarities = normalize(embedding.float(), dim=-1) @ self.texts.float().flatten(0, 1).mT
            # In logarithms, as the probability of a class far away would be 0 in float32.
            of_each = log_softmax(EVALUATION_SCALE * similarities.unflatten(1, (K, M)), dim=1)
            return of_each.logsumexp(dim=2) - math.log(M)

    def training_loss(
        self, features: ClipFeatures, targets: Tensor, gather: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B K"]]:
        """The symmetric KL loss of each clip, and logits for the accuracy in training.

        These logits are of the mean of the templates, which ranks nearly as `forward` does. That of 16 templates of 400 classes
        would take four times as long as all the rest of a step with mean pooling.

        Args:
            targets: Int (B,), or Float (B, K) where a video may have several classes or none.
            gather: (B, ...) -> the rows of all processes.

        Raises:
            ValueError: no text was given.
        """
        self._check_text()
        embedding = self.embed(features)
        classes = _drawn_class(targets)
        template = torch.randint(self.texts.shape[1], (len(classes),)).to(classes.device)
        texts = self.texts[classes, template]
        with torch.autocast(embedding.device.type, enabled=False):
            videos = normalize(embedding.float(), dim=-1)
            scale = self.logit_scale.exp()
            all_videos, all_texts = gather(videos), gather(texts)
            of_videos = self._similarities(scale * videos, scale * all_videos, all_texts)
            of_texts = self._similarities(scale * texts, scale * all_texts, all_videos)
            matching = _matching(targets, gather(classes)).to(of_videos)
            matched = _matching(gather(targets), classes).to(of_videos).mT
            loss = (self._kl(of_videos, matching) + self._kl(of_texts, matched)) / 2
        with torch.no_grad():
            return loss, EVALUATION_SCALE * cosines(embedding, self.mean_texts)

    def _check_text(self) -> None:
        if not self._has_text:
            raise ValueError(NO_TEXT)

    def _keep_mean(self) -> None:
        """Of texts that have changed."""
        self.mean_texts = mean_of_templates(self.texts)
        self._has_text = bool(self.texts.isfinite().all() and self.logit_scale.isfinite())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Of as many templates as were given before the head was saved."""
        self.texts = torch.empty_like(state_dict.get(f"{prefix}texts", self.texts), device=self.logit_scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._keep_mean()

    def _similarities(
        self, own: Float[Tensor, "B E"], of_all: Float[Tensor, "N E"], others: Float[Tensor, "N E"]
    ) -> Float[Tensor, "B N"]:
        """Of the rows of this process with those of all; `of_all` are its own kind's."""
        similarities = own @ others.mT
        return dual_softmax(similarities, of_all @ others.mT) if self.config.dual_softmax else similarities

    def _kl(self, similarities: Float[Tensor, "B N"], matching: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        return kl_of_matches(similarities, matching, ideal=self.config.matches == "ideal")


def kl_of_matches(
    similarities: Float[Tensor, "B N"], matching: Float[Tensor, "B N"], *, ideal: bool = False
) -> Float[Tensor, " B"]:
    """KL divergence of each row's softmax from what matches, 1 or 0: from the softmax of 10 times it, or its equal shares.

    The mean over the rows is the official KLLoss (utils/KLLoss.py at 31c34df). Where nothing matches, a row of equal shares is 0,
    and the softmax of nothing is the same for all.
    """
    wanted = matching / matching.sum(dim=1, keepdim=True).clamp(min=1) if ideal else softmax(10 * matching, dim=1)
    return (torch.special.xlogy(wanted, wanted) - wanted * log_softmax(similarities, dim=1)).sum(dim=1)


def dual_softmax(similarities: Float[Tensor, "B N"], of_all: Float[Tensor, "N N"]) -> Float[Tensor, "B N"]:
    """Similarities times N times their share of their column, a softmax over all N rows at temperature 1000.

    Rows that are those of all: DualLoss, utils/NCELoss.py at d61b34d (whwu95/Text4Vis).
    """
    shares = (similarities / _DUAL_TEMPERATURE - (of_all / _DUAL_TEMPERATURE).logsumexp(dim=0)).exp()
    return similarities * shares * len(of_all)


def _matching(targets: Tensor, classes: Int[Tensor, " N"]) -> Float[Tensor, "B N"]:
    """1 where text j is of a class of video i."""
    if targets.is_floating_point():
        return targets[:, classes]
    return (targets[:, None] == classes).float()


def _drawn_class(targets: Tensor) -> Int[Tensor, " B"]:
    """The class; of several one at random, of none any. Drawn on the CPU, so that every device trains on the same texts."""
    if not targets.is_floating_point():
        return targets
    reached = (targets + (targets.sum(dim=1, keepdim=True) == 0)).cumsum(dim=1)
    drawn = torch.rand(len(targets), 1).to(targets) * reached[:, -1:]
    return (reached <= drawn).sum(dim=1)


def _num_heads(config: ActionCLIP.Config) -> int:
    return config.prompt_heads or max(1, config.embed_dim // 64)


def _prompt(config: ActionCLIP.Config) -> nn.Module:
    width = config.embed_dim
    match config.prompt:
        case "meanp":
            return MeanPooling()
        case "conv1d":
            return FrameConv(width, scrambled=config.scrambled)
        case "lstm":
            return FrameLSTM(width)
        case "transf":
            return FrameTransformer(width, _num_heads(config))
    return FrameTransformerCls(width, config.num_frames)
