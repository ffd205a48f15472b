"""What is installed: packages by version, what each is for, and what FFmpeg in PyAV can decode."""

import importlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

CORE = {
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip_torch": "open_clip",
    "av": "av",
    "zarr": "zarr",
    "numcodecs": "numcodecs",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "obstore": "obstore",
    "dask": "dask",
}
"""Distributions that vcache cannot do without, and the module of each."""
OPTIONAL = {
    "decord": "--decoder decord",
    "torchcodec": "--decoder torchcodec",
    "tensorboard": "curves of a training in TensorBoard",
    "transformers": "vcache text --encoder, and SigLIP's tokenisers",
    "onnxruntime": "vcache export to ONNX, with onnx and onnxscript",
}
"""And what the others are for."""
CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
"""In which videos of the datasets are."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution of Python."""

    name: str
    version: str | None
    """None: not installed."""
    needed_for: str
    error: str | None = None
    """Why it does not load, of one that vcache needs."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The software."""

    python: str
    packages: tuple[Package, ...]
    torch_cuda: str | None
    """The CUDA that torch was built for; None: it runs on the CPU alone."""
    ffmpeg: dict[str, str]
    """Versions of the libraries in PyAV."""
    codecs: dict[str, bool]
    """Whether PyAV's FFmpeg decodes it."""


def find_installed() -> Installed:
    """Load what vcache needs and look at the rest."""
    core = tuple(_core(name, module) for name, module in CORE.items())
    others = (Package(name=name, version=_version(name), needed_for=what) for name, what in OPTIONAL.items())
    broken = {package.name for package in core if package.error}
    return Installed(
        python=platform.python_version(),
        packages=(*core, *others),
        torch_cuda=None if "torch" in broken else _torch_cuda(),
        ffmpeg={} if "av" in broken else _ffmpeg(),
        codecs={} if "av" in broken else {name: _decodes(name) for name in CODECS},
    )


def _core(name: str, module: str) -> Package:
    error = None
    try:
        importlib.import_module(module)
    except Exception as problem:  # whatever a broken installation raises
        error = f"{type(problem).__name__}: {problem}".partition("\n")[0][:200]
    return Package(name=name, version=_version(name), needed_for="everything", error=error)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _ffmpeg() -> dict[str, str]:
    import av

    return {name: ".".join(map(str, numbers)) for name, numbers in sorted(av.library_versions.items())}


def _decodes(name: str) -> bool:
    import av
    from av.codec.codec import UnknownCodecError

    try:
        av.Codec(name, "r")
    except UnknownCodecError:
        return False
    return True
