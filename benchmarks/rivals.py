"""Other ways to read the same batches: zarr-python, tensorstore, h5py and np.memmap. Used by reader.py.

Each is a function (rows, out) -> one array per layer: `out` where the library can read into memory it is given, else an array
of its own, which is not then copied to `out`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorstore
import zarr

Read = Callable[[np.ndarray, list[np.ndarray]], Sequence[np.ndarray]]


def zarr_rows(folders: list[Path]) -> Read:
    """Row by row, the fastest way that zarr-python 3.1 has for rows of a sharded array."""
    arrays = [zarr.open_array(str(folder), mode="r") for folder in folders]

    def read(rows: np.ndarray, out: list[np.ndarray]) -> list[np.ndarray]:
        for array, destination in zip(arrays, out, strict=True):
            for at, row in enumerate(rows.tolist()):
                destination[at] = array[row]
        return out

    return read


def zarr_oindex(folders: list[Path]) -> Read:
    """All rows in one call, as its documentation would have it."""
    arrays = [zarr.open_array(str(folder), mode="r") for folder in folders]
    return lambda rows, out: [np.asarray(array.oindex[rows]) for array in arrays]


def tensorstore_rows(folders: list[Path], num_threads: int) -> Read:
    context = tensorstore.Context(
        {"file_io_concurrency": {"limit": num_threads}, "data_copy_concurrency": {"limit": num_threads}}
    )
    kvstores = [{"driver": "file", "path": f"{folder}/"} for folder in folders]
    arrays = [
        tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, context=context, read=True).result()
        for kvstore in kvstores
    ]

    def read(rows: np.ndarray, out: list[np.ndarray]) -> list[np.ndarray]:
        futures = [array[rows].read() for array in arrays]
        return [future.result() for future in futures]

    return read


def h5py_rows(path: Path, layers: list[np.ndarray], *, checked: bool) -> Read:
    """One clip per chunk, read straight into `out`; `checked` by HDF5's own fletcher32."""
    try:
        import h5py  # in the dev extra: the package itself does not need it
    except ImportError as error:
        raise SystemExit("h5py is not installed: pip install h5py, or leave it out with --skip h5py") from error
    with h5py.File(path, "w") as file:
        for i, rows in enumerate(layers):
            file.create_dataset(str(i), data=rows, chunks=(1, *rows.shape[1:]), fletcher32=checked)
    opened = h5py.File(path, "r")
    datasets = [opened[str(i)] for i in range(len(layers))]

    def read(rows: np.ndarray, out: list[np.ndarray]) -> list[np.ndarray]:
        for dataset, destination in zip(datasets, out, strict=True):
            for at, row in enumerate(rows.tolist()):
                dataset.read_direct(destination, np.s_[row : row + 1], np.s_[at : at + 1])
        return out

    return read


def memmap_rows(folder: Path, layers: list[np.ndarray]) -> Read:
    maps = []
    for i, rows in enumerate(layers):
        path = folder / f"{i}.bin"
        rows.tofile(path)
        maps.append(np.memmap(path, dtype=rows.dtype, mode="r", shape=rows.shape))

    def read(rows: np.ndarray, out: list[np.ndarray]) -> list[np.ndarray]:
        for mapped, destination in zip(maps, out, strict=True):
            np.take(mapped, rows, axis=0, out=destination)
        return out

    return read
