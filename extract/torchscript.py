"""Reads the weights out of a TorchScript archive, the form in which OpenAI publishes CLIP, and runs none of its code.

torch.jit.load runs the `__setstate__` of every module in the archive, and TorchScript has operators that write files: loading
is running. An archive is a zip; data.pkl in it says which module has which tensors, and data/0, data/1, ... are their values.
That pickle is read here by an unpickler to which every class is an empty one, so it can build nothing but names and numbers.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class TorchScriptError(ValueError):
    """An archive from which weights cannot be read without running its code."""


class _Module:
    """Stands for any class of the archive: attributes and nothing else."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise TorchScriptError("a module of it is restored by code of its own, and vcache runs none")
        self.__dict__.update(state)


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    size: int


class _StoredTensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Rebuild:
    """What `torch._utils._rebuild_tensor_v2` is called with, kept instead of called."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, shape: Any, stride: Any, *_: object) -> _StoredTensor:
        if not isinstance(storage, _Storage):
            raise TorchScriptError("a tensor of it has no values")
        return _StoredTensor(storage, offset, tuple(shape), tuple(stride))


class _List:
    """What `torch.jit._pickle` makes typed lists with: they are attributes of modules, and no weights."""

    __slots__ = ()

    def __call__(self, *_: object) -> None:
        return None


class _Reader(pickle.Unpickler):
    """Finds no class of Python's: those of the archive are empty, and any other is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch.jit._pickle":
            return _List()
        raise TorchScriptError(
            f"it holds {module}.{name}, which only running code of the file could make, and vcache runs none"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, size = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not isinstance(size, int):
            raise TorchScriptError("it names values that are no tensor's")
        return _Storage(dtype, key, size)


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of code and weights; torch.load reads it only with its safety off."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _root(archive) is not None


def read_torchscript(path: Path, prefix: str | tuple[str, ...] = "") -> tuple[dict[str, Tensor], set[str]]:
    """The tensors whose names begin with `prefix` or one of several, as `torch.jit.load(path).state_dict()` has them; and the
    names of all classes.

    Raises:
        TorchScriptError: it takes the file's own code to read it, or it is damaged.
        zipfile.BadZipFile: a checksum does not fit.
    """
    with zipfile.ZipFile(path) as archive:
        root = _root(archive)
        if root is None or f"{root}/data.pkl" not in archive.namelist():
            raise TorchScriptError("it is no TorchScript archive")
        with archive.open(f"{root}/data.pkl") as file:
            module = _Reader(file).load()
        found = dict(_tensors(module, ""))
        read = {name: _read(archive, root, x) for name, x in found.items() if name.startswith(prefix)}
    return read, set(_class_names(module))


def _root(archive: zipfile.ZipFile) -> str | None:
    """The folder in the archive that holds everything; None if it is another zip."""
    found = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/constants.pkl")]
    return found[0].partition("/")[0] if len(found) == 1 else None


def _children(module: _Module) -> Iterator[tuple[str, _Module]]:
    return ((name, value) for name, value in vars(module).items() if isinstance(value, _Module))


def _tensors(module: Any, path: str) -> Iterator[tuple[str, _StoredTensor]]:
    if not isinstance(module, _Module):
        raise TorchScriptError("it holds no module")
    for name, value in vars(module).items():
        if isinstance(value, _StoredTensor):
            yield path + name, value
    for name, child in _children(module):
        yield from _tensors(child, f"{path}{name}.")


def _class_names(module: _Module) -> Iterator[str]:
    yield type(module).__name__
    for _, child in _children(module):
        yield from _class_names(child)


def _read(archive: zipfile.ZipFile, root: str, x: _StoredTensor) -> Tensor:
    """A copy of a tensor, so that what is not asked for of its storage is not kept."""
    dtype, key, size = x.storage
    if math.prod(x.shape) == 0:
        return torch.empty(x.shape, dtype=dtype)
    values = bytearray(archive.read(f"{root}/data/{key}"))
    if len(values) != size * dtype.itemsize:
        raise TorchScriptError(f"data/{key} in it has {len(values)} bytes, not {size * dtype.itemsize}")
    if math.prod(x.shape) > size:  # with a stride of 0, a few bytes could stand for more than the memory holds
        raise TorchScriptError(f"a tensor of shape {x.shape} in it has {size} values")
    # Refuses what would reach beyond the values.
    return torch.frombuffer(values, dtype=dtype).as_strided(x.shape, x.stride, x.offset).clone()
