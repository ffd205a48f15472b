"""ReadPlan -> batches of ClipFeatures on the device, in an order and in views that are functions of (seed, epoch) alone."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.derivation import input_array, load_projection
from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.view_draw import ViewDraw
from vcache.pipelines.matching import ReadPlan, completing_command
from vcache.pipelines.precision import channel_constants, dequantised
from vcache.store.errors import ArrayNotFound
from vcache.store.reader import FeatureStore


class IncompleteSplit(RuntimeError):
    """Some videos of the split are neither stored nor recorded as failed: their extraction has not finished."""


@dataclass(frozen=True)
class Batch:
    """Features and labels of B clips, and the rows of the split and the views they came from, sorted by view."""

    features: ClipFeatures
    labels: Int[Tensor, " B"]
    rows: np.ndarray
    views: np.ndarray


class ClipLoader:
    """Reads batches of one split through a plan, each video in one view; the next batch is read while the current one is used.

    On the CPU the features are the memory read into. It is used for a later batch once no tensor looks into it.
    """

    def __init__(
        self,
        store: FeatureStore,
        split: str,
        plan: ReadPlan,
        *,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        views: Sequence[int] = (0,),
        all_views: bool = False,
        allow_incomplete: bool = False,
        buffers: BatchBuffers | None = None,
    ) -> None:
        """
        Args:
            views: what an epoch draws from, or what is to be averaged.
            all_views: take the videos that have all the views, to average them; else those that have any, to draw one.
            buffers: another loader's, to use its memory between its epochs.
        """
        self.store, self.split, self.plan, self.views = store, split, plan, tuple(views)
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self._on_gpu = device.type == "cuda"
        self.buffers = buffers or BatchBuffers(batch_size, pinned=self._on_gpu)
        # (views, rows of the split)
        self._readable = np.stack([readable_rows(store, split, plan, view) for view in views])
        self._failed = np.stack([failed_rows(store, split, view) for view in views])
        if not allow_incomplete:
            self._refuse_unfinished()
        self.rows = np.flatnonzero(self._readable.all(axis=0) if all_views else self._readable.any(axis=0))
        self.labels = torch.from_numpy(store.videos(split).labels)
        derived = plan.maps.values() if plan.maps_from == "derive" else ()
        self._constants = channel_constants(store, plan.quantised_arrays, device)
        self._projections = {layer: load_projection(store, layer, device) for layer in derived}

    def __len__(self) -> int:
        """Batches in an epoch; the last may be smaller, and no row is dropped."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def views_with_videos(self) -> tuple[int, ...]:
        """Those of the views that a video can be read in: all, but where an incomplete split is allowed."""
        return tuple(self.views[i] for i in np.flatnonzero(self._readable.any(axis=1)))

    @property
    def num_failed(self) -> int:
        """Videos that were left out because their extraction failed."""
        return int(np.delete(self._failed.any(axis=0), self.rows).sum())

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one shuffled epoch, each video in one of its views; the same for the same (seed, number).

        A batch holds the same rows whatever their views are, in the order of their views.
        """
        order = np.random.default_rng([self.seed, number]).permutation(self.rows)
        return self._batches(order, self._draw.epoch(number)[order])

    def in_order(self, view: int | None = None) -> Iterator[Batch]:
        """Every row once, in the order of the split, in that view (default: the first)."""
        return self._batches(self.rows, np.full(len(self.rows), self.views[0] if view is None else view))

    @cached_property
    def _draw(self) -> ViewDraw:
        return ViewDraw(self.store.videos(self.split).ids, self.views, self._readable, seed=self.seed)

    def _batches(self, order: np.ndarray, views: np.ndarray) -> Iterator[Batch]:
        """`views` are those of the rows in `order`."""
        slices = [slice(i, i + self.batch_size) for i in range(0, len(order), self.batch_size)]
        parts = [_by_view(order[part], views[part]) for part in slices]
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            ahead = reader.submit(self._read, *parts[0]) if parts else None
            for i, (rows, views) in enumerate(parts):
                assert ahead is not None
                arrays = ahead.result()
                ahead = reader.submit(self._read, *parts[i + 1]) if i + 1 < len(parts) else None
                batch = Batch(self._features(arrays), self.labels[rows].to(self.device), rows, views)
                copied = torch.cuda.current_stream(self.device).record_event() if self._on_gpu else None
                try:
                    yield batch
                finally:
                    if copied is not None:
                        copied.synchronize()  # until then the device may be reading from the memory of `arrays`
                del arrays, batch

    def _read(self, rows: np.ndarray, views: np.ndarray) -> dict[str, Tensor]:
        """Rows sorted by their views: those of one view are one read, into neighbouring rows of the memory."""
        specs = self.store.arrays(self.split, self.views[0])
        arrays = self.buffers.take({name: specs[name] for name in self.plan.arrays}, len(rows))
        starts = np.flatnonzero(np.diff(views, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            out = {name: array.numpy()[start:stop] for name, array in arrays.items()}
            self.store.read_many(self.split, arrays, rows[start:stop], view=int(views[start]), out=out)
        return arrays

    def _features(self, arrays: dict[str, Tensor]) -> ClipFeatures:
        on_device = {name: array.to(self.device, non_blocking=True) for name, array in arrays.items()}
        tokens = {layer: self.dequantised(on_device, f"tokens/{layer}") for layer in {*self.plan.tokens.values()}}
        maps = {layer: self._maps(on_device, tokens, layer) for layer in {*self.plan.maps.values()}}
        return ClipFeatures(
            tokens={asked: tokens[layer] for asked, layer in self.plan.tokens.items()},
            cls={asked: self.dequantised(on_device, f"cls/{layer}") for asked, layer in self.plan.cls.items()},
            maps={asked: maps[layer] for asked, layer in self.plan.maps.items()},
            embed=self.dequantised(on_device, "embed") if self.plan.embed else None,
        )

    def dequantised(self, arrays: Mapping[str, Tensor], name: str) -> Tensor:
        """The features of that name from what was read, whatever the store keeps of them; see precision.py."""
        return dequantised(arrays, name, self._constants)

    def _maps(self, arrays: Mapping[str, Tensor], tokens: Mapping[int, Tensor], layer: int) -> Tensor:
        """Layer by layer, so that of int8 the queries and keys of one layer at a time are in memory as float32."""
        if self.plan.maps_from == "maps":
            return self.dequantised(arrays, f"maps/{layer}")
        if self.plan.maps_from == "derive":
            entering = tokens.get(layer - 1)
            return self._projections[layer].maps(
                self.dequantised(arrays, input_array(layer)) if entering is None else entering
            )
        return cross_frame_maps(*(self.dequantised(arrays, f"{kind}/{layer}") for kind in ("q", "k")))

    def _refuse_unfinished(self) -> None:
        """Failed videos are left out; unfinished ones are an error."""
        unfinished = ~self._readable & ~self._failed
        num_videos = int(unfinished.any(axis=0).sum())
        if num_videos:
            behind = [self.views[i] for i in np.flatnonzero(unfinished.any(axis=1))]
            names = f" in view{'s' * (len(behind) > 1)} {', '.join(map(str, behind))}" if len(self.views) > 1 else ""
            raise IncompleteSplit(
                f"{num_videos} of {unfinished.shape[1]} videos of split {self.split!r} in {self.store.path.name} are not "
                f"extracted yet{names}. Finish with:  {completing_command(self.store, self.plan, behind)}\n"
                "or use what is there with --allow-incomplete."
            )


def readable_rows(store: FeatureStore, split: str, plan: ReadPlan, view: int) -> np.ndarray:
    """bool (rows of the split,): which have every array of the plan in that view."""
    try:
        return store.committed_rows(split, plan.arrays, view)
    except ArrayNotFound:  # the view has not been begun
        return np.zeros(store.splits[split], dtype=np.bool_)


def failed_rows(store: FeatureStore, split: str, view: int) -> np.ndarray:
    """bool (rows of the split,): which have a recorded failure in that view."""
    failed = np.zeros(store.splits[split], dtype=np.bool_)
    failed[[failure.row for failure in store.failures(split, view)]] = True
    return failed


def _by_view(rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the order of the views; rows of one view stay in their order."""
    order = np.argsort(views, kind="stable")
    return rows[order], views[order]
