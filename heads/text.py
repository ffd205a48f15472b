"""Classes by their names: a classifier of CLIP's text embeddings, which is given and not trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

EVALUATION_SCALE = 100.0
"""exp(logit_scale) in evaluation by the official code of Text4Vis and of ActionCLIP, whatever was trained."""
OPENAI_LOGIT_SCALE = math.log(100)
NO_TEXT = "the head classifies by text and was given none; call its set_text(ClassText(...)) first"


@dataclass(frozen=True)
class ClassText:
    """What the text tower of the backbone makes of the names of K classes, each in M templates."""

    embeddings: Float[Tensor, "K M E"]
    """Not normalised."""
    logit_scale: float
    """CLIP's parameter: logits are exp(logit_scale) times a cosine."""


class TextClassifier(nn.Module):
    """Logits of a video embedding v for class k: exp(logit_scale) * cos(v, u_k), with u_k the mean of its normalised templates.

    The embeddings belong to the state dict, so that a run classifies without its store. Unless they are said to be trained, they
    are no parameters; nor is the scale. Other classes may be given at any time, of another number too: a classifier of names has
    seen none of them.
    """

    embeddings: Tensor
    logit_scale: Tensor

    def __init__(
        self, num_classes: int, embed_dim: int, *, train_embeddings: bool = False, train_scale: bool = False
    ) -> None:
        super().__init__()
        embeddings, scale = torch.full((num_classes, embed_dim), torch.nan), torch.tensor(torch.nan)
        self.embeddings = nn.Parameter(embeddings) if train_embeddings else nn.Buffer(embeddings)
        self.logit_scale = nn.Parameter(scale) if train_scale else nn.Buffer(scale)
        self._is_set = False

    def set(self, text: ClassText) -> None:
        """Classify by these from now on. Where there is a logit scale already, as after training, it stays.

        Raises:
            ValueError: they have another width than the videos' embeddings.
        """
        width = self.embeddings.shape[1]
        if text.embeddings.shape[2] != width:
            raise ValueError(f"text embeddings have {text.embeddings.shape[2]} channels, those of the videos {width}")
        self.assign(mean_of_templates(text.embeddings), text.logit_scale)

    @torch.no_grad()
    def assign(self, embeddings: Float[Tensor, "K E"], logit_scale: float) -> None:
        """Classify by these rows, wherever they come from."""
        self.embeddings.data = embeddings.to(self.embeddings)
        # Not by a question: without numbers, on torch's meta device, there is no answer.
        self.logit_scale.copy_(torch.where(self.logit_scale.isfinite(), self.logit_scale, logit_scale))
        self._is_set = True

    def forward(self, videos: Float[Tensor, "B E"], scale: float | None = None) -> Float[Tensor, "B K"]:
        """In float32, whatever the precision of the rest; `scale` in place of exp(logit_scale).

        Raises:
            ValueError: no text was given.
        """
        if not self._is_set:
            raise ValueError(NO_TEXT)
        factor = self.logit_scale.exp() if scale is None else scale
        return factor * cosines(videos, self.embeddings)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Of a head that was saved before it was given text, there is none."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_set = bool(self.embeddings.isfinite().all() and self.logit_scale.isfinite())


def mean_of_templates(embeddings: Float[Tensor, "K M E"]) -> Float[Tensor, "K E"]:
    """The mean of the normalised templates of each class, normalised: CLIP's ensemble of prompts."""
    return normalize(normalize(embeddings, dim=-1).mean(dim=1), dim=-1)


def cosines(videos: Float[Tensor, "B E"], texts: Float[Tensor, "K E"]) -> Float[Tensor, "B K"]:
    """In float32, also where autocast is on: logits of 100 times a cosine in half precision are off by a tenth."""
    with torch.autocast(videos.device.type, enabled=False):
        return normalize(videos.float(), dim=-1) @ normalize(texts.float(), dim=-1).mT
