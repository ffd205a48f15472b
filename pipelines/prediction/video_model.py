"""A trained head behind the decoder, the sampling, the preprocessing and the backbone of the features it was trained on.

model = open_video_model(Path("runs/evl-1"))
(view,) = model.views()
clip = model.extractor.prepare(video, view)
scores = model.scores([clip])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vcache.extract.views import EvaluationView, PreparedClip
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.evaluation.predicting import evaluating
from vcache.pipelines.loading.batch import BatchFeatures, StoreWeights
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.stored_views import ONE_VIEW, ViewGrid
from vcache.store.layout import ArraySpec
from vcache.store.object_path import StorePath


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoModel:
    """Clips to scores of K classes: the features are those that a store would hold, to the bit and in its precision."""

    source: Path
    """The run, or the folder that `vcache export` wrote."""
    name: str
    """Of the head in the registry."""
    head: Any
    """In eval mode, on the device of the backbone, and told its classes where it is given text."""
    extractor: ClipExtractor
    """Its `decode` may be that of the calling thread; `constants` are those of int8."""
    plan: ReadPlan
    """Which arrays answer what the head reads."""
    arrays: tuple[ArraySpec, ...]
    """Those of the plan, whole clips in the dtypes of the store."""
    weights: StoreWeights
    """On the device: what features are made with besides the arrays."""
    class_names: tuple[str, ...]
    multi_label: bool
    """Whether a video may have several classes."""
    outputs: tuple[int, ...] | None = None
    """Where the classes are among the outputs of the head; None: there, in this order."""
    store: StorePath | None = None
    """Of a run: the store that it was trained on, or that was named."""
    store_key: str = ""
    usual_frames: int | None = None
    """How much of a video the clips of the store are of, in frames; None: unknown."""
    notes: tuple[str, ...] = ()
    """What a reader of the predictions should know, a sentence each."""

    @property
    def device(self) -> torch.device:
        return self.extractor.backbone.device

    def views(self, grid: ViewGrid = ONE_VIEW) -> tuple[EvaluationView, ...]:
        """The T*S evaluation views of a grid, with the pixels that the head reads."""
        (temporal, spatial), pixels = grid, self._pixels_per_frame
        return tuple(
            EvaluationView(temporal=(t, temporal), spatial=(s, spatial), pixels_per_frame=pixels)
            for t in range(temporal)
            for s in range(spatial)
        )

    def features(self, clips: Sequence[PreparedClip]) -> ClipFeatures:
        """What the head reads of these clips, on the device, as the loader makes it of what a store keeps.

        The batch of the backbone is filled up, as in extraction, so that the bits of a clip do not depend on the others.
        """
        slots = [*clips, *[None] * (self.extractor.batch_size - len(clips))]
        encoded = self.extractor.start(slots, self.arrays)
        encoded.wait()
        arrays = {name: array[: len(clips)] for name, array in encoded.arrays.items()}
        of_clips = (spec.name for spec in self.arrays if spec.name not in arrays)  # pixels, which no backbone computes
        arrays |= {name: torch.stack([torch.from_numpy(clip.record[name]) for clip in clips]) for name in of_clips}
        on_device = {name: array.to(self.device) for name, array in arrays.items()}
        return BatchFeatures(on_device, dict.fromkeys(on_device, 1), self.weights, [self.plan]).of(self.plan)

    def scores(self, clips: Sequence[PreparedClip]) -> Float[Tensor, "B K"]:
        """Logits of one batch, float32 on the CPU."""
        return self._of_classes(self._forward(self.head, clips))

    def embeddings(self, clips: Sequence[PreparedClip]) -> Float[Tensor, "B E"]:
        """What the classifier of the head gets of each clip of one batch; heads that say it alone (averaging.has_embedding)."""
        return self._forward(self.head.embed, clips)

    def classified(self, embeddings: Float[Tensor, "M E"]) -> Float[Tensor, "M K"]:
        """Logits of embeddings, of several views of a video their mean."""
        with evaluating(self.head):
            return self._of_classes(self.head.classify_embedding(embeddings.float().to(self.device)).float().cpu())

    def probabilities(self, scores: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Softmax, or where a video may have several classes the sigmoid of each."""
        return scores.sigmoid() if self.multi_label else scores.softmax(dim=1)

    def _forward(self, forward: Callable[[ClipFeatures], Tensor], clips: Sequence[PreparedClip]) -> Tensor:
        with evaluating(self.head):
            return forward(self.features(clips)).float().cpu()

    def _of_classes(self, outputs: Float[Tensor, "B _"]) -> Float[Tensor, "B K"]:
        return outputs if self.outputs is None else outputs[:, list(self.outputs)]

    @property
    def _pixels_per_frame(self) -> int:
        kept = next((spec.shape[0] for spec in self.arrays if spec.name == "pixels"), 0)
        return kept // self.extractor.sampling.num_frames


def open_video_model(
    path: Path, *, store: StorePath | None = None, which: str = "last", device: str = "auto"
) -> VideoModel:
    """The model of a run folder, by the manifest of its store, or of a folder that `vcache export` wrote, by itself alone.

    Args:
        store: where the run's store lies now, if it was moved; of an imported run, which has none, the one to go by.
        which: "last" or "best" weights.

    Raises:
        RunError, StoreKeyMismatch, HeadStoreMismatch: as for an evaluation.
        CannotRecompute: the backbone of the store is not there, or gives other features now.
        ExportedFolderError: a file of an exported folder is not as it was written, or it has no such weights.
    """
    from vcache.pipelines.prediction.exported_folder import is_exported, open_exported
    from vcache.pipelines.prediction.run_model import open_run_model  # both make a VideoModel

    if is_exported(path):
        return open_exported(path, device, store=store, which=which)
    return open_run_model(path, store=store, which=which, device=device)
