"""What a store was made of, as a repair needs it: the store itself knows neither videos nor a backbone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from vcache.store.commits import RowFailure
from vcache.store.constants import Constant
from vcache.store.layout import ArraySpec
from vcache.store.manifest import VideoTable
from vcache.store.parts import PartName


@dataclass(frozen=True)
class PartialRow:
    """The arrays of a row whose video is damaged, and the damage."""

    arrays: Mapping[str, np.ndarray]
    damage: RowFailure


def arrays_of(result: Mapping[str, np.ndarray] | PartialRow) -> Mapping[str, np.ndarray]:
    return result.arrays if isinstance(result, PartialRow) else result


Recomputed = Iterator[tuple[int, Mapping[str, np.ndarray] | PartialRow | RowFailure]]


@runtime_checkable
class Origin(Protocol):
    """Makes again what is in a store. Each method raises CannotRecompute if it could not give what the store was made of."""

    def recompute(self, part: PartName, view: int, rows: Sequence[int], arrays: tuple[ArraySpec, ...]) -> Recomputed:
        """Each of the rows, in this order, with its arrays, or with the reason why its video gives none.

        A damaged video gives a PartialRow where the store holds the row as partial, or where the origin is told to allow it.
        """
        ...

    def list_videos(self, part: PartName) -> VideoTable:
        """The videos of the part, and maybe others of its split, as the dataset lists them."""
        ...

    def constant(self, name: str) -> Constant:
        """An array of the whole store; the caller compares its checksum, if the array is exact."""
        ...
