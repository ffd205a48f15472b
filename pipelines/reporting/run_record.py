"""What a run folder knows of its training, finished or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vcache.pipelines.runs import Run, read_config
from vcache.pipelines.training.logs import STEPS, read_log


class ReportError(ValueError):
    """What cannot be reported on as asked."""


@dataclass(frozen=True)
class RunRecord:
    """A run and its logs."""

    run: Run
    finished: bool

    @classmethod
    def open(cls, path: Path) -> "RunRecord":
        """Of a complete run, or of one that was begun."""
        return cls(Run(path, read_config(path / "config.json")), (path / "head.safetensors").is_file())

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> Mapping[str, Any]:
        return self.run.config

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return self.run.metrics()

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of steps.jsonl."""
        return read_log(self.path / STEPS)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.run.class_names() if self.run.has_class_names else ()

    @property
    def planned(self) -> str:
        """The length that the recipe says: "20 epochs", "500 steps"; empty of an imported run."""
        recipe = self.config.get("recipe") or {}
        name = "steps" if recipe.get("steps") is not None else "epochs"
        number = recipe.get(name)
        return "" if number is None else f"{number} {name if number != 1 else name[:-1]}"

    @property
    def monitored(self) -> str:
        """The field of an epoch by which the best is chosen, and which is reported."""
        several = any(epoch.get("val_mean_average_precision") is not None for epoch in self.epochs)
        return "val_mean_average_precision" if several else "val_top1"

    @property
    def validated(self) -> list[dict[str, Any]]:
        """The epochs after which there was a validation."""
        return [epoch for epoch in self.epochs if epoch.get(self.monitored) is not None]

    @property
    def best_epoch(self) -> dict[str, Any] | None:
        """The epoch of best.safetensors; None without validation."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.get("best")), None)
