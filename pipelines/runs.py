"""A run folder: what was trained, on which store, with which settings, and what came of it.

RUN/config.json         head, its resolved config, recipe, store with its key and views, versions: enough to build it again
RUN/classes.txt         class names, one a line, in the order of the logits; an imported head may be without
RUN/metrics.jsonl       one line per epoch, written as the epoch ends
RUN/steps.jsonl         about a thousand lines over the run, and RUN/tensorboard/ where that is installed; training/logs.py
RUN/best.safetensors    the weights of the epoch with the best validation
RUN/tail.safetensors    of a head that runs top blocks of the backbone: those (tail_file.py)
RUN/checkpoint/         what an unfinished run goes on from (training/checkpoints.py); gone when it is complete
RUN/head.safetensors    the last weights; written last, so a run that has it is complete

A head that was imported (importing.py) was trained on no store of ours: `store`, `store_key`, `store_spec` and `recipe` are
null in its config, and "imported" says where it comes from.
"""

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vcache.heads.registry import get_head
from vcache.heads.requirements import HeadRequirements
from vcache.heads.tail import FrozenTail
from vcache.pipelines.missing_run import why_no_run
from vcache.pipelines.settings import build
from vcache.pipelines.tail_file import TAIL, TailFileError, TailKey, read_tail, tail_bytes
from vcache.pipelines.training.logs import METRICS, read_log
from vcache.store.files import sync_folder

WEIGHTS = {"last": "head.safetensors", "best": "best.safetensors"}
"""Files of the weights after the last step, and of the epoch that was best in validation."""

_DIGESTS = {"train_digest": "train", "val_digest": "validate"}
"""Of config.json: of the videos that are read, and what for."""

_MAY_CHANGE = ("versions", "device", "training", "num_videos", "store")
"""Of config.json: a store may have been moved, and grown by splits that the run does not read."""


class RunError(ValueError):
    """A run folder that cannot be written or read as asked."""


@dataclass(frozen=True)
class Run:
    """A folder written by `vcache train-head` or `vcache import-head`."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        class_names: tuple[str, ...] | None,
        tail: FrozenTail | None = None,
    ) -> "Run":
        """Make the folder and write what is known before training; a folder with anything in it is refused.

        `tail` is what the head runs of the backbone, of which what config["tail"] says is kept.
        """
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        if class_names is not None:
            write_text(path / "classes.txt", "\n".join(class_names) + "\n")
        if tail is not None:
            cls(path, config).save_tail(tail)
        write_text(path / "config.json", json.dumps(config, indent=2) + "\n")  # last: a run that has it was begun
        return cls(path, config)

    @staticmethod
    def forget_unbegun(path: Path) -> None:
        """Remove what a kill in `create` left, so that the same run can be created."""
        if not (path / "config.json").is_file():
            for name in ("classes.txt", TAIL, "config.json"):
                (path / name).unlink(missing_ok=True)
                (path / f"{name}.part").unlink(missing_ok=True)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """A complete run; RunError says what is missing otherwise."""
        if not (path / "config.json").is_file():
            raise RunError(why_no_run(path))
        if not (path / "head.safetensors").is_file():
            raise RunError(
                f"{path} has no head.safetensors: its training did not finish. Go on with:  "
                f"{shlex.join(['vcache', 'resume', str(path)])}"
            )
        return cls(path, read_config(path / "config.json"))

    @classmethod
    def unfinished(cls, path: Path) -> "Run":
        """A run that was begun; `check_same` says whether it can go on."""
        return cls(path, read_config(path / "config.json"))

    def check_same(self, config: Mapping[str, Any]) -> None:
        """`config` is what the run would be begun with now.

        Raises:
            RunError: it was begun with another, so that it would become neither.
        """
        now = json.loads(json.dumps(config))
        differing = [name for name in self.config if name not in _MAY_CHANGE and self.config[name] != now.get(name)]
        if differing:
            name = differing[0]
            if name in _DIGESTS:
                raise RunError(
                    f"{self.path} cannot go on: its store has other videos to {_DIGESTS[name]} on than when it began, or other "
                    "classes or views of them. Train again into another --out."
                )
            raise RunError(
                f"{self.path} cannot go on: {name} was {json.dumps(self.config[name])} when it began and is "
                f"{json.dumps(now.get(name))} now. Train again into another --out."
            )

    @property
    def head(self) -> str:
        return self.config["head"]

    @property
    def imported(self) -> bool:
        """Whether the head was trained elsewhere: the run has no store of its own."""
        return self.config["store"] is None

    @property
    def left_out(self) -> tuple[str, ...]:
        """Classes of its store that the head was not trained on."""
        return tuple(self.config.get("left_out", ()))

    def head_config(self) -> Any:
        """The Config of the head. Of an imported one that classifies by text, and is to be given that of a store's classes, with
        one class."""
        config = {name: tuple(v) if isinstance(v, list) else v for name, v in self.config["head_config"].items()}
        if config.get("num_classes", 1) is None:
            config["num_classes"] = 1
        return build(get_head(self.head).Config, config)

    def requirements(self) -> HeadRequirements:
        """What the head reads."""
        return get_head(self.head).requires(self.head_config())

    @property
    def has_class_names(self) -> bool:
        return (self.path / "classes.txt").is_file()

    def class_names(self) -> tuple[str, ...]:
        """The classes that the head was trained on, in the order of its logits.

        Raises:
            RunError: it was imported without them.
        """
        if not self.has_class_names:
            raise RunError(f"{self.path} was imported without class names. Import it again with --classes FILE.")
        text = (self.path / "classes.txt").read_text(encoding="utf-8")
        return tuple(text.removesuffix("\n").split("\n"))

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per finished epoch."""
        return read_log(self.path / METRICS)

    def save_head(self, state: Mapping[str, Tensor], which: str = "last") -> None:
        """A head that is there is whole."""
        write_bytes(self.path / WEIGHTS[which], as_safetensors(state))

    def save_tail(self, tail: FrozenTail) -> None:
        """The top blocks of the backbone that the head runs, which may be fewer than the tail has."""
        write_bytes(self.path / TAIL, tail_bytes(tail, self.requirements().tail))

    def mend_tail(self, tail: FrozenTail) -> None:
        """Write the blocks that the head runs again, unless they are there and whole."""
        try:
            read_tail(self.path / TAIL, self._tail_key())
        except TailFileError:
            self.save_tail(tail)

    def _tail_key(self) -> TailKey | None:
        """None of an imported head, which says of its file itself what it is of."""
        told = self.config.get("tail")
        return None if told is None else TailKey(**told)

    def _give_tail(self, head: Any) -> None:
        try:
            head.set_tail(read_tail(self.path / TAIL, self._tail_key()))
        except ValueError as error:  # also of the head, that it is of another backbone
            other = "that of another run on the same store will do, if its head runs as many blocks."
            mend = "or import the checkpoint again, into another --out." if self._tail_key() is None else other
            raise RunError(
                f"{self.path} cannot be read: {str(error).rstrip('.')}. Restore {TAIL} from a copy; {mend}"
            ) from error

    def load_head(self, which: str = "last") -> torch.nn.Module:
        """The trained head in eval mode on the CPU, with the weights that one of WEIGHTS names.

        Raises:
            RunError: they are not there, or the blocks of the backbone that the head runs are not.
        """
        if which not in WEIGHTS:
            raise RunError(f"--which {which!r} is not there; a run has weights {' and '.join(WEIGHTS)}.")
        file = self.path / WEIGHTS[which]
        if not file.is_file():
            raise RunError(
                f"{self.path} has no {file.name}, as runs have that were validated while they were trained. "
                "Take the last weights:  --which last"
            )
        head = get_head(self.head)(self.head_config())
        if self.requirements().tail:
            self._give_tail(head)
        head.load_state_dict(_read_weights(file))
        return head.eval()


def read_config(path: Path) -> dict[str, Any]:
    """
    Raises:
        RunError: it holds something else.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. Restore it from a copy.") from error
    if not isinstance(config, dict):
        raise RunError(f"{path} is damaged: it holds no settings. Restore it from a copy.")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RunError(
            f"{path} holds no weights in the format of safetensors, the only one that a run has: {error}. Restore it from a "
            "copy, or make a run of a checkpoint with:  vcache import-head"
        ) from error


def check_free(path: Path) -> None:
    """Refuse a path at which a run would be mixed with something else.

    Raises:
        RunError: there is a file, or a folder with anything in it.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, and a run is a folder. Choose another --out.")
    if path.exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty: a run is never written over. Choose another --out, or delete it.")


def next_run_folder(head: str, parent: Path = Path("runs")) -> Path:
    """runs/evl-1, runs/evl-2, ...: the first that is not there."""
    number = 1
    while (parent / f"{head}-{number}").exists():
        number += 1
    return parent / f"{head}-{number}"


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Whoever reads the file sees the old one or the new one, also after a power cut. On a full disk the old one stays, and
    nothing of the new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Copies: safetensors takes no tensors that share memory, as tied weights do."""
    return save({name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()})
