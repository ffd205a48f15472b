"""ActionCLIP: videos and texts are matched, and a prompt after the image tower makes one embedding of those of the frames.

Wang et al. 2021, "ActionCLIP: A New Paradigm for Video Action Recognition", sections 3.2 and 3.3; visual_prompt of
modules/Visual_Prompt.py, train.py and test.py at 31c34df (sallymmx/ActionCLIP). x are CLIP's embeddings of the frames:

    v = prompt(x)                                                     temporal_fusion.py
    training    text i is one of the templates of the class of video i, drawn at random; s = exp(logit_scale), trained
                KL between the softmax of s cos(v_i, text_j) over j and what videos match what texts, and over i; their mean
    evaluation  p(class) = mean over the templates of softmax over the classes of 100 cos(v, text of class and template)

Here both towers are frozen: the row V1 of Table 5, 72.21% where the paper trains both to 78.36%.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize, softmax

from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe
from vcache.heads.temporal_fusion import (
    FrameConv,
    FrameLSTM,
    FrameTransformer,
    FrameTransformerCls,
    MeanPooling,
)
from vcache.heads.text import ClassText

EVALUATION_SCALE = 100.0


@register_head("actionclip")
class ActionCLIP(nn.Module):
    """A visual prompt after the image tower, matched with the text of the classes in many templates."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        num_frames: int = 8
        embed_dim: int = 512
        prompt: Literal["meanp", "conv1d", "lstm", "transf", "transf_cls"] = "transf"
        """Table 4: what makes one embedding of those of the frames."""
        prompt_heads: int | None = None
        """Of Transf. None: one per 64 channels, as official."""
        scrambled: bool = False
        """Of Conv1D: read frames and channels in the wrong order, as the official code does. For its checkpoints."""
        matches: Literal["softmax", "ideal"] = "softmax"
        """What the similarities are compared with: softmax of 10 times what matches, as coded, or equal shares of it, the
        ideal similarities of the paper."""
        templates: str = "actionclip"
        """The set of templates whose text embeddings are matched (`vcache text`)."""

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

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.fusion_model = _prompt(config)
        self.logit_scale = nn.Parameter(torch.tensor(torch.nan))
        # Their number of templates is known when they are given.
        self.texts = nn.Buffer(torch.full((config.num_classes, 1, config.embed_dim), torch.nan))

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        return HeadRequirements(embed=True, text=config.templates, num_frames=config.num_frames)

    @torch.no_grad()
    def set_text(self, text: ClassText) -> None:
        """Match with the embeddings of these class names; of more, fewer or other classes than trained on, too."""
        self.texts = normalize(text.embeddings.to(self.texts), dim=-1)
        if not self.logit_scale.isfinite():
            self.logit_scale.fill_(text.logit_scale)

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        """Log-probabilities, of which the softmax gives the probabilities."""
        return self.classify_embedding(self.embed(features))

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B E"]:
        """The video in the space of the text, not normalised."""
        assert features.embed is not None
        return self.fusion_model(features.embed.to(self.logit_scale.dtype))

    def classify_embedding(self, embedding: Float[Tensor, "B E"]) -> Float[Tensor, "B K"]:
        with torch.autocast(embedding.device.type, enabled=False):
            videos = normalize(embedding.float(), dim=-1)
            similarities = EVALUATION_SCALE * torch.einsum("be,kme->bmk", videos, self.texts.float())
            return softmax(similarities, dim=-1).mean(dim=1).log()

    def training_loss(
        self, features: ClipFeatures, targets: Tensor, gather: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The symmetric KL loss of each clip, (B,), and what `forward` gives.

        Args:
            targets: Int (B,), or Float (B, K) where a video may have several classes; its text is then of one of them.
            gather: (B, ...) -> the rows of all processes.
        """
        embedding = self.embed(features)
        classes = _drawn_class(targets)
        template = torch.randint(self.texts.shape[1], (len(classes),)).to(classes.device)
        texts = self.texts[classes, template]
        with torch.autocast(embedding.device.type, enabled=False):
            videos = normalize(embedding.float(), dim=-1)
            scale = self.logit_scale.exp()
            all_videos, all_texts = gather(videos), gather(texts)
            of_videos = scale * videos @ all_texts.mT
            of_texts = scale * texts @ all_videos.mT
            matching = _matching(targets, gather(classes)).to(of_videos)
            matched = _matching(gather(targets), classes).to(of_videos).mT
            loss = (self._kl(of_videos, matching) + self._kl(of_texts, matched)) / 2
        with torch.no_grad():
            return loss, self.classify_embedding(embedding)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Of as many templates as were given before the head was saved."""
        self.texts = torch.empty_like(state_dict.get(f"{prefix}texts", self.texts))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _kl(self, similarities: Float[Tensor, "B N"], matching: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        return kl_of_matches(similarities, matching, ideal=self.config.matches == "ideal")


def kl_of_matches(
    similarities: Float[Tensor, "B N"], matching: Float[Tensor, "B N"], *, ideal: bool = False
) -> Float[Tensor, " B"]:
    """KL divergence of each row's softmax from what matches, 1 or 0: from the softmax of 10 times it, or its equal shares.

    The mean over the rows is the official KLLoss (utils/KLLoss.py at 31c34df).
    """
    wanted = matching / matching.sum(dim=1, keepdim=True) if ideal else softmax(10 * matching, dim=1)
    return (torch.special.xlogy(wanted, wanted) - wanted * log_softmax(similarities, dim=1)).sum(dim=1)


def _matching(targets: Tensor, classes: Int[Tensor, " N"]) -> Float[Tensor, "B N"]:
    """1 where text j is of a class of video i."""
    if targets.is_floating_point():
        return targets[:, classes]
    return (targets[:, None] == classes).float()


def _drawn_class(targets: Tensor) -> Int[Tensor, " B"]:
    """The class; of several one at random."""
    if not targets.is_floating_point():
        return targets
    return torch.multinomial(targets.float().cpu(), 1)[:, 0].to(targets.device)


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
            return FrameTransformer(width, config.prompt_heads or max(1, width // 64))
    return FrameTransformerCls(width, config.num_frames)
