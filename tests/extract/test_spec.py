"""The spec holds what changes a value, as plain JSON values."""

import dataclasses
import json
from typing import Any

import pytest

from vcache.extract.spec import ExtractionSpec


def make_spec(**fields: Any) -> ExtractionSpec:
    defaults: dict[str, Any] = {
        "model": "ViT-B-16-quickgelu",
        "weights_sha256": "ab" * 32,
        "preprocessing": {"image_size": 224, "mean": (0.5, 0.4, 0.3)},
        "sampling": {"rule": "strided", "num_frames": 8, "stride_frames": 16},
        "view": {"crop": "centre", "flip": False},
        "decoder": {"av": "16.0.1"},
        "versions": {"torch": "2.9.0"},
        "dtype": "float16",
    }
    return ExtractionSpec(**{**defaults, **fields})


def test_a_spec_is_the_same_after_a_trip_through_json() -> None:
    told = make_spec().to_dict()
    assert json.loads(json.dumps(told)) == told
    assert ExtractionSpec(**told).to_dict() == told
    assert told["preprocessing"]["mean"] == [0.5, 0.4, 0.3]


def test_every_field_is_told_and_changes_what_is_told() -> None:
    told = make_spec(precision="bfloat16").to_dict()
    assert set(told) == {field.name for field in dataclasses.fields(ExtractionSpec)}
    others = {"model": "ViT-L-14", "weights_sha256": "cd" * 32, "dtype": "float32", "precision": "float16"}
    for name in told:
        assert make_spec(**{"precision": "bfloat16", name: others.get(name, {"other": "1"})}).to_dict() != told


def test_full_precision_is_not_told_so_that_older_stores_keep_their_key() -> None:
    assert "precision" not in make_spec().to_dict()
    assert make_spec(precision="float32").to_dict() == make_spec().to_dict()


def test_no_batch_size_layer_or_path_is_told() -> None:
    names = {field.name for field in dataclasses.fields(ExtractionSpec)}
    assert not names & {"layers", "batch_size", "workers", "path", "device", "dataset"}


def test_changing_the_told_dict_does_not_change_the_spec() -> None:
    spec = make_spec()
    spec.to_dict()["view"]["flip"] = True
    assert spec.view == {"crop": "centre", "flip": False}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.model = "another"  # type: ignore[misc]


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype \('float8'\) must be one of float16, bfloat16, float32, int8"):
        make_spec(dtype="float8")
    with pytest.raises(ValueError, match=r"precision \('tf32'\) must be one of float32, float16, bfloat16"):
        make_spec(precision="tf32")


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object()])
def test_what_json_cannot_hold_is_refused_when_the_spec_is_made(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        make_spec(view={"crop": value})
