"""README.md of an exported folder, the model card: what it is, what it was trained on, how good it is, and how to use it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vcache.pipelines.evaluation.bootstrap import accuracy_intervals, precision_interval
from vcache.pipelines.evaluation.class_choice import TRAINED
from vcache.pipelines.evaluation.metrics import ScoresError, target_ranks
from vcache.pipelines.evaluation.predictions import Predictions, PredictionsError
from vcache.pipelines.prediction.export_files import Source, provenance
from vcache.pipelines.prediction.export_program import ProgramInput

_SHOWN = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class accuracy",
    "mean_average_precision": "mAP",
}
_MOST_CLASSES = 20
"""That are named in the card; classes.txt has all."""


def model_card(source: Source, name: str, programs: Mapping[str, Any]) -> str:
    """The text, in Markdown, for a folder of this name; `programs` are those that were compiled, with how they were checked."""
    parts = [
        f"# {name}",
        _what(source),
        "## How good it is",
        _accuracy(source),
        "## Use it",
        _usage(name, programs),
        "## How frames are chosen and prepared",
        _input(source),
        "## Licence",
        _licence(source),
        "## Where it comes from",
        _origin(source),
    ]
    return "\n\n".join(parts) + "\n"


def _what(source: Source) -> str:
    model, names = source.model, source.model.class_names
    shown = ", ".join(names[:_MOST_CLASSES]) + (", ..." if len(names) > _MOST_CLASSES else "")
    kind = "several classes of" if model.multi_label else "one class of"
    trained = source.run.config.get("num_train")
    videos = f"{trained} videos of " if trained else ""
    return (
        f"A video classifier: head `{model.name}` on the frozen image tower of `{model.extractor.backbone.facts.model}`. "
        f"It tells {kind} {len(names)} in a clip: {shown}.\n\n"
        + (
            f"The head was trained by `vcache train-head` on {videos}`{source.manifest.dataset}`"
            if not source.run.imported
            else "The head was imported by `vcache import-head` from an official checkpoint"
        )
        + f" ({source.which} weights). The backbone was not trained."
    )


def _accuracy(source: Source) -> str:
    if rows := list(_evaluated(source)):
        lines = ["| split | views | videos | metric | value | 95% interval |", "|---|---|---:|---|---:|---|", *rows]
        note = "Intervals are by bootstrap over the videos: they tell how far other videos of the same kind would move the value."
        return "\n".join(lines) + "\n\n" + note
    if last := _validated(source):
        return last
    return "Not measured: the run has no predictions. `vcache eval RUN` writes them; export again after it."


def _evaluated(source: Source) -> Iterator[str]:
    """Of the predictions that `vcache eval` wrote beside the run of these weights."""
    best = source.which == "best"
    for path in sorted((source.run.path / "predictions").glob("*.npz")):
        if ("best" in path.stem.split("-")) != best:
            continue
        try:
            predictions = Predictions.load(path)
            if predictions.targets is not None and predictions.of_classes in ("", TRAINED):
                yield from _rows(predictions)
        except (PredictionsError, ScoresError):
            continue


def _rows(predictions: Predictions) -> Iterator[str]:
    targets, metrics = predictions.target_tensor(), predictions.metrics()
    if targets.ndim == 2:
        intervals = precision_interval(predictions.scores, targets.numpy())
    else:
        ranks = target_ranks(torch.from_numpy(predictions.scores), targets).numpy()
        intervals = accuracy_intervals(ranks, targets.numpy())
    for name, interval in intervals.items():
        value = getattr(metrics, name)
        yield (
            f"| {predictions.split} | {predictions.views} | {len(predictions)} | {_SHOWN[name]} | {value:.1%} | "
            f"{interval.low:.1%} to {interval.high:.1%} |"
        )


def _validated(source: Source) -> str:
    """The epoch whose weights these are, of the run's own log."""
    log = [line for line in source.run.metrics() if line.get("val_loss") is not None]
    if not log:
        return ""
    chosen = next((line for line in reversed(log) if line.get("best")), log[-1]) if source.which == "best" else log[-1]
    values = [f"{shown} {chosen[f'val_{name}']:.1%}" for name, shown in _SHOWN.items() if chosen.get(f"val_{name}")]
    return (
        f"In validation after epoch {chosen['epoch'] + 1}: {', '.join(values)}. The same videos chose the weights, where they "
        "are those of the best epoch. There is no interval: `vcache eval RUN` writes predictions, and a card that is exported "
        "after it has them."
    )


def _usage(name: str, programs: Mapping[str, Any]) -> str:
    text = f"With vcache, on videos or folders of them:\n\n```sh\nvcache predict {name} my-video.mp4\n```"
    for file, checked in programs.items():
        runs = "onnxruntime" if file.endswith(".onnx") else "`torch.export.load`"
        text += (
            f"\n\n`{file}` has backbone and head as one program for {runs}, without vcache: uint8 frames "
            f"{_shape(checked['input'])} to logits. Its logits differ from those of vcache by at most "
            f"{checked['max_difference']:.1e} ({checked['num_clips']} clips of noise, on the CPU)."
        )
    return text


def _shape(shape: Sequence[int | None]) -> str:
    return f"({', '.join('clips' if length is None else str(length) for length in shape)})"


def _input(source: Source) -> str:
    extractor, taken = source.model.extractor, ProgramInput.of(source.model)
    told = {
        **extractor.sampling.to_dict(),
        "pixels_per_frame": taken.pixels_per_frame,
        "every": taken.every,
        **extractor.preprocessing.to_dict(),
    }
    return f"```json\n{json.dumps(told, indent=2)}\n```"


def _licence(source: Source) -> str:
    return (
        f"`backbone.safetensors` holds the weights of `{source.manifest.spec['model']}`, which have a licence of their own: that "
        "of whoever published them (OpenAI's CLIP: MIT; others are told with the checkpoint). It allows or forbids handing on "
        "this folder. vcache does not know it, and the data set that the head was trained on may set terms too."
    )


def _origin(source: Source) -> str:
    told = provenance(source)
    rows = {
        "run": told["run"]["name"],
        "store key": told["store"]["key"],
        "weights (sha256)": told["store"]["spec"]["weights_sha256"],
        "stored as": source.manifest.spec["dtype"],
        "decoder": told["store"]["spec"]["decoder"],
        "versions": told["versions"],
    }
    lines = [f"- {name}: {_inline(value)}" for name, value in rows.items()]
    return "\n".join(
        [*lines, "- `config.json` has all of it, and the sha256 of every file, which `vcache predict` checks"]
    )


def _inline(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else f"`{value}`"
