"""`vcache explain`: what a trained head makes of one video, beside what CLIP does.

The clip of view 0 is decoded and goes through the store's backbone once more, so that every kind of store will do: tokens,
queries, keys and pixels are made again, and the head reads them as it reads the store's. What is shown follows from what the
head offers: explaining_attention.py, explaining_magnitude.py.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vcache.extract.datasets.base import Video
from vcache.extract.video import VideoError
from vcache.extract.views import EvaluationView, PreparedClip
from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import ClipFeatures, HeadRequirements
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.deep import version_notes
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.class_choice import ClassChoice, choose_classes
from vcache.pipelines.evaluation.evaluate import open_run_store
from vcache.pipelines.explained_clip import ExplainedClip, clip_features, read_arrays
from vcache.pipelines.explaining_attention import attention_arrays, explain_attention
from vcache.pipelines.explaining_magnitude import explain_magnitudes
from vcache.pipelines.explanation import Attention, ExplainError, Explanation, Magnitudes, Question
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


@dataclass(frozen=True)
class _Way:
    """How heads of one contract are looked into."""

    arrays: Callable[[HeadRequirements, int], list[str]]
    """Names of what the backbone has to compute, for so many layers."""
    look: Callable[[ExplainedClip], Attention | Magnitudes]


_WAYS = {
    "attention": _Way(attention_arrays, explain_attention),
    "inner_features": _Way(read_arrays, explain_magnitudes),
}
"""By the method of the head (heads/registry.py), the first that it has."""


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
    with closing(explain_each(path, [question], store=store, root=root, device=device)) as found:
        return next(found)


def explain_each(
    path: Path,
    questions: Iterable[Question],
    *,
    store: StorePath | None = None,
    root: Path | None = None,
    device: str = "auto",
) -> Generator[Explanation, None, None]:
    """The same for several videos, of which head and backbone are loaded once, one after the other as they are asked for."""
    run, on = Run.open(path), select_device(device)
    way, head = _way_into(run), run.load_head().to(on)
    requirements = get_head(run.head).requires(head.config)
    with open_run_store(run, store) as opened:
        _check_frames(run, requirements, opened)
        asked = choose_classes(run, opened)
        asked.give(head, opened)
        looking = _Looking(run, head, way, requirements, opened, asked, device)
        for question in questions:
            yield looking.at(question, root)


def can_explain(run: Run) -> bool:
    """Whether the head of a run offers anything to look at."""
    return any(hasattr(get_head(run.head), name) for name in _WAYS)


@dataclass
class _Looking:
    """A head and its store. The backbone is loaded with the first video, and again where the videos lie elsewhere."""

    run: Run
    head: nn.Module
    way: _Way
    requirements: HeadRequirements
    store: FeatureStore
    asked: ClassChoice
    device: str
    origin: Reextraction | None = None

    def at(self, question: Question, root: Path | None) -> Explanation:
        run, opened = self.run, self.store
        target = find_video(opened, video=question.video, row=question.row, split=question.split, root=root)
        origin = self._origin(target.root)
        notes = [*notes_on_store(run, opened), *version_notes(opened, origin)]
        extractor = origin.extractor
        facts = extractor.backbone.facts
        clip = _prepared(extractor, target, self.requirements.pixels)
        computed = extractor.features([clip], self.way.arrays(self.requirements, facts.num_layers))
        notes += _row_notes(opened, target, computed, extractor)
        shown = ExplainedClip(
            run=run.path,
            head=self.head,
            question=question,
            clip=clip,
            computed=computed,
            features=clip_features(self.requirements, computed, facts.num_layers, clip),
            facts=facts,
            tiling=Tiling(grid=facts.grid, patch=(facts.patch_size, facts.patch_size)),
        )
        return Explanation(
            run=run.path,
            head=type(self.head).__name__,
            video_id=target.video.video_id,
            split=target.split,
            row=target.row,
            truth=None if target.row is None else _truth(target.video, opened.manifest.class_names),
            predictions=_predictions(self.head, shown.features, _names(run, self.asked)),
            images=clip.images.permute(0, 2, 3, 1).contiguous().numpy(),
            frame_index=tuple(clip.record["frame_index"].tolist()),
            tiling=shown.tiling,
            found=self.way.look(shown),
            notes=tuple(notes),
        )

    def _origin(self, root: Path) -> Reextraction:
        if self.origin is None or self.origin.root != root:
            self.origin = Reextraction(self.store, root=root, device=self.device, workers=1, same_key=False)
        return self.origin


def _names(run: Run, asked: ClassChoice) -> Sequence[str]:
    """Of the head's outputs, in their order: that of the store where it was given text, else its own."""
    return run.class_names() if asked.templates is None and run.has_class_names else asked.names


def _way_into(run: Run) -> _Way:
    """How the head is looked into: by the first of its methods that shows something."""
    for name, way in _WAYS.items():
        if hasattr(get_head(run.head), name):
            return way
    can = ", ".join(name for name, head in list_heads().items() if any(hasattr(head, method) for method in _WAYS))
    raise ExplainError(
        f"head {run.head!r} of {run.path} has no query that attends to tokens and no features of patches that it makes, so "
        f"there is nothing to show. Runs of these heads can be explained: {can}."
    )


def _check_frames(run: Run, requirements: HeadRequirements, store: FeatureStore) -> None:
    """Clips are shown as the store has them. An imported head can have other frames; matching refuses them with what to do."""
    if (step := run.config.get("frame_step", 1)) > 1:
        raise ExplainError(
            f"{run.path} was trained on every {step}. frame of the stored clips (--frame-step {step}), and a clip is shown with "
            "all of its frames. Choose a run that was trained without --frame-step."
        )
    if requirements.num_frames not in (None, store.manifest.facts["request"]["frames"]):
        match(run.head, requirements, store, list(store.splits)[:1])


def _prepared(extractor: ClipExtractor, target: Target, pixels_per_frame: int) -> PreparedClip:
    """View 0 of the video with its pixels, damaged as it was where the store has it like that."""
    extractor.allow_partial = target.partial
    try:
        return extractor.prepare(target.video, EvaluationView(pixels_per_frame=pixels_per_frame))
    except VideoError as error:
        hint = "Say where the videos lie with --root FOLDER." if error.kind == "missing" else "Choose another video."
        where = extractor.dataset.root / target.video.path
        raise ExplainError(f"{where} cannot be shown ({error.kind}: {error.reason}). {hint}") from error


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


def _truth(video: Video, names: Sequence[str]) -> str:
    """The name of its class, or of its several classes."""
    return " + ".join(names[k] for k in video.classes or (video.label,))


@torch.inference_mode()
def _predictions(head: nn.Module, features: ClipFeatures, names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    top = head(features)[0].float().softmax(dim=-1).topk(min(_TOP, len(names)))
    return tuple((names[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True))
