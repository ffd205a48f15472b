"""The key depends on what a spec says and on nothing else, and a mismatch is spelled out."""

from pathlib import Path

import pytest

from vcache.store.errors import StoreKeyMismatch
from vcache.store.key import cache_key, canonical_json, spec_difference
from vcache.store.reader import FeatureStore

SPEC = {"model": "ViT-B-16", "mean": (0.5, 0.25), "sampling": {"frames": 8, "stride": 16}, "note": None}


def test_the_key_of_a_spec_never_changes():  # a changed key would orphan every store there is
    assert cache_key(SPEC) == "55d96b21021d5137"


def test_the_order_of_the_fields_and_the_kind_of_sequence_do_not_matter():
    turned = {"note": None, "sampling": {"stride": 16, "frames": 8}, "mean": [0.5, 0.25], "model": "ViT-B-16"}
    assert cache_key(turned) == cache_key(SPEC)
    assert spec_difference(turned, SPEC) == []


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (SPEC | {"model": "ViT-L-14"}, ("model", "ViT-B-16", "ViT-L-14")),
        (SPEC | {"sampling": {"frames": 8, "stride": 8}}, ("sampling.stride", 16, 8)),
        (SPEC | {"sampling": {"frames": 8}}, ("sampling.stride", 16, None)),
        (SPEC | {"mean": (0.25, 0.5)}, ("mean", [0.5, 0.25], [0.25, 0.5])),
        (SPEC | {"sampling": {"frames": 8.0, "stride": 16}}, ("sampling.frames", 8, 8.0)),
        (SPEC | {"note": True}, ("note", None, True)),
        (SPEC | {"crop": {}}, ("crop", None, {})),
        (SPEC | {"crop": None}, ("crop", None, None)),
        ({name: SPEC[name] for name in ("model", "mean", "sampling")}, ("note", None, None)),
    ],
)
def test_every_change_changes_the_key_and_is_named(changed, difference):
    assert cache_key(changed) != cache_key(SPEC)
    assert spec_difference(SPEC, changed) == [difference]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"a": {"b": Path("x")}}, r"a\.b: .* is not a string, finite number"),
        ({"a": [1, float("nan")]}, r"a\[1\]: nan \(float\)"),
        ({"a": {1: 2}}, "a: key 1 is not a string"),
    ],
)
def test_what_json_cannot_hold_exactly_has_no_key(spec, words):
    with pytest.raises(TypeError, match=words):
        canonical_json(spec)


def test_a_store_of_another_key_is_refused_with_the_fields_that_differ(world, tmp_path):
    store = world.create(tmp_path / "s.zarr")
    store.check_key(store.manifest.key, store.manifest.spec)
    asked = store.manifest.spec | {"crop": {"size": 336}}
    with pytest.raises(StoreKeyMismatch) as caught, FeatureStore.open(tmp_path / "s.zarr") as opened:
        opened.check_key(cache_key(asked), asked)
    assert caught.value.differences == [("crop.size", 224, 336)]
    assert "  crop.size: stored 224, asked for 336\n" in str(caught.value)
