"""ReadPlans -> batches of ClipFeatures on the device, in an order and in views that are functions of (seed, epoch) alone."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from vcache.pipelines.loading.batch import Batch, BatchFeatures, StoreWeights
from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.epoch_order import EpochOrder, OrderError, share
from vcache.pipelines.loading.read_stats import ReadStats
from vcache.pipelines.loading.readable import (
    IncompleteSplit,
    UnlikePlans,
    failed_rows,
    readable_by_all,
    readable_rows,
)
from vcache.pipelines.loading.residency import ResidencyKind
from vcache.pipelines.loading.resident import OnBytes, ResidentSource
from vcache.pipelines.loading.sources import (
    ArraySelection,
    BatchSource,
    DiskSource,
    Part,
    StoreReader,
    select_arrays,
)
from vcache.pipelines.loading.subsets import Subset
from vcache.pipelines.loading.view_draw import ViewDraw
from vcache.pipelines.loading.windows import WindowSource, shard_numbers
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.targets import among_classes, is_multi_label, targets_of
from vcache.store.reader import FeatureStore

__all__ = ["Batch", "ClipLoader", "IncompleteSplit", "UnlikePlans", "failed_rows", "readable_rows"]


class ClipLoader:
    """Reads batches of one split, each video in one view; the next batch is read while the current one is used.

    What several plans ask for is read once. With several ranks each reads its own clips of every batch. On the CPU the features
    are the memory read into. It is used for a later batch once no tensor looks into it.
    """

    def __init__(
        self,
        store: FeatureStore,
        split: str,
        plans: ReadPlan | Sequence[ReadPlan],
        *,
        batch_size: int,
        device: torch.device,
        order: EpochOrder | None = None,
        views: Sequence[int] = (0,),
        all_views: bool = False,
        allow_incomplete: bool = False,
        buffers: BatchBuffers | None = None,
        resident: ResidencyKind = "disk",
        subset: Subset | None = None,
        classes: Sequence[int] | None = None,
        any_class: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """
        Args:
            plans: each matched alone, as if its head were the only one.
            batch_size: clips of a batch over all ranks.
            order: of the epochs, and the seed of the draw of views; default: shuffled with seed 0.
            views: what an epoch draws from, or what is to be averaged.
            all_views: take the videos that have all the views, to average them; else those that have any, to draw one.
            buffers: another loader's, to use its memory between its epochs.
            resident: where the features are kept; see `keep`.
            subset: take some of the videos only, chosen among those that can be read.
            classes: take videos of these classes of the store only, and number the targets in their order; see targets.py.
            any_class: of videos with several classes, take those that have any of `classes`; else those that have no other.
            rank: which of the `num_ranks` processes this is.

        Raises:
            IncompleteSplit, UnlikePlans: see readable.py.
            OrderError: classes are to be balanced, and videos have several.
        """
        self.plans = (plans,) if isinstance(plans, ReadPlan) else tuple(plans)
        self.store, self.split, self.views = store, split, tuple(views)
        self.batch_size, self.device, self.order = batch_size, device, order or EpochOrder()
        self.rank, self.num_ranks = rank, num_ranks
        self.stats = ReadStats()
        self._on_gpu = device.type == "cuda"
        self.buffers = buffers or BatchBuffers(-(-batch_size // num_ranks), pinned=self._on_gpu)
        # (views, rows of the split)
        self._readable = readable_by_all(store, split, self.plans, self.views, allow_incomplete=allow_incomplete)
        readable = self._readable.all(axis=0) if all_views else self._readable.any(axis=0)
        names = store.manifest.class_names
        self.class_names = names if classes is None else tuple(names[k] for k in classes)
        """Of the targets, in their order."""
        self.targets, of_classes = targets_of(store, split), np.ones_like(readable)
        if classes is not None:
            self.targets, of_classes = among_classes(self.targets, classes, any_of=any_class)
        self.rows = np.flatnonzero(readable & of_classes)
        self.num_failed = self._count_failed(of_classes)
        """Videos that were left out because their extraction failed."""
        self.subset_note: str | None = None
        """What was taken of the videos, in a sentence."""
        if subset is not None:
            self._take(subset)
        self._check_order()
        self._weights = StoreWeights.load(store, self.plans, device)
        self._reader = StoreReader(store, split, self.stats)
        self._resident: ResidentSource | None = None
        self.keep(resident)

    def __len__(self) -> int:
        """Batches in an epoch; the last may be smaller, and no row is dropped."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def views_with_videos(self) -> tuple[int, ...]:
        """Those of the views that a video can be read in: all, but where an incomplete split is allowed."""
        return tuple(self.views[i] for i in np.flatnonzero(self._readable[:, self.rows].any(axis=1)))

    def epoch(self, number: int, *, first_batch: int = 0, plans: Sequence[ReadPlan] | None = None) -> Iterator[Batch]:
        """The batches of one shuffled epoch, each video in one of its views; the same for the same (seed, number).

        A batch holds the same rows whatever their views are, in the order of their views.

        Args:
            first_batch: the batches before it are left out, and not read.
            plans: those that are still needed; what only the others asked for is not read.
        """
        order, chosen = self.order, tuple(self.plans if plans is None else plans)
        source: BatchSource = self._resident or DiskSource(self._reader, self.buffers)
        if order.shuffle == "shards":
            windows = order.windows(number, self.rows, self._shards[self.rows])
            rows = np.concatenate([self.rows[:0], *windows])
            if self._resident is None:
                source = WindowSource(self._reader, self.buffers, windows, self._shards)
        else:
            rows = order.order(number, self.rows, labels=self.targets[self.rows].numpy())
        return self._batches(source, rows, self._draw.epoch(number)[rows], chosen, first_batch)

    def in_order(self, view: int | None = None, *, plans: Sequence[ReadPlan] | None = None) -> Iterator[Batch]:
        """Every row once, in the order of the split, in that view (default: the first).

        Over all ranks: each has its share of every batch, and no row is read twice or made up to fill one. `plans` are those
        that are needed, as in `epoch`.
        """
        views = np.full(len(self.rows), self.views[0] if view is None else view)
        source = self._resident or DiskSource(self._reader, self.buffers)
        return self._batches(source, self.rows, views, self.plans if plans is None else tuple(plans))

    @property
    def digest(self) -> str:
        """Of the videos in their order, their classes, and in which views each can be read: what batches are made of, besides
        the seed. Shuffled by shards, of what lies in which of them, too."""
        ids = self.store.videos(self.split).ids
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.class_names, self.views, [ids[row] for row in self.rows]]).encode())
        digest.update(self.targets[self.rows].numpy().tobytes())
        digest.update(self._readable[:, self.rows].tobytes())
        if self.order.shuffle == "shards":
            digest.update(self._shards[self.rows].tobytes())
        return digest.hexdigest()

    @property
    def needed_bytes(self) -> int:
        """Of all features that the plans read, of all videos in all the views: what keeping them takes."""
        return int(self._readable[:, self.rows].sum()) * self._arrays(self.plans).row_bytes

    @property
    def shuffle_bytes(self) -> int:
        """About what shuffling by shards holds in memory: two windows of this rank's clips. 0 where it holds none."""
        if self.order.shuffle == "full" or self._resident is not None:
            return 0
        clips = min(2 * self.order.buffer_clips, len(self.rows))
        return clips * self._arrays(self.plans).row_bytes // self.num_ranks

    def keep(self, where: ResidencyKind, on_bytes: OnBytes = lambda done, total: None) -> None:
        """Read all features now, once and in the order of the files, and keep them as they are stored, int8 as int8.

        Every rank keeps all rows: in a shuffled epoch any of them may come up on any rank. Batches then have the bits that they
        would have from disk.

        Args:
            where: "ram", on the device ("gpu"), or not at all ("disk").
            on_bytes: called with the bytes read so far and those of all.
        """
        if where == "disk":
            self._resident = None
            return
        clips = [
            Part(rows, np.full(len(rows), view))
            for view, rows in ((view, self.rows[self._readable[i, self.rows]]) for i, view in enumerate(self.views))
        ]
        device = self.device if where == "gpu" else None
        kept = self._arrays(self.plans)
        self._resident = ResidentSource.load(self._reader, clips, kept, device, self.buffers, on_bytes)

    @cached_property
    def _shards(self) -> np.ndarray:
        return shard_numbers(self.store, self.split)

    def _arrays(self, plans: Sequence[ReadPlan]) -> ArraySelection:
        return select_arrays(self.store.arrays(self.split, self.views[0]), plans)

    @cached_property
    def _draw(self) -> ViewDraw:
        return ViewDraw(self.store.videos(self.split).ids, self.views, self._readable, seed=self.order.seed)

    def _batches(
        self,
        source: BatchSource,
        rows: np.ndarray,
        views: np.ndarray,
        plans: tuple[ReadPlan, ...],
        first_batch: int = 0,
    ) -> Iterator[Batch]:
        """`views` are those of `rows`, which are in the order of the epoch."""
        starts = range(first_batch * self.batch_size, len(rows), self.batch_size)
        sizes = [min(self.batch_size, len(rows) - start) for start in starts]
        parts = [self._part(rows, views, start) for start in starts]
        wanted = self._arrays(plans)
        steps, batches = source.selection(wanted).steps, source.batches(parts, wanted)
        for part, num_global in zip(parts, sizes, strict=True):
            with self.stats.waiting():
                arrays = next(batches)
            on_device = {name: array.to(self.device, non_blocking=True) for name, array in arrays.items()}
            copied = torch.cuda.current_stream(self.device).record_event() if self._on_gpu else None
            clips = BatchFeatures(on_device, steps, self._weights, plans)
            batch = Batch(part.rows, part.views, self.targets[part.rows].to(self.device), num_global, clips, plans)
            del on_device, clips
            try:
                yield batch
            finally:
                if copied is not None:
                    copied.synchronize()  # until then the device may be reading from the memory of `arrays`
            del arrays, batch

    def _part(self, rows: np.ndarray, views: np.ndarray, start: int) -> Part:
        """This rank's rows of the batch that begins at `start`, in the order of their views; of one view in their order."""
        of_batch = slice(start, start + self.batch_size)
        own_rows, own_views = (share(x[of_batch], self.rank, self.num_ranks) for x in (rows, views))
        order = np.argsort(own_views, kind="stable")
        return Part(own_rows[order], own_views[order])

    def _count_failed(self, of_classes: np.ndarray) -> int:
        failed = np.stack([failed_rows(self.store, self.split, view) for view in self.views]).any(axis=0)
        return int(np.delete(failed & of_classes, self.rows).sum())

    def _take(self, subset: Subset) -> None:
        targets, readable = self.targets.numpy(), self.rows
        self.rows = subset.rows(self.store.videos(self.split).ids, targets, readable)
        self.subset_note = subset.note(targets, readable, self.rows)

    def _check_order(self) -> None:
        if self.order.balanced and is_multi_label(self.store.manifest):
            raise OrderError(
                f"the videos of {self.store.path.name} have several classes each, so that no draw gives every class equally "
                "often. Leave out balanced sampling."
            )
