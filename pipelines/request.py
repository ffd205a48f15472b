"""What `vcache extract` is asked for: the options, checked, and the words of them that a store records."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from vcache.extract.datasets.registry import list_datasets
from vcache.extract.decoders import list_decoders
from vcache.extract.layers import selects_none
from vcache.extract.sampling import Sampling, StridedSampling, TSNSampling
from vcache.extract.spec import DTYPES, PRECISIONS
from vcache.pipelines.precision_error import MAX_ERROR
from vcache.pipelines.presets import DEFAULT_RECIPE, UnknownRecipe, recipe
from vcache.store.object_path import StorePath

CROSS_FRAME = ("qk", "maps", "derive", "none")
PREPROCESS = ("fast", "exact")

_GRID = re.compile(r"[1-9]\d*x[1-9]\d*")
_LOCAL_DIR = "local-dir:"  # open_clip's prefix for a model in a folder


class ExtractionError(ValueError):
    """What was asked cannot be extracted into this store; the message says what differs and what to do."""


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """One `vcache extract` command.

    Only `frames`, `stride`, `tsn`, `preprocess`, `decoder`, `precision`, `dtype`, `model` and `pretrained` change a stored value,
    through the spec and its key; the rest says what to store, where, and how fast.
    """

    dataset: str
    """A registered name, a folder, a CSV file, or a list in a .txt."""
    layers: str = "-4:"
    """Blocks whose tokens are kept, as words (extract/layers.py); "none" keeps the embedding alone. "stem" keeps
    what enters block 0, of which there is no CLS, no attention between frames."""
    split: tuple[str, ...] | None = None
    """Splits to extract; None is all that the dataset has."""
    frames: int = 8
    stride: int = 16
    """Frames between two sampled ones; not used with `tsn`."""
    tsn: bool = False
    """Segment centres over the whole video in place of a strided window in its middle."""
    cross_frame: str = "qk"
    """"qk": the queries and keys of the same layers; "maps": the head-mean softmax maps made of them; "derive": what enters
    these blocks, and their frozen weights, from which training makes Q/K again; "none": nothing."""
    dtype: str = "float16"
    """"float16", "bfloat16", "float32", or "int8" with a scale per token (store/quantise.py)."""
    max_error: float = MAX_ERROR
    """How much of the standardised features the dtype may lose on a sample before the extraction is refused."""
    model: str = "ViT-B-16-quickgelu"
    pretrained: str | None = "openai"
    more_models: tuple[tuple[str, str | None], ...] = ()
    """Further (model, pretrained): each has a store of its own, and the videos are decoded once for all; see `per_model`."""
    random_weights: bool = False
    preprocess: str = "fast"
    decoder: str = "pyav"
    """One of `list_decoders()`; folders of frames are read as they are whatever it is."""
    precision: str = "auto"
    """Of the backbone's products and residual stream. "auto" is that of the store that is extended with `store`; else float32 on
    a CPU, and on a GPU the precision that `dtype` has, which is float16 for int8."""
    root: Path | None = None
    store: StorePath | None = None
    val_fraction: float = 0.2
    """Share of the videos that a dataset without splits of its own puts into `val`."""
    views: int = 1
    """Views of each video that is trained on: view 0 and so many less one random ones."""
    eval_views: str = "1x1"
    """"TxS": T clips along the video times S crops of each, of the videos that are evaluated on."""
    augment: str = DEFAULT_RECIPE
    """What the random views are made by, see presets.py."""
    view_seed: int = 0
    """Of the random views: another seed adds others."""
    pixels: int = 0
    """Frames whose pixels are stored for each clip, those of the clip among them: a multiple of `frames`; 0 for none."""
    device: str = "auto"
    decode_workers: int = 2
    """Videos that are decoded at the same time."""
    batch_size: int | None = None
    """Clips in one forward pass; None is the number that the store was made with, or one that suits the device."""
    scheduler: str | None = None
    """Address of a dask scheduler whose workers extract the shards."""
    workers: int | None = None
    """Worker processes of this machine that extract the shards; 0 is one for each GPU. None: this process does."""
    cluster_decode_workers: int | None = None
    """In place of `decode_workers` for each worker; None is the cores of its machine, shared among its workers."""
    max_failures: float = 0.01
    """Share of the videos that may fail, at least one, before the exit status says so."""
    ignore_free_space: bool = False
    """Begin although the disk has less room than the features take."""
    allow_partial: bool = False
    """Store what a damaged video gives, with a note of the damage; else it fails."""
    retry_failed: bool = False
    """Extract the videos again that failed before."""
    failures: Path | None = None
    """Where failures are listed as JSON lines (failures.py); None is beside the store."""
    part: tuple[int, int] | None = None
    """(3, 16): write the third of 16 shares of the shards, beside processes that write the others."""

    def __post_init__(self) -> None:
        choices = {
            "cross_frame": CROSS_FRAME,
            "dtype": DTYPES,
            "preprocess": PREPROCESS,
            "decoder": list_decoders(),
            "precision": ("auto", *PRECISIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ExtractionError(
                    f"--{name.replace('_', '-')} {getattr(self, name)!r}: there are {', '.join(allowed)}."
                )
        for name in ("frames", "stride", "decode_workers", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ExtractionError(f"--{name.replace('_', '-')} {value}: must be at least 1.")
        if not 0 <= self.max_failures <= 1:
            raise ExtractionError(f"--max-failures {self.max_failures:g}: a share of the videos, from 0 to 1.")
        if not 0 <= self.val_fraction < 1:
            raise ExtractionError(f"--val-fraction {self.val_fraction:g}: a share of the videos, from 0 to below 1.")
        if not self.max_error > 0:
            raise ExtractionError(f"--max-error {self.max_error:g}: must be above 0.")
        if selects_none(self.layers) and self.cross_frame != "none":
            raise ExtractionError(
                f"--cross-frame {self.cross_frame}: attention between frames is of layers, and --layers none keeps none. "
                "Leave --cross-frame out, or name the layers."
            )
        if self.cross_frame == "maps" and self.frames < 2:
            raise ExtractionError("--cross-frame maps needs at least two frames: maps are between neighbours.")
        if self.more_models and self.store is not None:
            raise ExtractionError(
                f"--store {self.store} names one store, and each of {1 + len(self.more_models)} models has its own. Leave it out."
            )
        if self.tsn and self.stride != ExtractionConfig.stride:
            raise ExtractionError(f"--stride {self.stride} has no meaning with --tsn, which covers the whole video.")
        if self.part is not None:
            _check_part(*self.part)
            if self.retry_failed:
                raise ExtractionError("--retry-failed writes shards anew and needs the store alone: leave out --part.")
        if self.failures is not None and self.more_models:
            raise ExtractionError(
                f"--failures {self.failures} names one file, and each of {1 + len(self.more_models)} models has its own."
            )
        self._check_views()
        self._check_cluster()

    def _check_views(self) -> None:
        if self.views < 1:
            raise ExtractionError(f"--views {self.views}: must be at least 1, which is view 0.")
        if not _GRID.fullmatch(self.eval_views):
            raise ExtractionError(
                f"--eval-views {self.eval_views!r}: say TxS, T clips along the video times S crops of each, as 3x1, 1x3 or 4x3."
            )
        if self.pixels < 0 or self.pixels % self.frames:
            raise ExtractionError(
                f"--pixels {self.pixels}: must be a multiple of the {self.frames} frames of a clip, as {2 * self.frames}."
            )
        try:
            recipe(self.augment, self.dataset)
        except UnknownRecipe as error:
            raise ExtractionError(f"--augment: {error}") from error

    @property
    def eval_grid(self) -> tuple[int, int]:
        """(T, S) of `eval_views`."""
        temporal, spatial = self.eval_views.split("x")
        return int(temporal), int(spatial)

    def _check_cluster(self) -> None:
        if self.part is not None and (self.workers is not None or self.scheduler is not None):
            raise ExtractionError(
                "--part shares the work out without a scheduler: leave out --workers and --scheduler."
            )
        if self.workers is not None and self.workers < 0:
            raise ExtractionError(f"--workers {self.workers}: a number of processes, or 0 for one for each GPU.")
        if self.workers is not None and self.scheduler is not None:
            raise ExtractionError(
                "--workers starts a cluster here, --scheduler uses one that is there: give one of them."
            )
        if self.workers is not None and self.device.startswith("cuda:"):
            raise ExtractionError(
                f"--device {self.device}: with --workers each gets a GPU of its own. Use --device cuda."
            )

    @property
    def sampling(self) -> Sampling:
        if self.tsn:
            return TSNSampling(num_frames=self.frames)
        return StridedSampling(num_frames=self.frames, stride_frames=self.stride)


def per_model(config: ExtractionConfig) -> tuple[ExtractionConfig, ...]:
    """A request of each model of the command, which `run_extractions` takes together."""
    models = ((config.model, config.pretrained), *config.more_models)
    return tuple(replace(config, model=model, pretrained=weights, more_models=()) for model, weights in models)


def parse_part(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16).

    Raises:
        ExtractionError: the text is of another form, or there is no such part.
    """
    number, slash, total = text.partition("/")
    if not (slash and number.isascii() and number.isdecimal() and total.isascii() and total.isdecimal()):
        raise ExtractionError(f"--part {text!r}: must be I/N, as 3/16 for the third of 16 parts.")
    _check_part(int(number), int(total))
    return int(number), int(total)


def _check_part(part: int, num_parts: int) -> None:
    if not 1 <= part <= num_parts:
        raise ExtractionError(
            f"--part {part}/{num_parts}: parts are counted from 1/{num_parts} to {num_parts}/{num_parts}."
        )


def portable(config: ExtractionConfig) -> ExtractionConfig:
    """The same request for a process elsewhere, whose current folder and home are others: what it names lies where it does."""
    return replace(
        config,
        # Links stay links: they may lead elsewhere on another machine.
        store=config.store.absolute() if isinstance(config.store, Path) else config.store,
        model=_absolute_model(config.model),
        pretrained=_absolute_file(config.pretrained),
        scheduler=None,
        workers=None,
        part=None,
        retry_failed=False,
        failures=None,
    )


def recorded_request(config: ExtractionConfig) -> dict[str, object]:
    """The command's words that make the same store again, from any folder; matching.py turns them back into a command."""
    registered = {name for name, info in list_datasets().items() if not info.chosen_by_path}
    request: dict[str, object] = {
        "dataset": config.dataset if config.dataset in registered else _absolute(config.dataset),
        "root": _absolute(config.root) if config.root else None,
        "split": ",".join(config.split) if config.split else None,
        "frames": config.frames,
        "stride": config.stride,
        "tsn": config.tsn,
        "dtype": config.dtype,
        "model": _absolute_model(config.model),
        "pretrained": _absolute_file(config.pretrained),
        "random_weights": config.random_weights,
        "preprocess": config.preprocess,
        "val_fraction": config.val_fraction,
    }
    # Only what is not the default: these words came later, and older stores are without them.
    later = {"views": 1, "eval_views": "1x1", "augment": DEFAULT_RECIPE, "view_seed": 0, "pixels": 0, "decoder": "pyav"}
    return request | {
        name: getattr(config, name) for name, default in later.items() if getattr(config, name) != default
    }


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


def _absolute_model(model: str) -> str:
    folder = model.removeprefix(_LOCAL_DIR)
    return model if folder == model else _LOCAL_DIR + _absolute(folder)


def _absolute_file(pretrained: str | None) -> str | None:
    """A checkpoint's path made absolute; a tag stays a tag."""
    return _absolute(pretrained) if pretrained and Path(pretrained).expanduser().is_file() else pretrained
