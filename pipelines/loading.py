"""ReadPlan -> batches of ClipFeatures on the device, in an order that is a function of (seed, epoch) alone."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.buffers import BatchBuffers
from vcache.pipelines.derivation import input_array, load_projection
from vcache.pipelines.matching import ReadPlan, completing_command
from vcache.pipelines.precision import channel_constants, dequantised
from vcache.store.reader import FeatureStore


class IncompleteSplit(RuntimeError):
    """Some videos of the split are neither stored nor recorded as failed: their extraction has not finished."""


@dataclass(frozen=True)
class Batch:
    """Features and labels of B clips, and the rows of the split they came from."""

    features: ClipFeatures
    labels: Int[Tensor, " B"]
    rows: np.ndarray


class ClipLoader:
    """Reads batches of one split and view through a plan; the next batch is read while the current one is used.

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
        allow_incomplete: bool = False,
        buffers: BatchBuffers | None = None,
    ) -> None:
        """`buffers` are another loader's, to use its memory between its epochs."""
        self.store, self.split, self.plan = store, split, plan
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self._on_gpu = device.type == "cuda"
        self.buffers = buffers or BatchBuffers(batch_size, pinned=self._on_gpu)
        self.rows = self._readable_rows(allow_incomplete)
        self.labels = torch.from_numpy(store.videos(split).labels)
        derived = plan.maps.values() if plan.maps_from == "derive" else ()
        self._constants = channel_constants(store, plan.quantised_arrays, device)
        self._projections = {layer: load_projection(store, layer, device) for layer in derived}

    def __len__(self) -> int:
        """Batches in an epoch; the last may be smaller, and no row is dropped."""
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one shuffled epoch, the same for the same (seed, number)."""
        order = np.random.default_rng([self.seed, number]).permutation(self.rows)
        return self._batches(order)

    def in_order(self) -> Iterator[Batch]:
        """Every row once, in the order of the split."""
        return self._batches(self.rows)

    def _batches(self, order: np.ndarray) -> Iterator[Batch]:
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            ahead = reader.submit(self._read, parts[0]) if parts else None
            for i, rows in enumerate(parts):
                assert ahead is not None
                arrays = ahead.result()
                ahead = reader.submit(self._read, parts[i + 1]) if i + 1 < len(parts) else None
                batch = Batch(self._features(arrays), self.labels[rows].to(self.device), rows)
                copied = torch.cuda.current_stream(self.device).record_event() if self._on_gpu else None
                try:
                    yield batch
                finally:
                    if copied is not None:
                        copied.synchronize()  # until then the device may be reading from the memory of `arrays`
                del arrays, batch

    def _read(self, rows: np.ndarray) -> dict[str, Tensor]:
        specs = self.store.arrays(self.split)
        arrays = self.buffers.take({name: specs[name] for name in self.plan.arrays}, len(rows))
        self.store.read_many(self.split, arrays, rows, out={name: array.numpy() for name, array in arrays.items()})
        return arrays

    def _features(self, arrays: dict[str, Tensor]) -> ClipFeatures:
        on_device = {name: array.to(self.device, non_blocking=True) for name, array in arrays.items()}
        tokens = {layer: self.dequantised(on_device, f"tokens/{layer}") for layer in self.plan.tokens.values()}
        return ClipFeatures(
            tokens={asked: tokens[layer] for asked, layer in self.plan.tokens.items()},
            cls={asked: self.dequantised(on_device, f"cls/{layer}") for asked, layer in self.plan.cls.items()},
            maps={asked: self._maps(on_device, tokens, layer) for asked, layer in self.plan.maps.items()},
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

    def _readable_rows(self, allow_incomplete: bool) -> np.ndarray:
        """Rows with every array; failed videos are left out, unfinished ones are an error unless allowed."""
        committed = self.store.committed_rows(self.split, self.plan.arrays)
        failed = {failure.row for failure in self.store.failures(self.split)}
        unfinished = [row for row in np.flatnonzero(~committed) if row not in failed]
        if unfinished and not allow_incomplete:
            raise IncompleteSplit(
                f"{len(unfinished)} of {len(committed)} videos of split {self.split!r} in {self.store.path.name} are not "
                f"extracted yet. Finish with:  {completing_command(self.store, self.plan)}\n"
                "or use what is there with --allow-incomplete."
            )
        return np.flatnonzero(committed)
