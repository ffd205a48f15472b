"""Constants: all or none, noticed when damaged, readable by other Zarr libraries."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from vcache.store.constants import Constant, write_constants
from vcache.store.errors import ArrayNotFound, CorruptStore, StoreExists
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

MEAN = Constant(("channel",), np.linspace(-1, 1, 6, dtype=np.float32))
WEIGHT = Constant(("feature", "channel"), np.arange(12, dtype=np.float32).reshape(2, 6))


@pytest.fixture
def store(world, tmp_path) -> FeatureStore:
    store = world.build(tmp_path / "s.zarr")
    write_constants(store, {"tokens_mean/8": MEAN, "blocks/8/in_proj_weight": WEIGHT})
    return store


def test_constants_come_back_here_and_in_zarr(store):
    for name, constant in (("tokens_mean/8", MEAN), ("blocks/8/in_proj_weight", WEIGHT)):
        np.testing.assert_array_equal(store.constant(name), constant.values)
        np.testing.assert_array_equal(FeatureStore.open(store.path).constant(name), constant.values)
        array = zarr.open_group(str(store.path), mode="r")[f"constants/{name}"]
        np.testing.assert_array_equal(array[...], constant.values)
        assert array.metadata.dimension_names == constant.dims
    assert verify_store(store).ok and not verify_store(store).notes


def test_an_unknown_constant_names_those_there_are(store):
    with pytest.raises(ArrayNotFound, match=r"no constant 'tokens_std/8' .* there are: .*tokens_mean/8"):
        store.constant("tokens_std/8")


def test_the_same_again_changes_nothing_and_other_values_are_refused(store, world):
    before = world.tree(store.path)
    write_constants(store, {"tokens_mean/8": MEAN})
    with pytest.raises(StoreExists, match="other values of tokens_mean/8"):
        write_constants(store, {"tokens_mean/8": Constant(("channel",), MEAN.values + 1), "new": MEAN})
    assert world.tree(store.path) == before


def test_what_a_killed_writer_left_is_not_there_and_is_replaced(store, world):
    half = store.path / "constants/tokens_std/8"
    shutil.copytree(store.path / "constants/tokens_mean", half.parent)
    store.refresh()
    with pytest.raises(ArrayNotFound):
        store.constant("tokens_std/8")
    write_constants(store, {"tokens_std/8": Constant(("channel",), np.full(6, 2, dtype=np.float32))})
    np.testing.assert_array_equal(store.constant("tokens_std/8"), 2)


def files_of(constant: Path) -> list[Path]:
    return sorted(path for path in constant.rglob("*") if path.is_file())


def test_every_flipped_byte_is_found_by_reading_or_by_verify(store):
    folder = store.path / "constants/tokens_mean/8"
    for path in files_of(folder):
        sound = path.read_bytes()
        for position in range(len(sound)):
            path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            try:
                np.testing.assert_array_equal(FeatureStore.open(store.path).constant("tokens_mean/8"), MEAN.values)
            except CorruptStore as error:
                assert str(folder) in str(error)
        path.write_bytes(sound)
    assert len(files_of(folder)) == 2


def test_a_constant_that_is_gone_is_found_and_written_anew(store, world):
    before = world.tree(store.path)
    shutil.rmtree(store.path / "constants/tokens_mean/8")
    store.refresh()
    with pytest.raises(CorruptStore, match="tokens_mean/8 is damaged"):
        store.constant("tokens_mean/8")
    (finding,) = verify_store(store).findings
    assert finding.kind == "constant" and finding.array == "tokens_mean/8"
    write_constants(store, {"tokens_mean/8": MEAN})
    assert world.tree(store.path) == before


def test_values_and_axes_must_make_sense():
    with pytest.raises(ValueError, match="cannot have the axes"):
        Constant(("channel",), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="finite"):
        Constant(("channel",), np.array([1, np.nan]))
