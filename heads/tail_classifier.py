"""Classifiers on what leaves the last blocks of a tail."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.evl import EVL, EVLDecoder
from vcache.heads.requirements import ClipFeatures
from vcache.heads.tail import FrozenTail
from vcache.heads.text import EVALUATION_SCALE, NO_TEXT, ClassText, TextClassifier

if TYPE_CHECKING:
    from vcache.heads.tail_head import TailConfig

ClassifierName = Literal["linear", "evl", "text"]


class TailClassifier(nn.Module):
    """From the tokens that leave the last blocks to logits.

    linear   mean over the frames of ln_post(CLS), dropout, linear layer: AIM's (I3DHead of mmaction, as configured at b3580d2)
    evl      EVL's decoder with T-Conv and T-PE, without cross-frame attention; dropout, linear layer
    text     mean over the frames of ln_post(CLS) @ proj, compared with text embeddings of the class names

    Args:
        mean_first: With "linear": ln_post of the mean CLS in place of the mean of ln_post(CLS).
        std: Of the weights that "linear" begins with. "evl" begins as in EVL.
    """

    def __init__(self, config: "TailConfig", *, mean_first: bool = False, std: float = 0.01) -> None:
        super().__init__()
        self.kind, self.mean_first = config.classifier, mean_first
        if config.classifier == "text":
            self.text = TextClassifier(config.num_classes, config.embed_dim, train_scale=True)
            if config.train_blocks:
                self.proj = nn.Parameter(config.width**-0.5 * torch.randn(config.width, config.embed_dim))
            return
        self.norm: nn.Module = nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.fc_cls = nn.Linear(config.width, config.num_classes)
        if config.classifier == "linear":
            nn.init.normal_(self.fc_cls.weight, std=std)
            nn.init.zeros_(self.fc_cls.bias)
        else:
            self.decoder, self.norm = EVLDecoder(decoder_config(config)), nn.LayerNorm(config.width)

    @property
    def reads_norm(self) -> bool:
        """Whether ln_post is used: EVL reads what leaves the blocks."""
        return self.kind != "evl"

    @property
    def num_layers(self) -> int:
        """Of how many of the last blocks it reads the output."""
        return len(self.decoder.config.layers) if self.kind == "evl" else 1

    @torch.no_grad()
    def begin_with(self, tail: FrozenTail) -> None:
        """Take over what is trained from the backbone's weights."""
        if self._trains_proj:
            assert tail.proj is not None  # TailHead.set_tail
            self.proj.copy_(tail.proj)

    def set_text(self, text: ClassText) -> None:
        self.text.set(text)

    def pool(
        self,
        outputs: Sequence[Float[Tensor, "B T N D"]],
        ln_post: nn.LayerNorm,
        proj: Float[Tensor, "D E"] | None,
    ) -> Float[Tensor, "B d"]:
        """What is classified, of the outputs of the last `num_layers` blocks, the lowest first."""
        if self.kind == "evl":
            tokens = dict(zip(self.decoder.config.layers, outputs, strict=True))
            return self.decoder(ClipFeatures(tokens=tokens))
        frames = outputs[-1][:, :, 0].contiguous()  # a view would keep all tokens for the backward pass
        if self.kind == "linear":
            return ln_post(frames.mean(dim=1)) if self.mean_first else ln_post(frames).mean(dim=1)
        projection = self.proj if self._trains_proj else proj
        assert projection is not None  # TailHead.set_tail
        return (ln_post(frames) @ projection.to(frames.dtype)).mean(dim=1)

    def forward(self, embedding: Float[Tensor, "B d"]) -> Float[Tensor, "B K"]:
        if self.kind == "text":
            return self.text(embedding, None if self.training else EVALUATION_SCALE)
        return self.fc_cls(self.dropout(self.norm(embedding)))

    def class_embeddings(self) -> Float[Tensor, "K d"]:
        """The rows that `forward` compares with.

        Raises:
            ValueError: they are of text, and none was given.
        """
        if self.kind != "text":
            return self.fc_cls.weight
        if not self.text.embeddings.isfinite().all():
            raise ValueError(NO_TEXT)
        return self.text.embeddings

    @property
    def _trains_proj(self) -> bool:
        return hasattr(self, "proj")


def decoder_config(config: "TailConfig") -> EVL.Config:
    """EVL's of Kinetics-400, with as many decoder layers as are asked for."""
    return EVL.Config(
        num_classes=config.num_classes,
        num_frames=config.num_frames,
        width=config.width,
        num_heads=config.num_heads,
        grid=config.grid,
        layers=tuple(range(-config.decoder_layers, 0)),
        mlp_dropout=config.dropout,
        temporal_cross_attention=False,
    )
