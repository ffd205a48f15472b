"""An explanation as pictures for people and as numbers for programs."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vcache.pipelines import console
from vcache.pipelines.attention_sheets import attention_lines, attention_numbers, attention_pictures
from vcache.pipelines.explanation import Attention, Explanation, Magnitudes
from vcache.pipelines.magnitude_sheets import magnitude_lines, magnitude_numbers, magnitude_pictures
from vcache.pipelines.pictures import percent


@dataclass(frozen=True)
class _Sheets:
    """How one kind of findings is told."""

    pictures: Callable[[Explanation, Any], dict[str, Image.Image]]
    """By their names: "cross_frame" is written as cross-frame.png."""
    numbers: Callable[[Explanation, Any], dict[str, Any]]
    """In types that JSON has."""
    lines: Callable[[dict[str, Any]], list[str]]
    """What a person reads of these numbers."""


_SHEETS: dict[type, _Sheets] = {
    Attention: _Sheets(attention_pictures, attention_numbers, attention_lines),
    Magnitudes: _Sheets(magnitude_pictures, magnitude_numbers, magnitude_lines),
}


def write_explanation(explanation: Explanation, out: Path | None = None) -> dict[str, Any]:
    """Write the pictures and explain.json; returns what is in explain.json.

    `out` is a folder, RUN/explain/VIDEO-ID if it is not named; earlier pictures in it are written over.
    """
    folder = out or explanation.run / "explain" / folder_name(explanation.video_id)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _SHEETS[type(explanation.found)].pictures(explanation, explanation.found)
    paths = {name: folder / f"{name.replace('_', '-')}.png" for name in pictures}
    for name, picture in pictures.items():
        picture.save(paths[name])
    described = describe(explanation) | {"pictures": {name: str(path) for name, path in paths.items()}}
    (folder / "explain.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def print_explanation(explanation: Explanation, described: dict[str, Any]) -> None:
    """What a person reads of explain.json."""
    predicted = ", ".join(f"{one['class']} {percent(one['probability'])}" for one in described["predictions"])
    truth = f"  (ground truth {described['truth']})" if described["truth"] else ""
    found = _SHEETS[type(explanation.found)].lines(described)
    lines = [f"{described['video_id']}: {predicted}{truth}"]
    lines += [f"  {line}" for line in (*found, *described["pictures"].values())]
    for line in lines:
        console.out.print(line, markup=False, highlight=False, soft_wrap=True)
    for note in described["notes"]:
        console.err.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def folder_name(video_id: str) -> str:
    """A video id as the name of a folder: everything that is no letter, digit, "_", "-" or "." within is "_"."""
    return re.sub(r"[^\w.-]", "_", video_id).strip(".") or "_"


def describe(explanation: Explanation) -> dict[str, Any]:
    """The numbers of an explanation, in types that JSON has."""
    return {
        "run": str(explanation.run),
        "video_id": explanation.video_id,
        "split": explanation.split,
        "row": explanation.row,
        "truth": explanation.truth,
        "predictions": [{"class": name, "probability": p} for name, p in explanation.predictions],
        "frame_index": list(explanation.frame_index),
        "grid": list(explanation.tiling.grid),
        **_SHEETS[type(explanation.found)].numbers(explanation, explanation.found),
        "notes": list(explanation.notes),
    }
