"""The model of a run folder: everything comes from the run and from the manifest of its store, of which no feature is read."""

from pathlib import Path

import numpy as np

from vcache.extract.sampling import Sampling, StridedSampling
from vcache.heads.registry import get_head
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.deep import version_notes
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.class_choice import choose_classes
from vcache.pipelines.evaluation.evaluate import VALIDATION_SPLITS, open_run_store
from vcache.pipelines.imported_runs import notes_on_store
from vcache.pipelines.loading.batch import StoreWeights
from vcache.pipelines.matching import HeadStoreMismatch, match
from vcache.pipelines.prediction.video_model import VideoModel
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.reextraction import Reextraction
from vcache.pipelines.runs import Run
from vcache.pipelines.targets import is_multi_label
from vcache.store.errors import StoreError
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


def open_run_model(
    path: Path, *, store: StorePath | None = None, which: str = "last", device: str = "auto"
) -> VideoModel:
    """As `open_video_model`, which has the arguments and the errors, of a run alone."""
    run, on = Run.open(path), select_device(device)
    head = run.load_head(which).to(on)
    requirements = get_head(run.head).requires(head.config)
    with open_run_store(run, store) as opened:
        split, plan = _plan(run, requirements, opened)
        # Videos are named by absolute paths, so the videos of the store need not be there.
        origin = Reextraction(opened, root=Path("/"), device=device, same_key=False)
        notes = (*notes_on_store(run, opened), *version_notes(opened, origin))
        extractor, weights = origin.extractor, StoreWeights.load(opened, [plan], on)
        extractor.constants = weights.constants
        asked = choose_classes(run, opened)
        asked.give(head, opened)
        declared = opened.arrays(split)
        return VideoModel(
            source=path,
            name=run.head,
            head=head,
            extractor=extractor,
            plan=plan,
            arrays=tuple(declared[name] for name in plan.arrays),
            weights=weights,
            class_names=asked.names,
            multi_label=is_multi_label(opened.manifest),
            outputs=asked.outputs,
            store=opened.path,
            store_key=opened.manifest.key,
            usual_frames=_usual_frames(opened, split, extractor.sampling),
            notes=notes,
        )


_LOOKED_AT = 64
"""Videos of a store whose length is looked at."""


def _plan(run: Run, requirements: HeadRequirements, store: FeatureStore) -> tuple[str, ReadPlan]:
    """How the head reads the store, by the first split that has what it reads: that of an evaluation, if it does."""
    order = [*VALIDATION_SPLITS, *store.splits]
    splits = sorted(store.splits, key=order.index)
    refused: HeadStoreMismatch | None = None
    for split in splits:
        try:
            return split, match(run.head, requirements, store, [split], frame_step=run.config.get("frame_step", 1))
        except HeadStoreMismatch as error:
            refused = refused or error
    assert refused is not None, "a store has a split"
    raise refused


def _usual_frames(store: FeatureStore, split: str, sampling: Sampling) -> int | None:
    """The window of a strided clip; else the length of the longest among some videos of the store, by the frames that were
    taken of it, or None where these are not there any more."""
    if isinstance(sampling, StridedSampling):
        return sampling.num_frames * sampling.stride_frames
    try:
        rows = np.flatnonzero(store.committed_rows(split, ["frame_index"]))
        rows = rows[:: max(1, len(rows) // _LOOKED_AT)]
        index = store.read(split, "frame_index", rows.tolist()) if len(rows) else np.zeros((0, 2))
    except StoreError:
        return None
    if sampling.num_frames == 1 or not len(index):
        return None
    between = (index[:, -1] - index[:, 0]).max() / (sampling.num_frames - 1)
    return round(float(between) * sampling.num_frames) or None
