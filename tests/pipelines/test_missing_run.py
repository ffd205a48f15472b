"""Where a run was named and none is, the error says what lies there, what lies near, and what to do."""

import re
from pathlib import Path

import pytest

from vcache.pipelines.runs import Run, RunError


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("runs/evl-9", "it is not there. There are: .*runs/evl-1, .*runs/linear-1."),
        ("nowhere/evl-1", "it is not there. Find yours with:  vcache ls --runs"),
        ("runs/linear-1/config.json", "it is a file"),
        ("my.zarr", r"it is a store. Train a head on it with:  vcache train-head HEAD --store .*my\.zarr"),
        ("runs", "it holds 2 runs. Name one of them, as in:  .*runs/evl-1"),
        ("empty", "it has no config.json"),
    ],
)
def test_what_is_no_run_is_told_with_what_is_there(named: str, words: str, tmp_path: Path) -> None:
    for folder in ("runs/linear-1", "runs/evl-1", "my.zarr", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("runs/linear-1/config.json", "runs/evl-1/config.json", "my.zarr/zarr.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(RunError, match=f"^{re.escape(str(tmp_path / named))} is not a run folder: {words}"):
        Run.open(tmp_path / named)
