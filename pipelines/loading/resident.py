"""Features that are read once and stay: as stored, so that int8 stays int8, in memory or on the device."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vcache.pipelines.loading.buffers import BatchBuffers
from vcache.pipelines.loading.sources import ArraySelection, Part, StoreReader, gather, read_ahead
from vcache.store.errors import RowNotCommitted

_BYTES_AT_ONCE = 64 << 20
OnBytes = Callable[[int, int], None]


class ResidentSource:
    """Gathers each part from what it holds."""

    def __init__(
        self, arrays: dict[str, Tensor], slots: np.ndarray, kept: ArraySelection, buffers: BatchBuffers | None
    ) -> None:
        """
        Args:
            arrays: (clips, *shape of a row) by name.
            slots: int64 (highest view + 1, rows of the split), the place of each clip in them, or -1.
            buffers: to gather into; None where the arrays are on the device, which has memory of its own for that.
        """
        self._arrays, self._slots, self._kept, self._buffers = arrays, slots, kept, buffers

    @classmethod
    def load(
        cls,
        reader: StoreReader,
        clips: Sequence[Part],
        kept: ArraySelection,
        device: torch.device | None,
        buffers: BatchBuffers,
        on_bytes: OnBytes = lambda done, total: None,
    ) -> "ResidentSource":
        """Read the clips, a part for each view with its rows ascending, in the order of the files.

        Args:
            device: None keeps them in memory.
            on_bytes: called with the bytes that are read so far and those of all.
        """
        num_clips, num_rows = sum(len(part.rows) for part in clips), reader.store.splits[reader.split]
        slots = np.full((1 + max(int(part.views.max(initial=0)) for part in clips), num_rows), -1, dtype=np.int64)
        with torch.inference_mode(False):  # else heads could not be trained on them
            arrays = {
                name: _empty(spec.shape, spec.numpy_dtype, num_clips, device) for name, spec in kept.specs.items()
            }
        first, pieces = 0, list(_pieces(clips, kept.row_bytes))
        on_gpu = device is not None and device.type == "cuda"
        staging = BatchBuffers(max((len(part.rows) for part in pieces), default=0), pinned=True) if on_gpu else None
        for part in pieces:
            last = first + len(part.rows)
            slots[part.views, part.rows] = np.arange(first, last)
            _read_into(reader, part, kept, {name: array[first:last] for name, array in arrays.items()}, staging)
            first = last
            on_bytes(first * kept.row_bytes, num_clips * kept.row_bytes)
        return cls(arrays, slots, kept, buffers if device is None else None)

    def selection(self, wanted: ArraySelection) -> ArraySelection:
        return self._kept.only(wanted.specs)

    def batches(self, parts: Sequence[Part], wanted: ArraySelection) -> Iterator[dict[str, Tensor]]:
        chosen = self.selection(wanted)
        if self._buffers is None:
            return (self._on_device(part, chosen) for part in parts)
        return read_ahead(lambda part: self._in_memory(part, chosen), parts)

    def _places(self, part: Part) -> np.ndarray:
        """Where in the arrays the clips are; raises RowNotCommitted, as a read would, if one is not there."""
        places = self._slots[part.views, part.rows]
        if (places < 0).any():
            first = int(np.argmax(places < 0))
            raise RowNotCommitted(
                f"row {part.rows[first]} is not kept in view {part.views[first]}, in which it cannot be read"
            )
        return places

    def _in_memory(self, part: Part, chosen: ArraySelection) -> dict[str, Tensor]:
        assert self._buffers is not None
        out, slots = self._buffers.take(chosen.specs, len(part.rows)), self._places(part)
        for name, array in out.items():
            gather(self._arrays[name], slots, array.numpy())
        return out

    def _on_device(self, part: Part, chosen: ArraySelection) -> dict[str, Tensor]:
        device = next((array.device for array in self._arrays.values()), torch.device("cpu"))
        slots = torch.from_numpy(self._places(part)).to(device)
        return {name: _select(self._arrays[name], slots) for name in chosen.specs}


def _select(array: Tensor, slots: Tensor) -> Tensor:
    """The rows in a new tensor; uint16 by its bits, which not every operation takes on a GPU."""
    if array.dtype == torch.uint16:
        return array.view(torch.int16).index_select(0, slots).view(torch.uint16)
    return array.index_select(0, slots)


def _empty(shape: tuple[int, ...], dtype: np.dtype, num_clips: int, device: torch.device | None) -> Tensor:
    like = torch.from_numpy(np.empty(0, dtype=dtype))
    return torch.empty((num_clips, *shape), dtype=like.dtype, device=device or torch.device("cpu"))


def _pieces(clips: Sequence[Part], row_bytes: int) -> Iterator[Part]:
    """The same clips in pieces that are read at once."""
    step = max(1, _BYTES_AT_ONCE // max(1, row_bytes))
    for part in clips:
        for first in range(0, len(part.rows), step):
            yield Part(part.rows[first : first + step], part.views[first : first + step])


def _read_into(
    reader: StoreReader, part: Part, kept: ArraySelection, places: dict[str, Tensor], staging: BatchBuffers | None
) -> None:
    """Into memory directly; to a GPU through `staging`."""
    into = places if staging is None else staging.take(kept.specs, len(part.rows))
    reader.read(part, kept, {name: array.numpy() for name, array in into.items()})
    if staging is not None:
        for name, array in into.items():
            places[name].copy_(array)  # has ended when it returns, so that `staging` may be read into again
