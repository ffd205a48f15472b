"""CoOp: a context of learnt vectors before the name of each class, read by the frozen text tower at every step.

Zhou et al. 2022, "Learning to Prompt for Vision-Language Models", as Text4Vis uses it: Wu et al. 2023, Table 4 and eq. 7;
PromptLearner and TextEncoder, modules/coop.py at d61b34d (whwu95/Text4Vis).

    prompt_k = <start> v_1 ... v_M name_k . <end>          v drawn from N(0, 0.02), one context for all classes
    u_k = tower(prompt_k)                                  gradients pass through the tower and reach v alone
    logits = exp(logit_scale) cos(video, u_k)

The name stands last, which is the position "end". differs: eq. 7 has no full stop behind the name; the official code has, and
so has this. The tower belongs to whoever gives the prompts: it is no parameter of a head and not in its state dict.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vcache.heads.text import cosines

CONTEXT_STD = 0.02
CHUNK = 128
"""Classes of like length that pass the tower together, so that short names are not padded to the longest."""
KEPT_TOKENS = 6144
"""Tokens for which what the backward needs is kept: 2.7 GB with the tower of ViT-B, and more than the 400 names of Kinetics have.
Of more it is made again chunk by chunk, which takes half as long again."""


@dataclass(frozen=True, eq=False)
class ClassPrompts:
    """Prompts of K classes behind the token embedding of a text tower, and the rest of the tower."""

    tokens: Float[Tensor, "K L W"]
    """<start>, M places that are filled, the name, ".", <end>, padding; on the device of the tower."""
    ends: Int[Tensor, " K"]
    """Where <end> is."""
    encode: Callable[[Float[Tensor, "n l W"], Int[Tensor, " n"]], Float[Tensor, "n E"]]
    """(tokens, ends) -> embeddings, not normalised, each for itself; differentiable with respect to the tokens."""
    logit_scale: float
    """CLIP's parameter: logits are exp(logit_scale) times a cosine."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClassPrompts":
        """Itself: copies of a head share the tower."""
        return self


class PromptLearner(nn.Module):
    """M learnt vectors -> embeddings of the classes whose prompts were given.

    With gradients the tower runs at every call; without, only if the vectors have changed since the last one.
    """

    def __init__(self, context_length: int, width: int, num_classes: int | None = None) -> None:
        """`num_classes`: each has a context of its own (CSC), so that they cannot be changed for others. None: one for all."""
        super().__init__()
        lead = () if num_classes is None else (num_classes,)
        self.ctx = nn.Parameter(CONTEXT_STD * torch.randn(*lead, context_length, width))
        self._prompts: ClassPrompts | None = None
        self._chunks: list[tuple[Tensor, int]] = []
        """(classes, their length), the shortest first."""
        self._made_again = False
        self._last: tuple[Tensor, Tensor] | None = None
        """The vectors and their embeddings."""

    def set(self, prompts: ClassPrompts) -> None:
        """Embed these classes from now on.

        Raises:
            ValueError: the tower has tokens of another width, or each class has a context of its own and there are others.
        """
        width = prompts.tokens.shape[2]
        if width != self.ctx.shape[-1]:
            raise ValueError(f"the learnt vectors have {self.ctx.shape[-1]} channels, the tokens of the tower {width}")
        if self.ctx.ndim == 3 and len(self.ctx) != len(prompts.ends):
            raise ValueError(
                f"each of {len(self.ctx)} classes has a context of its own, and prompts of {len(prompts.ends)} were given"
            )
        by_length = prompts.ends.argsort(stable=True)
        self._chunks = [(rows, int(prompts.ends[rows[-1]]) + 1) for rows in by_length.split(CHUNK)]
        self._made_again = sum(len(rows) * length for rows, length in self._chunks) > KEPT_TOKENS
        self._prompts, self._last = prompts, None

    def forward(self) -> Float[Tensor, "K E"]:
        """Not normalised.

        Raises:
            ValueError: no prompts were given.
        """
        if self._prompts is None:
            raise ValueError(
                "the head learns prompts and was given none; call its set_prompts(ClassPrompts(...)) first"
            )
        if torch.is_grad_enabled():
            return self._embed(self._prompts)
        if self._last is None or not torch.equal(self._last[0], self.ctx):
            # A tensor of inference mode could not be copied with the head outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._last = self.ctx.clone(), self._embed(self._prompts)
        return self._last[1]

    def _embed(self, prompts: ClassPrompts) -> Float[Tensor, "K E"]:
        parts = [self._embed_some(prompts, rows, length) for rows, length in self._chunks]
        order = torch.cat([rows for rows, _ in self._chunks])
        return torch.cat(parts)[order.argsort()]

    def _embed_some(self, prompts: ClassPrompts, rows: Int[Tensor, " n"], length: int) -> Float[Tensor, "n E"]:
        M = self.ctx.shape[-2]
        context = self.ctx[rows] if self.ctx.ndim == 3 else self.ctx.expand(len(rows), -1, -1)
        tokens, ends = prompts.tokens[rows, :length], prompts.ends[rows]
        filled = torch.cat([tokens[:, :1], context, tokens[:, 1 + M :]], dim=1)  # (n, length, W)
        if not (self._made_again and torch.is_grad_enabled()):
            return prompts.encode(filled, ends)
        # A frozen tower draws no random numbers, so there is no state to be kept for the second pass.
        embeddings: Tensor = checkpoint(prompts.encode, filled, ends, use_reentrant=False, preserve_rng_state=False)
        return embeddings


class PromptClassifier(nn.Module):
    """Logits of a video embedding v for class k: exp(logit_scale) * cos(v, u_k), with u_k of a PromptLearner.

    A TextClassifier (text.py) in everything else.
    """

    def __init__(self, context_length: int, width: int, num_classes: int | None = None) -> None:
        """As for a PromptLearner. The logit scale is trained, from where the tower has it unless it is filled before."""
        super().__init__()
        self.prompt_learner = PromptLearner(context_length, width, num_classes)
        self.logit_scale = nn.Parameter(torch.tensor(torch.nan))

    @torch.no_grad()
    def set(self, prompts: ClassPrompts) -> None:
        """Classify by these from now on. Where there is a logit scale already, as after training, it stays."""
        self.prompt_learner.set(prompts)
        if not self.logit_scale.isfinite():
            self.logit_scale.fill_(prompts.logit_scale)

    @property
    def embeddings(self) -> Float[Tensor, "K E"]:
        """Of the classes, not normalised."""
        return self.prompt_learner()

    def forward(self, videos: Float[Tensor, "B E"], scale: float | None = None) -> Float[Tensor, "B K"]:
        """In float32; `scale` in place of exp(logit_scale)."""
        factor = self.logit_scale.exp() if scale is None else scale
        return factor * cosines(videos, self.embeddings)
