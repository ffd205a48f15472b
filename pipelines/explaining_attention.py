"""What the query of a head attends to in a clip, beside CLIP's own CLS. Maps are means over the attention heads.

Lin et al. 2022 (EVL), appendix D, figures 4 and 6.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vcache.heads.cross_frame import NEXT, PREV, cross_frame_maps
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.explained_clip import ExplainedClip, array_names, chosen_layers, read_arrays
from vcache.pipelines.explanation import Attention, CrossFrame, ExplainError, LayerAttention, Question


def attention_arrays(requirements: HeadRequirements, num_layers: int) -> list[str]:
    """What the head reads, and queries and keys of every layer whose tokens it reads."""
    names = [name for kind in "qk" for name in array_names(kind, requirements.tokens, num_layers)]
    return [*read_arrays(requirements, num_layers), *names]


def explain_attention(shown: ExplainedClip) -> Attention:
    """
    Raises:
        ExplainError: the head attends to pooled tokens, or there is no such layer, frame or patch.
    """
    layers = chosen_layers(_attention(shown), shown.question.layer, shown.facts.num_layers)
    return Attention(
        layers=layers, cross_frame=_cross_frame(layers[-1], shown.question, shown.tiling.grid, shown.computed)
    )


def cls_attention(q: Float[Tensor, "T H N d"], k: Float[Tensor, "T H N d"]) -> Float[Tensor, "T N"]:
    """What CLS gives each token of its own frame in a block of CLIP: softmax(q_0 k / sqrt(d)), averaged over the heads."""
    query = q[:, :, :1].float() * q.shape[-1] ** -0.5
    return (query @ k.float().mT).softmax(dim=-1).mean(dim=1)[:, 0]


@torch.inference_mode()
def _attention(shown: ExplainedClip) -> list[LayerAttention]:
    """Of every decoder layer, the head's query and CLIP's CLS over the layer of the backbone that it reads."""
    found, size = [], (len(shown.clip.images), shown.facts.num_tokens)
    for number, (asked, weights) in enumerate(shown.head.attention(shown.features), start=1):
        if weights.shape[-2:] != size:
            raise ExplainError(
                f"the head of {shown.run} attends to pooled tokens, {tuple(weights.shape[-2:])} of {size} (frames, tokens of "
                "each), so there is no map over the patches to show. Choose a run that was trained without pooling."
            )
        layer = shown.absolute(asked)
        cls = cls_attention(shown.computed[f"q/{layer}"], shown.computed[f"k/{layer}"])
        query = weights[0].float().mean(dim=0)
        found.append(LayerAttention(number=number, layer=layer, query=query.cpu().numpy(), cls=cls.cpu().numpy()))
    return found


def _cross_frame(
    shown: LayerAttention, question: Question, grid: tuple[int, int], computed: Mapping[str, Tensor]
) -> CrossFrame | None:
    """The maps of the asked patch, or of the most attended one, in the layer that is shown (the last of several)."""
    num_frames = len(shown.query)
    frame, row, column = _chosen_patch(shown, question, grid)
    if num_frames == 1:
        return None
    q, k = (computed[f"{kind}/{shown.layer}"].unsqueeze(0) for kind in "qk")
    maps = cross_frame_maps(q, k)[0]  # (T-1, 2, P, P)
    query = row * grid[1] + column

    def over(pair: int, side: int) -> np.ndarray | None:
        return maps[pair, side, query].view(grid).cpu().numpy() if 0 <= pair < len(maps) else None

    return CrossFrame(
        layer=shown.layer,
        frame=frame,
        patch=(row, column),
        previous=over(frame - 1, PREV),
        next=over(frame, NEXT),
    )


def _chosen_patch(shown: LayerAttention, question: Question, grid: tuple[int, int]) -> tuple[int, int, int]:
    """Frame, row and column: each as asked, else where the query's weight is largest among what is left."""
    weights = shown.query[:, 1:].reshape(-1, *grid)
    _check_place(question, weights.shape)
    allowed = np.zeros(weights.shape, dtype=np.bool_)
    place = (question.frame, *(question.patch or (None, None)))
    allowed[tuple(slice(None) if i is None else i for i in place)] = True
    frame, row, column = np.unravel_index(np.where(allowed, weights, -1.0).argmax(), weights.shape)
    return int(frame), int(row), int(column)


def _check_place(question: Question, shape: tuple[int, ...]) -> None:
    num_frames, rows, columns = shape
    if question.frame is not None and not 0 <= question.frame < num_frames:
        raise ExplainError(f"--frame {question.frame}: the clip has the frames 0 to {num_frames - 1}.")
    if question.patch and not (0 <= question.patch[0] < rows and 0 <= question.patch[1] < columns):
        asked = ",".join(map(str, question.patch))
        raise ExplainError(f"--patch {asked}: a frame has the rows 0 to {rows - 1} and columns 0 to {columns - 1}.")
