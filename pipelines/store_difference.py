"""`vcache info A B`: why the features of two stores differ, and by how much on the videos that both hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from vcache.pipelines.console import count, out, print_sentence
from vcache.store.key import spec_difference
from vcache.store.layout import BFLOAT16, widened_bfloat16
from vcache.store.object_path import StorePath
from vcache.store.quantise import constant_names, dequantise, dequantise_tokens, scale_name, source_name
from vcache.store.reader import FeatureStore

RECORDS = ("frame_index", "crop", "flip", "pixel_index")
"""What was done to a video: compared as equal or not. All else is compared by its error."""


def compare_stores(first: StorePath, second: StorePath, *, max_videos: int = 32) -> dict[str, Any]:
    """The fields of the keys that differ, and the errors of view 0 of the common videos, by their ids.

    Args:
        max_videos: of each split; spread evenly over those that both stores hold.

    Returns:
        `key` of both; `spec` and `versions`, what differs as [field, first, second]; `splits`, the common videos and how many
        are compared; and `arrays`: by name the videos compared, those that are `equal`, and `relative`, which is
        ||first - second|| / ||second|| over all of them, with the video that is `worst` and its own.
        Records and arrays of other shapes have no error.
    """
    with FeatureStore.open(first) as a, FeatureStore.open(second) as b:
        arrays: dict[str, dict[str, Any]] = {}
        splits = {split: _compare_split(a, b, split, max_videos, arrays) for split in a.splits if split in b.splits}
        classes = [a.manifest.class_names, b.manifest.class_names]
        return {
            "stores": [str(first), str(second)],
            "key": [a.manifest.key, b.manifest.key],
            "spec": [list(one) for one in spec_difference(a.manifest.spec, b.manifest.spec)],
            "versions": [list(one) for one in spec_difference(a.manifest.versions, b.manifest.versions)],
            "same_classes": classes[0] == classes[1],
            "splits": splits,
            "arrays": {name: _summed(arrays[name]) for name in sorted(arrays)},
        }


def _compare_split(
    a: FeatureStore, b: FeatureStore, split: str, max_videos: int, arrays: dict[str, dict[str, Any]]
) -> dict[str, int]:
    ids = [store.videos(split).ids for store in (a, b)]
    rows = [{video: row for row, video in enumerate(those)} for those in ids]
    common = [video for video in ids[0] if video in rows[1]]
    chosen = (
        [common[i] for i in np.unique(np.linspace(0, len(common) - 1, max_videos).round().astype(int))]
        if common
        else []
    )
    for name in sorted(a.arrays(split).keys() & b.arrays(split).keys()):
        if source_name(name) != name:
            continue  # scales are compared with what they scale
        account = arrays.setdefault(
            name, {"videos": 0, "equal": 0, "error": 0.0, "norm": 0.0, "worst": None, "worst_relative": 0.0}
        )
        held = [store.committed_rows(split, [name]) for store in (a, b)]
        for video in chosen:
            if held[0][rows[0][video]] and held[1][rows[1][video]]:
                _account(
                    account,
                    name,
                    video,
                    *(_values(s, split, name, r[video]) for s, r in zip((a, b), rows, strict=True)),
                )
    return {"common": len(common), "compared": len(chosen)}


def _account(account: dict[str, Any], name: str, video: str, x: np.ndarray, y: np.ndarray) -> None:
    account["videos"] += 1
    account["equal"] += x.shape == y.shape and bool((x == y).all())
    if x.shape != y.shape:
        account["shapes"] = [list(x.shape), list(y.shape)]
    elif name not in RECORDS:
        error, norm = float(((x - y) ** 2).sum()), float((y**2).sum())
        account["error"], account["norm"] = account["error"] + error, account["norm"] + norm
        if norm and (own := (error / norm) ** 0.5) > account["worst_relative"]:
            account["worst"], account["worst_relative"] = video, own


def _summed(account: dict[str, Any]) -> dict[str, Any]:
    told = {name: account[name] for name in ("videos", "equal", "shapes") if name in account}
    if not account["norm"]:
        return told
    return told | {
        "relative": (account["error"] / account["norm"]) ** 0.5,
        "worst": account["worst"],
        "worst_relative": account["worst_relative"],
    }


def _values(store: FeatureStore, split: str, name: str, row: int) -> np.ndarray:
    """What is stored of a video as float64, int8 undone."""
    stored = store.read(split, name, [row])[0]
    spec = store.arrays(split)[name]
    if spec.dtype == BFLOAT16:
        stored = widened_bfloat16(stored)
    elif spec.dtype == "int8" and scale_name(name) in store.arrays(split):
        scale = store.read(split, scale_name(name), [row])[0]
        constants: Sequence[np.ndarray] = [store.constant(one) for one in constant_names(name)]
        stored = dequantise_tokens(stored, scale, *constants) if constants else dequantise(stored, scale)
    return np.asarray(stored, dtype=np.float64)


def print_difference(told: dict[str, Any]) -> None:
    one, other = told["key"]
    for letter, path, key in zip("AB", told["stores"], told["key"], strict=True):
        out.print(f"[bold]{letter}[/bold]  {escape(path)}  key {key}", soft_wrap=True, highlight=False)
    if told["spec"]:
        _print_fields("field of the key", told["spec"])
    if one == other:
        verdict = "The keys are equal: the features were made in the same way."
    else:
        fields = count(len(told["spec"]), "field")
        verdict = f"The keys differ in {fields}: a head that was trained on A is refused on B."
    print_sentence(out, verdict)
    if told["versions"]:
        _print_fields("written by (not in the key)", told["versions"])
    if not told["same_classes"]:
        print_sentence(out, "The classes differ, in their names or in their order.")
    videos = ", ".join(f"{split} {n['compared']} of {n['common']}" for split, n in told["splits"].items())
    print_sentence(out, f"Videos with the same id that are compared, view 0: {videos or 'no split in common'}.")
    if told["arrays"]:
        _print_arrays(told["arrays"])


def _print_fields(title: str, differences: Sequence[Sequence[Any]]) -> None:
    table = Table(title, "A", "B")
    for field, one, other in differences:
        table.add_row(escape(field), *(escape("-" if value is None else str(value)) for value in (one, other)))
    out.print(table)


def _print_arrays(arrays: dict[str, dict[str, Any]]) -> None:
    table = Table("array", "videos", "equal", "||A-B|| / ||B||", "worst")
    table.add_column("in video", overflow="fold")
    for name, told in arrays.items():
        if "shapes" in told:
            error = " and ".join(" x ".join(map(str, shape)) for shape in told["shapes"])
        else:
            error = f"{told['relative']:.1e}" if "relative" in told else ""
        worst = (f"{told['worst_relative']:.1e}", escape(told["worst"])) if told.get("worst") else ("", "")
        table.add_row(name, str(told["videos"]), str(told["equal"]), error, *worst)
    out.print(table)
