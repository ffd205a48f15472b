"""The baseline: a linear layer on the mean CLS token. Also the shortest example of a head."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from vcache.heads.registry import register_head
from vcache.heads.requirements import ClipFeatures, HeadRequirements, Recipe


@register_head("linear")
class LinearHead(nn.Module):
    """Mean of one layer's CLS tokens over the frames, LayerNorm, linear layer. It cannot see the order of frames."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        num_classes: int
        width: int = 768
        layer: int = -1
        """The block whose CLS token is read: before the backbone's ln_post, so the head has a norm of its own."""
        norm: bool = True

        def __post_init__(self) -> None:
            for name in ("num_classes", "width"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")

    summary = "mean of CLS over the frames + linear layer: the baseline, blind to the order of frames"
    # No paper: values of ours, with which the frozen features of a few thousand clips are fitted in minutes.
    recipe = Recipe(lr=1e-3, weight_decay=0.01, epochs=30, batch_size=64)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.width) if config.norm else nn.Identity()
        self.classify = nn.Linear(config.width, config.num_classes)

    @staticmethod
    def requires(config: Config) -> HeadRequirements:
        return HeadRequirements(cls=(config.layer,))

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        return self.classify_embedding(self.embed(features))

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B D"]:
        """The mean CLS token, before the norm."""
        return features.cls[self.config.layer].to(self.classify.weight.dtype).mean(dim=1)

    def classify_embedding(self, embedding: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        return self.classify(self.norm(embedding))

    def class_embeddings(self) -> Float[Tensor, "K D"]:
        return self.classify.weight
