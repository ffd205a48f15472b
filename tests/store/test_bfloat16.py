"""bfloat16 arrays: bits that every Zarr reader opens as uint16, and an attribute that says what they are."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

from vcache.store.errors import CorruptStore, NotFinite
from vcache.store.layout import widened_bfloat16
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import ShardWriter, declare_arrays

NAN, INFINITY = 0xFFC0, 0x7F80


@pytest.fixture
def spec(world):
    return replace(world.tokens, dtype="bfloat16")


def bits(spec, row):
    values = torch.from_numpy(np.random.default_rng(row).normal(size=spec.shape))
    return values.to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.fixture
def store(world, spec, tmp_path):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", [spec])
    for shard in range(store.num_shards("train")):
        with ShardWriter(store, "train", shard, [spec]) as writer:
            for row in store.shard_rows("train", shard):
                writer.write(row, {spec.name: bits(spec, row)})
    return store


def metadata_path(store, spec):
    return store.path / "train" / "view-0" / spec.name / "zarr.json"


def test_the_bits_come_back_and_the_array_says_what_they_are(store, spec):
    with FeatureStore.open(store.path) as opened:
        assert opened.arrays("train")[spec.name] == spec
        got = opened.read("train", spec.name, [4, 1], frames=[2, 0])
    np.testing.assert_array_equal(got, np.stack([bits(spec, 4), bits(spec, 1)])[:, [2, 0]])
    assert got.dtype == np.uint16


def test_zarr_python_opens_it_and_two_lines_widen_it(store, spec):
    array = zarr.open_group(str(store.path), mode="r")[f"train/view-0/{spec.name}"]
    assert array.attrs["vcache_dtype"] == "bfloat16"
    values = (array[3].astype("uint32") << 16).view("float32")
    np.testing.assert_array_equal(values, torch.from_numpy(bits(spec, 3)).view(torch.bfloat16).float().numpy())
    np.testing.assert_array_equal(values, widened_bfloat16(bits(spec, 3)))


@pytest.mark.parametrize(("bad", "shown"), [(NAN, "nan"), (INFINITY, "inf")])
def test_what_is_not_finite_is_refused_at_writing(world, spec, tmp_path, bad, shown):
    store = world.create(tmp_path / "s.zarr")
    declare_arrays(store, "train", [spec])
    values = bits(spec, 0)
    values[1, 2, 3] = bad
    with (
        pytest.raises(NotFinite, match=rf"holds 1 values that are not finite, the first is {shown} at \(1, 2, 3\)"),
        ShardWriter(store, "train", 0, [spec]) as writer,
    ):
        writer.write(0, {spec.name: values})


def test_verify_passes_it_and_finds_what_is_not_finite(store, spec, monkeypatch):
    assert verify_store(store).ok
    monkeypatch.setattr("vcache.store.writer.check_array", lambda *_: None)
    other = replace(spec, name="tokens/9")
    declare_arrays(store, "train", [other])
    values = bits(spec, 0)
    values[3, 0, 1] = NAN
    with ShardWriter(store, "train", 2, [other]) as writer:
        writer.write(6, {other.name: values})
    (finding,) = verify_store(store).findings
    assert (finding.kind, finding.array, finding.rows) == ("not_finite", "tokens/9", (6,))


def test_a_lost_attribute_is_damage_and_a_remark_is_not(store, spec):
    path = metadata_path(store, spec)
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document | {"attributes": document["attributes"] | {"remark": "mine"}}))
    assert verify_store(store).ok
    path.write_text(json.dumps(document | {"attributes": {}}))
    (finding,) = verify_store(store).findings
    assert (finding.kind, finding.array) == ("metadata", spec.name)
    with FeatureStore.open(store.path) as opened, pytest.raises(CorruptStore, match="metadata was changed"):
        opened.read("train", spec.name, [0])
