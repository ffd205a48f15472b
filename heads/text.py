"""Classes by their names: a classifier of CLIP's text embeddings, which is given and not trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize


@dataclass(frozen=True)
class ClassText:
    """What the text tower of the backbone makes of the names of K classes, each in M templates."""

    embeddings: Float[Tensor, "K M E"]
    """Not normalised."""
    logit_scale: float
    """CLIP's parameter: logits are exp(logit_scale) times a cosine."""


class TextClassifier(nn.Module):
    """Logits of a video embedding v for class k: exp(logit_scale) * cos(v, u_k), with u_k the mean of its normalised templates.

    The embeddings belong to the state dict, so that a run classifies without its store. They are no parameters. Other classes
    may be given at any time, of another number too: a classifier of names has seen none of them.
    """

    embeddings: Tensor
    logit_scale: Tensor

    def __init__(self, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.full((num_classes, embed_dim), torch.nan))
        self.register_buffer("logit_scale", torch.tensor(torch.nan))
        self._is_set = False

    def set(self, text: ClassText) -> None:
        """Classify by these from now on.

        Raises:
            ValueError: they have another width than the videos' embeddings.
        """
        width = self.embeddings.shape[1]
        if text.embeddings.shape[2] != width:
            raise ValueError(f"text embeddings have {text.embeddings.shape[2]} channels, those of the videos {width}")
        means = normalize(text.embeddings.to(self.embeddings), dim=-1).mean(dim=1)
        self.embeddings = normalize(means, dim=-1)
        self.logit_scale = torch.full_like(self.logit_scale, text.logit_scale)
        self._is_set = True

    def forward(self, videos: Float[Tensor, "B E"]) -> Float[Tensor, "B K"]:
        """In float32, whatever the precision of the rest.

        Raises:
            ValueError: no text was given.
        """
        if not self._is_set:
            raise ValueError("the head classifies by text and was given none; call its set_text(ClassText(...)) first")
        with torch.autocast(videos.device.type, enabled=False):
            return self.logit_scale.exp() * normalize(videos.float(), dim=-1) @ self.embeddings.float().mT

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Of a head that was saved before it was given text, there is none."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_set = bool(self.embeddings.isfinite().all() and self.logit_scale.isfinite())
