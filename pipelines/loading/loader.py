"""ReadPlans -> batches of ClipFeatures on the device, in an order and in views that are functions of (seed, epoch) alone."""

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
from vcache.pipelines.loading.sources import BatchSource, DiskSource, Part, StoreReader, select_arrays
from vcache.pipelines.loading.view_draw import ViewDraw
from vcache.pipelines.matching import ReadPlan
from vcache.pipelines.targets import is_multi_label, targets_of
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
        self.rows = np.flatnonzero(self._readable.all(axis=0) if all_views else self._readable.any(axis=0))
        self.num_failed = self._count_failed()
        """Videos that were left out because their extraction failed."""
        self.targets = targets_of(store, split)
        self._check_order()
        self._weights = StoreWeights.load(store, self.plans, device)
        self._source: BatchSource = DiskSource(StoreReader(store, split, self.stats), self.buffers)

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
        rows = self.order.order(number, self.rows, labels=self.targets[self.rows].numpy())
        return self._batches(rows, self._draw.epoch(number)[rows], first_batch, self.plans if plans is None else plans)

    def in_order(self, view: int | None = None) -> Iterator[Batch]:
        """Every row once, in the order of the split, in that view (default: the first).

        Over all ranks: each has its share of every batch, and no row is read twice or made up to fill one.
        """
        views = np.full(len(self.rows), self.views[0] if view is None else view)
        return self._batches(self.rows, views, 0, self.plans)

    @cached_property
    def _draw(self) -> ViewDraw:
        return ViewDraw(self.store.videos(self.split).ids, self.views, self._readable, seed=self.order.seed)

    def _batches(
        self, rows: np.ndarray, views: np.ndarray, first_batch: int, plans: Sequence[ReadPlan]
    ) -> Iterator[Batch]:
        """`views` are those of `rows`, which are in the order of the epoch."""
        plans = tuple(plans)
        starts = range(first_batch * self.batch_size, len(rows), self.batch_size)
        sizes = [min(self.batch_size, len(rows) - start) for start in starts]
        parts = [self._part(rows, views, start) for start in starts]
        wanted = select_arrays(self.store.arrays(self.split, self.views[0]), plans)
        steps = self._source.selection(wanted).steps
        places = zip(parts, sizes, strict=True)
        for arrays in self._source.batches(parts, wanted):  # not in zip, which would hold on to the arrays
            part, num_global = next(places)
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

    def _count_failed(self) -> int:
        failed = np.stack([failed_rows(self.store, self.split, view) for view in self.views]).any(axis=0)
        return int(np.delete(failed, self.rows).sum())

    def _check_order(self) -> None:
        if self.order.balanced and is_multi_label(self.store.manifest):
            raise OrderError(
                f"the videos of {self.store.path.name} have several classes each, so that no draw gives every class equally "
                "often. Leave out balanced sampling."
            )
