"""CKA with CLIP as a chart over the layers, as numbers and on the screen."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from vcache.pipelines import console
from vcache.pipelines.clip_similarity import Similarity
from vcache.pipelines.line_chart import BLUE, RED, Line, line_chart

_SERIES = {"integrated": RED, "temporal": BLUE}


def write_similarity(similarity: Similarity, out: Path | None = None) -> dict[str, Any]:
    """Write the chart, RUN/cka.png if it is not named, and the numbers beside it as JSON; returns these."""
    picture = out or Path(similarity.run) / "cka.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    described = asdict(similarity) | {"picture": str(picture)}
    described = json.loads(json.dumps(described))  # as it is read: tuples are lists
    chart(similarity).save(picture)
    picture.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def print_similarity(described: dict[str, Any]) -> None:
    """What a person reads of these numbers."""
    console.out.print(f"linear CKA of {described['head']}'s features with CLIP's", markup=False, highlight=False)
    table = Table(box=None)
    for column in ("layer", *_SERIES):
        table.add_column(column, justify="right")
    for one in described["layers"]:
        table.add_row(str(one["layer"]), *("-" if one[name] is None else f"{one[name]:.3f}" for name in _SERIES))
    console.out.print(table)
    console.out.print(f"  {_examples(described)}", soft_wrap=True, markup=False, highlight=False)
    console.out.print(f"  {described['picture']}", soft_wrap=True, markup=False, highlight=False)
    for note in described["notes"]:
        console.err.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)


def chart(similarity: Similarity) -> Image.Image:
    """A line for each kind of features over the layers, from 0 to 1 (figure 5a of DiST)."""
    lines = [
        Line(name=name, colour=colour, values=[getattr(one, name) for one in similarity.layers])
        for name, colour in _SERIES.items()
    ]
    return line_chart(
        f"Linear CKA of the features of {similarity.head} with those of CLIP",
        f"{similarity.run}: {_examples(asdict(similarity))}",
        [str(one.layer) for one in similarity.layers],
        "layer of the backbone",
        lines,
    )


def _examples(described: dict[str, Any]) -> str:
    videos = console.count(described["num_videos"], "video")
    examples = {"patch": "patches", "frame": "means of frames", "clip": "means of clips"}[described["level"]]
    return f"{described['num_examples']:,} {examples} of {videos} of {described['split']}"
