"""What every head on a tail has in common: what it reads, the tail that it is given, and the pass through its blocks.

A head of its own is a file with a Config, a recipe and what it puts between the parts of a block:

    class Mine(TailHead):
        def adapt_block(self, layer, block, x, wanted):   x (B, T, N, D) of what enters block `layer` -> what leaves it

Of the last block the classifiers but "evl" read CLS alone (`wanted`), which spares queries, MLP and adapters of its patches.
"""

from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vcache.heads.requirements import ClipFeatures, HeadRequirements
from vcache.heads.tail import FrozenTail
from vcache.heads.tail_block import BlockShape, TowerBlock
from vcache.heads.tail_classifier import ClassifierName, TailClassifier
from vcache.heads.text import ClassText

FrozenDtype = Literal["auto", "float32", "float16", "bfloat16"]

TOWER_RATES = (("blocks.*", 0.1), ("ln_post.*", 0.1), ("classifier.proj", 0.1), ("*logit_scale", 0.1))
"""Recipe.lr_multipliers: what begins with CLIP's weights at a tenth of the rate, as Text4Vis and ActionCLIP train the tower."""


@dataclass(frozen=True, kw_only=True)
class TailConfig:
    """Fields that all heads on a tail have."""

    num_classes: int
    num_frames: int = 8
    """Frames of a clip; another number is another store."""
    width: int = 768
    num_heads: int = 12
    """The backbone's unless set: of the decoder with the classifier "evl". The blocks keep theirs."""
    num_layers: int = 12
    embed_dim: int = 512
    grid: tuple[int, int] = (14, 14)
    """Patches of a frame: rows, columns."""
    blocks: int | None = None
    """Top blocks of the backbone that are run in training, on the tokens that enter the lowest of them; the others are in the
    cache. None: the upper half, which is "Top 6" of AIM's Table 7."""
    classifier: ClassifierName = "linear"
    """On what leaves the last block: a linear layer on the mean CLS; "evl", EVL's decoder on all tokens, with its convolution and
    positions over time; or "text", text embeddings of the class names, which tells classes apart that were not trained on."""
    decoder_layers: int = 1
    """With the classifier "evl": layers of its decoder, which read what leaves the last so many blocks, the lowest first."""
    dropout: float = 0.5
    """Before the linear layer of the classifiers "linear" and "evl", and in the MLP of the latter's decoder."""
    templates: str = "label"
    """With the classifier "text": the set of templates whose text embeddings classify (`vcache text`)."""
    train_blocks: bool = False
    """Train the blocks that are run, in float32 copies that begin with the backbone's weights as `frozen_dtype` has them; with
    the classifier "text" its projection too. The recipes give them a tenth of the rate. The frozen ones are kept beside."""
    frozen_dtype: FrozenDtype = "auto"
    """In which the frozen weights are kept. "auto": in that in which the backbone ran when the store was made."""
    checkpointing: bool = False
    """Keep only what enters each block for the backward pass, and run the block again there: less memory, and half as much time
    again."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        for name in ("num_classes", "num_frames", "width", "num_heads", "num_layers", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide the width ({self.width})")
        if not 1 <= self.num_blocks <= self.num_layers:
            raise ValueError(
                f"blocks ({self.blocks}) must be between 1 and {self.num_layers}, the blocks of the backbone"
            )
        if not 1 <= self.decoder_layers <= self.num_blocks:
            raise ValueError(
                f"decoder_layers ({self.decoder_layers}) must be between 1 and {self.num_blocks}, the blocks that are run"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be in [0, 1)")
        for name, kind in (("classifier", ClassifierName), ("frozen_dtype", FrozenDtype)):
            if getattr(self, name) not in (choices := get_args(kind)):
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(map(repr, choices))}")

    @property
    def num_blocks(self) -> int:
        return max(1, self.num_layers // 2) if self.blocks is None else self.blocks

    @property
    def layers_run(self) -> range:
        """The blocks that are run, absolute, the lowest first."""
        return range(self.num_layers - self.num_blocks, self.num_layers)


class TailHead(nn.Module):
    """Top blocks of the backbone with something of its own in them, and a classifier."""

    config: Any
    trains_ln_post: ClassVar[bool] = True
    """Whether ln_post is trained, which begins with the backbone's weights. With the classifier "evl" nothing reads it."""
    mean_first: ClassVar[bool] = False
    """With the classifier "linear": ln_post of the mean CLS of the frames, not the mean of ln_post of each."""
    classifier_std: ClassVar[float] = 0.01
    """Of the weights that the classifier "linear" begins with."""

    def __init__(self, config: TailConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = TailClassifier(config, mean_first=self.mean_first, std=self.classifier_std)
        self.ln_post = nn.LayerNorm(config.width).requires_grad_(self.trains_ln_post and self.classifier.reads_norm)
        if config.train_blocks:
            # Of the right sizes at most: set_tail puts copies of the backbone's own in their places.
            shape = BlockShape(width=config.width, num_heads=config.num_heads, mlp_dim=4 * config.width)
            self.blocks = nn.ModuleDict({str(layer): TowerBlock(shape) for layer in config.layers_run})
        self._given: tuple[FrozenTail, ...] = ()

    @staticmethod
    def requires(config: Any) -> HeadRequirements:
        whole = config.num_blocks == config.num_layers
        return HeadRequirements(
            tokens=() if whole else (-config.num_blocks - 1,),
            stem=whole,
            tail=config.num_blocks,
            text=config.templates if config.classifier == "text" else None,
            num_frames=config.num_frames,
        )

    @property
    def tail(self) -> FrozenTail:
        """On the device of the head; of a head without numbers, on torch's meta device, where it was, as others run it too.

        Raises:
            ValueError: none was given.
        """
        if not self._given:
            raise ValueError(
                "the head runs top blocks of the backbone and was given none; call its set_tail(...) first"
            )
        tail, device = self._given[0], self.ln_post.weight.device
        return tail if tail.ln_post.weight.device == device or device.type == "meta" else tail.to(device)

    def set_tail(self, tail: FrozenTail) -> None:
        """Run these blocks from now on. What is trained of them begins with the backbone's weights.

        Raises:
            ValueError: it is of another backbone than the configuration says, or makes no embeddings as text has them.
        """
        config, shape = self.config, tail.shape
        if not shape.block.class_token and config.classifier == "text":
            raise ValueError(
                "the backbone has no class token that is projected into the space of texts; choose another classifier than 'text'"
            )
        if shape.embed_dim is None and config.classifier == "text":
            raise ValueError("the classifier 'text' needs the backbone's proj, and the tail has none")
        there = (shape.num_layers, shape.block.width, shape.embed_dim or config.embed_dim)
        if there != (config.num_layers, config.width, config.embed_dim):
            raise ValueError(
                f"the tail is of a backbone with {there[0]} blocks of width {there[1]} and embeddings of {there[2]}; the head is "
                f"for {config.num_layers}, {config.width} and {config.embed_dim}"
            )
        frozen = tail.top(config.num_blocks)
        self._given = (tail,)
        self.ln_post.eps = tail.ln_post.eps
        self.ln_post.load_state_dict(tail.ln_post.state_dict())
        self.classifier.begin_with(tail)
        if config.train_blocks:
            copies = [deepcopy(block).to(self.ln_post.weight).requires_grad_() for block in frozen]
            self.blocks = nn.ModuleDict(dict(zip(map(str, config.layers_run), copies, strict=True)))

    def set_text(self, text: ClassText) -> None:
        """Classify by the embeddings of these class names, with the classifier "text"."""
        self.classifier.set_text(text)

    def forward(self, features: ClipFeatures) -> Float[Tensor, "B K"]:
        return self.classify_embedding(self.embed(features))

    def embed(self, features: ClipFeatures) -> Float[Tensor, "B d"]:
        """What the classifier compares with its classes."""
        wanted = 1 if self.config.classifier != "evl" and self.tail.shape.block.class_token else None
        outputs = deque(self.block_outputs(features, wanted), maxlen=self.classifier.num_layers)
        pooled = self.classifier.pool(tuple(outputs), self.ln_post, self.tail.proj)
        return self.tail.shifted(pooled) if self.config.classifier == "text" else pooled

    def classify_embedding(self, embedding: Float[Tensor, "B d"]) -> Float[Tensor, "B K"]:
        return self.classifier(embedding)

    def class_embeddings(self) -> Float[Tensor, "K d"]:
        """The rows that the classifier compares an embedding with.

        Raises:
            ValueError: they are of text, and none was given.
        """
        return self.classifier.class_embeddings()

    @property
    def view_average(self) -> str:
        """As Text4Vis where text classifies, else as AIM."""
        return "embeddings" if self.config.classifier == "text" else "softmax"

    def run_tail(self, features: ClipFeatures) -> Float[Tensor, "B T N D"]:
        """What leaves the last block."""
        return deque(self.block_outputs(features), maxlen=1)[0]

    def block_outputs(self, features: ClipFeatures, wanted: int | None = None) -> Iterator[Float[Tensor, "B T M D"]]:
        """What leaves each block that is run, the lowest first, as it is made; of the last the first `wanted` tokens at least."""
        x, layers = self.enter(self.read(features)), self.config.layers_run
        for layer, block in zip(layers, self.tower_blocks(), strict=True):
            of_block = wanted if layer == layers[-1] else None
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.adapt_block, layer, block, x, of_block, use_reentrant=False)
            else:
                x = self.adapt_block(layer, block, x, of_block)
            yield x

    def read(self, features: ClipFeatures) -> Float[Tensor, "B T N D"]:
        """The cached tokens that enter the lowest block.

        Raises:
            ValueError: they have other frames, tokens or width than the configuration says.
        """
        config, (h, w) = self.config, self.config.grid
        x = features.stem if config.num_blocks == config.num_layers else features.tokens[-config.num_blocks - 1]
        expected = (config.num_frames, 1 + h * w, config.width)
        if x is None or x.shape[1:] != expected:
            got = None if x is None else tuple(x.shape[1:])
            raise ValueError(f"tokens must be {expected} per clip (frames, 1 + {h}x{w} patches, width), got {got}")
        return x.to(self.ln_post.weight.dtype)

    def enter(self, x: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
        """What is done to the tokens before the lowest block: nothing, unless a head says so."""
        return x

    def tower_blocks(self) -> list[TowerBlock]:
        """The blocks that are run: the frozen ones, unless the head trains its own copies."""
        if self.config.train_blocks:
            trained: list[Any] = list(self.blocks.values())
            return trained
        return list(self.tail.top(self.config.num_blocks))

    def adapt_block(
        self, layer: int, block: TowerBlock, x: Float[Tensor, "B T N D"], wanted: int | None
    ) -> Float[Tensor, "B T M D"]:
        """Block `layer` with what the head has in it; where only the first `wanted` tokens are, the others may be left out."""
        return block(x, wanted)
