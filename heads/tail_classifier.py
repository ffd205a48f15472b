"""Classifiers on what leaves the last block of a tail."""

from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.tail import FrozenTail
from vcache.heads.text import EVALUATION_SCALE, ClassText, TextClassifier

if TYPE_CHECKING:
    from vcache.heads.tail_head import TailConfig

ClassifierName = Literal["linear", "text"]


class TailClassifier(nn.Module):
    """Of the CLS token of each frame after ln_post: their mean, classified; with "text" projected before.

    AIM's head (I3DHead of mmaction, as configured at b3580d2): mean, dropout, linear layer drawn from N(0, 0.01).
    """

    def __init__(self, config: "TailConfig", dropout: float) -> None:
        super().__init__()
        self.kind, self.dropout = config.classifier, nn.Dropout(dropout)
        if config.classifier == "text":
            self.text = TextClassifier(config.num_classes, config.embed_dim, train_scale=True)
        else:
            self.fc_cls = nn.Linear(config.width, config.num_classes)
            nn.init.normal_(self.fc_cls.weight, std=0.01)
            nn.init.zeros_(self.fc_cls.bias)

    def begin_with(self, tail: FrozenTail) -> None:
        """Take over what is trained from the backbone's weights: nothing so far."""

    def set_text(self, text: ClassText) -> None:
        self.text.set(text)

    def pool(
        self, x: Float[Tensor, "B T N D"], ln_post: nn.LayerNorm, proj: Float[Tensor, "D E"] | None
    ) -> Float[Tensor, "B d"]:
        frames = ln_post(x[:, :, 0])
        if self.kind == "text":
            assert proj is not None  # TailHead.set_tail
            frames = frames @ proj.to(frames.dtype)
        return frames.mean(dim=1)

    def forward(self, embedding: Float[Tensor, "B d"]) -> Float[Tensor, "B K"]:
        if self.kind == "text":
            return self.text(embedding, None if self.training else EVALUATION_SCALE)
        return self.fc_cls(self.dropout(embedding))
