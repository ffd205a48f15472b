"""What one head's training is told: `vcache train-head`, one member of a sweep, and what a run folder keeps of it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vcache.pipelines.settings import SettingError
from vcache.store.object_path import StorePath, store_path

Resident = Literal["auto", "disk", "ram", "gpu"]
Shuffle = Literal["auto", "full", "shards"]


class TrainingError(RuntimeError):
    """The training went wrong; the run folder has no weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One `vcache train-head` command. `settings` may name any field of the head's Config or of its Recipe."""

    head: str
    preset: str | None = None
    """A row of the paper (`vcache heads HEAD` lists them); `settings` go before what it says."""
    store: StorePath | None = None
    """None: the one store under `$VCACHE_HOME` that fits."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    """None: the next free `runs/HEAD-n`."""
    train_split: str = "train"
    views: int | None = None
    """Draw from the first views only, view 0 among them; None: from all that the store defines for training."""
    shots: int | None = None
    """Train on so many videos of each class, drawn by `data_seed`."""
    fraction: float | None = None
    """Train on this share of the videos of each class, drawn by `data_seed`."""
    leave_out: tuple[str, ...] = ()
    """Classes that are not trained on, nor validated on: names, or files of names; see left_out.py."""
    balanced: bool = False
    """Draw every class equally often."""
    seed: int = 0
    """Of the head: its first weights, its dropout, what it mixes."""
    data_seed: int = 0
    """Of the data: the order of each epoch, the views drawn, the subset. Heads with the same one see the same batches."""
    resident: Resident = "auto"
    """Where the features lie while they are trained on; "auto": by the memory that is free."""
    shuffle: Shuffle = "auto"
    """ "full": any order; "shards": whole shards into a buffer, for disks and buckets where a seek is dear; or "auto"."""
    frame_step: int = 1
    """Every so many of the stored frames are read, which makes clips of another stride; see frame_step.py."""
    patience: int | None = None
    """Stop after so many epochs without a better validation; None: never."""
    checkpoint_minutes: float = 5.0
    """A kill loses at most so much of the training."""
    device: str = "auto"
    precision: str = "auto"
    """Of the head's products, one of TRAINING_PRECISIONS; see mixed_precision.py."""
    allow_incomplete: bool = False

    def __post_init__(self) -> None:
        bounds = {"shots": 1, "frame_step": 1, "patience": 1, "checkpoint_minutes": 0, "data_seed": 0}
        for name, bound in bounds.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise SettingError(f"{name} ({value}) must be at least {bound}.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SettingError(f"fraction ({self.fraction}) must be above 0 and at most 1.")
        if self.shots is not None and self.fraction is not None:
            raise SettingError("shots and fraction both choose a subset. Set one of them.")
        for name, kind in (("resident", Resident), ("shuffle", Shuffle)):
            if getattr(self, name) not in get_args(kind):
                raise SettingError(f"--{name} {getattr(self, name)!r} is none of {', '.join(get_args(kind))}.")

    def to_json(self) -> dict[str, Any]:
        """For config.json; `from_json` gives it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "store": str(self.store) if self.store is not None else None,
            "out": str(self.out) if self.out is not None else None,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in values["settings"].items()}
        store, out = values["store"], values["out"]
        return cls(
            **{
                **values,
                "settings": settings,
                "leave_out": tuple(values.get("leave_out", ())),
                "store": None if store is None else store_path(store),
                "out": None if out is None else Path(out),
            }
        )
