"""`vcache explain`: what the query of a trained head attends to in one video, beside CLIP's own attention.

The clip of view 0 is decoded and goes through the store's backbone once more, so that every kind of store will do: tokens,
queries and keys are made again, and the head reads them as it reads the store's. Maps are means over the attention heads.
Lin et al. 2022 (EVL), appendix D, figures 4 and 6.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vcache.extract.backbone import BackboneFacts
from vcache.extract.layers import absolute_layer
from vcache.extract.video import VideoError
from vcache.extract.views import PreparedClip
from vcache.heads.cross_frame import NEXT, PREV, cross_frame_maps
from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import ClipFeatures, HeadRequirements
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.deep import MAY_DIFFER
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.evaluate import open_run_store
from vcache.pipelines.explanation import CrossFrame, ExplainError, Explanation, LayerAttention, Question
from vcache.pipelines.finding import Target, find_video
from vcache.pipelines.imported_runs import notes_on_store
from vcache.pipelines.matching import match
from vcache.pipelines.pictures import Tiling
from vcache.pipelines.precision import channel_constants, encoded
from vcache.pipelines.reextraction import Reextraction
from vcache.pipelines.runs import Run
from vcache.store.compare import compare
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore

_TOP = 3
"""Predictions that are told."""


def explain(
    path: Path,
    question: Question,
    *,
    store: StorePath | None = None,
    root: Path | None = None,
    device: str = "auto",
) -> Explanation:
    """Look at one video with the head of a finished run.

    Args:
        store: where the run's store lies now, if it was moved.
        root: where the videos of the store lie now, if they were moved.

    Raises:
        ExplainError: the head cannot be looked into, the video cannot be read, or there is no such layer, frame or patch.
        UnknownVideo: neither the store nor the disk has the video.
        RunError, StoreKeyMismatch, HeadStoreMismatch, CannotRecompute: as for an evaluation, and for extracting rows again.
    """
    run, on = Run.open(path), select_device(device)
    _check_explainable(run)
    head: Any = run.load_head().to(on)
    requirements = get_head(run.head).requires(head.config)
    with open_run_store(run, store) as opened:
        _check_frames(run, requirements, opened)
        target = find_video(opened, video=question.video, row=question.row, split=question.split, root=root)
        origin = Reextraction(opened, root=target.root, device=device, workers=1, same_key=False)
        notes = [*notes_on_store(run, opened), *_version_notes(opened, origin)]
        extractor = origin.extractor
        clip = _prepared(extractor, target)
        computed = extractor.features([clip], _arrays(requirements, extractor.backbone.facts.num_layers))
        notes += _row_notes(opened, target, computed, extractor)
        classes = opened.manifest.class_names
    facts = extractor.backbone.facts
    features = clip_features(requirements, computed, facts.num_layers)
    attention = _attention(run, head, features, computed, facts, len(clip.images))
    layers = _chosen_layers(attention, question.layer, facts.num_layers)
    tiling = Tiling(grid=facts.grid, patch=tuple(extractor.backbone.visual.patch_size))
    return Explanation(
        run=path,
        head=type(head).__name__,
        video_id=target.video.video_id,
        split=target.split,
        row=target.row,
        truth=None if target.row is None else classes[target.video.label],
        predictions=_predictions(head, features, run.class_names() if run.has_class_names else classes),
        images=clip.images.permute(0, 2, 3, 1).contiguous().numpy(),
        frame_index=tuple(clip.record["frame_index"].tolist()),
        tiling=tiling,
        layers=layers,
        cross_frame=_cross_frame(layers[-1], question, tiling.grid, computed),
        notes=tuple(notes),
    )


def clip_features(requirements: HeadRequirements, computed: Mapping[str, Tensor], num_layers: int) -> ClipFeatures:
    """What a head asks for of one clip, out of what `ClipExtractor.features` gave: the features of a batch of 1."""

    def clip(kind: str, layers: Sequence[int]) -> dict[int, Tensor]:
        return {layer: computed[f"{kind}/{absolute_layer(layer, num_layers)}"] for layer in layers}

    return ClipFeatures(
        tokens={layer: x.unsqueeze(0) for layer, x in clip("tokens", requirements.tokens).items()},
        cls={layer: x.unsqueeze(0) for layer, x in clip("cls", requirements.cls).items()},
        maps=clip("maps", requirements.maps),  # made for whole clips
        embed=computed["embed"].unsqueeze(0) if requirements.embed else None,
    )


def cls_attention(q: Float[Tensor, "T H N d"], k: Float[Tensor, "T H N d"]) -> Float[Tensor, "T N"]:
    """What CLS gives each token of its own frame in a block of CLIP: softmax(q_0 k / sqrt(d)), averaged over the heads."""
    query = q[:, :, :1].float() * q.shape[-1] ** -0.5
    return (query @ k.float().mT).softmax(dim=-1).mean(dim=1)[:, 0]


def _check_explainable(run: Run) -> None:
    heads = list_heads()
    if not hasattr(get_head(run.head), "attention"):
        can = ", ".join(name for name, head in heads.items() if hasattr(head, "attention"))
        raise ExplainError(
            f"head {run.head!r} of {run.path} has no query that attends to tokens, so there is nothing to show. "
            f"Runs of these heads can be explained: {can}."
        )


def _check_frames(run: Run, requirements: HeadRequirements, store: FeatureStore) -> None:
    """Only an imported head can have other frames than its store; matching refuses them with what to do."""
    if requirements.num_frames not in (None, store.manifest.facts["request"]["frames"]):
        match(run.head, requirements, store, list(store.splits)[:1])


def _version_notes(store: FeatureStore, origin: Reextraction) -> list[str]:
    """Other versions are told; anything else that changes features is refused."""
    notes = []
    for name, stored, now in origin.differences:
        what = f"{name} was {stored!r} when {store.path.name} was made, and is {now!r} here"
        if not name.startswith(MAY_DIFFER):
            raise ExplainError(f"{what}: the head would see other features. Put back what the store was made with.")
        notes.append(f"{what}.")
    return notes


def _prepared(extractor: ClipExtractor, target: Target) -> PreparedClip:
    """View 0 of the video, damaged as it was where the store has it like that."""
    extractor.allow_partial = target.partial
    try:
        return extractor.prepare(target.video)
    except VideoError as error:
        hint = "Say where the videos lie with --root FOLDER." if error.kind == "missing" else "Choose another video."
        where = extractor.dataset.root / target.video.path
        raise ExplainError(f"{where} cannot be shown ({error.kind}: {error.reason}). {hint}") from error


def _arrays(requirements: HeadRequirements, num_layers: int) -> list[str]:
    """What the head reads, and queries and keys of every layer whose tokens it reads."""

    def named(kind: str, layers: Sequence[int]) -> list[str]:
        return [f"{kind}/{absolute_layer(layer, num_layers)}" for layer in layers]

    tokens = requirements.tokens
    names = [*named("tokens", tokens), *named("q", tokens), *named("k", tokens), *named("maps", requirements.maps)]
    return [*names, *named("cls", requirements.cls), *(["embed"] if requirements.embed else [])]


def _row_notes(
    store: FeatureStore, target: Target, computed: Mapping[str, Tensor], extractor: ClipExtractor
) -> list[str]:
    """Whether what was computed is what the store holds of the row, to its precision."""
    if target.row is None or target.split is None:
        return []
    notes = [f"the video is damaged, and stored as far as it can be decoded: {target.damage}."] if target.damage else []
    specs = store.arrays(target.split)
    there = [name for name in computed if name in specs and store.committed_rows(target.split, [name])[target.row]]
    if not there:
        return [*notes, f"{store.path.name} holds no features of this video: what is shown was computed now."]
    int8 = [name for name in there if specs[name].dtype == "int8"]
    constants = channel_constants(store, int8, extractor.backbone.device)
    made: dict[str, Tensor] = {}
    for name in there:
        made |= encoded(name, computed[name], specs[name].dtype, constants)
    stored = store.read_many(target.split, made, [target.row])
    differ = []
    for name, array in made.items():
        found = compare(stored[name][0], array.cpu().numpy().reshape(specs[name].shape), specs[name].dtype)
        differ += [] if found.agrees else [f"{name} by {found.relative:.1e} (bound {found.tolerance:.1e})"]
    if differ:
        more = f" and {len(differ) - 2} more arrays" if len(differ) > 2 else ""
        notes.append(
            f"what was computed now is not what {store.path.name} holds of this video: {', '.join(differ[:2])}{more} differ. "
            f"See:  vcache verify {store.path} --deep"
        )
    return notes


@torch.inference_mode()
def _predictions(head: nn.Module, features: ClipFeatures, names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    top = head(features)[0].float().softmax(dim=-1).topk(min(_TOP, len(names)))
    return tuple((names[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True))


@torch.inference_mode()
def _attention(
    run: Run, head: Any, features: ClipFeatures, computed: Mapping[str, Tensor], facts: BackboneFacts, num_frames: int
) -> list[LayerAttention]:
    """Of every decoder layer, the head's query and CLIP's CLS over the layer of the backbone that it reads."""
    found, size = [], (num_frames, facts.num_tokens)
    for number, (asked, weights) in enumerate(head.attention(features), start=1):
        if weights.shape[-2:] != size:
            raise ExplainError(
                f"the head of {run.path} attends to pooled tokens, {tuple(weights.shape[-2:])} of {size} (frames, tokens of "
                "each), so there is no map over the patches to show. Choose a run that was trained without pooling."
            )
        layer = absolute_layer(asked, facts.num_layers)
        cls = cls_attention(computed[f"q/{layer}"], computed[f"k/{layer}"])
        query = weights[0].float().mean(dim=0)
        found.append(LayerAttention(number=number, layer=layer, query=query.cpu().numpy(), cls=cls.cpu().numpy()))
    return found


def _chosen_layers(
    attention: Sequence[LayerAttention], asked: int | str | None, num_layers: int
) -> tuple[LayerAttention, ...]:
    if asked is None:
        return (attention[-1],)
    if asked == "all":
        return tuple(attention)
    chosen = tuple(one for one in attention if one.layer == absolute_layer(int(asked), num_layers))
    if not chosen:
        read = ", ".join(str(layer) for layer in dict.fromkeys(one.layer for one in attention))
        raise ExplainError(f"--layer {asked}: the decoder reads the layers {read}. Choose one of them, or all.")
    return chosen


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
