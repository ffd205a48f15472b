"""`vcache info A B`: what differs in the keys, and the errors of what both stores hold."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.store_difference import compare_stores
from vcache.store.reader import FeatureStore

Vcache = Callable[..., tuple[int, str, str]]


@pytest.fixture
def other(config: Callable[..., ExtractionConfig]) -> Callable[..., Path]:
    def make(**fields: object) -> Path:
        run_extraction(made := config(layers="2", **fields))
        assert made.store is not None
        return Path(str(made.store))

    return make


def test_a_store_does_not_differ_from_itself(float32_store: Path) -> None:
    told = compare_stores(float32_store, float32_store, max_videos=100)
    assert told["key"][0] == told["key"][1] and told["spec"] == [] and told["same_classes"]
    assert told["splits"] == {"train": {"common": 12, "compared": 12}, "val": {"common": 6, "compared": 6}}
    assert {"tokens/2", "frame_index", "crop"} < told["arrays"].keys()
    assert all(array["equal"] == array["videos"] == 18 for array in told["arrays"].values())


def test_int8_is_undone_and_its_error_is_that_of_the_values(float32_store: Path, other: Callable[..., Path]) -> None:
    told = compare_stores(float32_store, other(dtype="int8", max_error=1.0), max_videos=100)
    assert [field for field, *_ in told["spec"]] == ["dtype"]
    assert 1e-4 < told["arrays"]["tokens/2"]["relative"] < 0.02
    assert told["arrays"]["frame_index"] == {"videos": 18, "equal": 18}
    assert "tokens_scale/2" not in told["arrays"]


def test_other_frames_are_told_by_field_record_and_error(float32_store: Path, other: Callable[..., Path]) -> None:
    path = other(stride=2)
    told = compare_stores(float32_store, path, max_videos=100)
    assert told["spec"] == [["sampling.stride_frames", 3, 2]]
    assert told["arrays"]["frame_index"]["equal"] < 18  # a video of one frame has the same
    with FeatureStore.open(float32_store) as a, FeatureStore.open(path) as b:
        pairs = [
            [s.read(split, "embed", np.arange(s.splits[split])).astype(float) for s in (a, b)] for split in a.splits
        ]
        x, y = (np.concatenate(each) for each in zip(*pairs, strict=True))
    assert told["arrays"]["embed"]["relative"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y))
    own = np.sqrt(((x - y) ** 2).sum((1, 2)) / (y**2).sum((1, 2)))
    assert told["arrays"]["embed"]["worst_relative"] == pytest.approx(own.max())


def test_the_command_says_it_in_words_and_as_json(
    float32_store: Path, other: Callable[..., Path], vcache: Vcache
) -> None:
    path = other(frames=3)
    status, words, _ = vcache(f"info {float32_store} {path} --videos 2", columns=80)
    assert status == 0 and "sampling.num_frames" in words and "differ in 1 field" in words
    assert "2 of 12" in words and "5 x 48 and 3 x 48" in words
    status, text, _ = vcache(f"info {float32_store} {path} --json")
    assert json.loads(text)["arrays"]["cls/2"]["shapes"] == [[5, 48], [3, 48]]
    status, _, error = vcache(f"info {float32_store} {path}x")
    assert status == 1 and "there is no store" in error
