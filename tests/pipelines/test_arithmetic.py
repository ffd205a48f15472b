"""--precision and --decoder: what they change, that a store keeps them, and that they are part of its key."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig, ExtractionError
from vcache.store.errors import StoreKeyMismatch
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]
RunCommand = Callable[[str], tuple[int, str, str]]
BOUND = {"float16": 2e-3, "bfloat16": 2e-2}


def read(path: Path, name: str) -> np.ndarray:
    with FeatureStore.open(path) as store:
        return store.read("train", name, np.arange(store.splits["train"]))


@pytest.mark.parametrize("precision", BOUND)
def test_half_precision_stores_what_float32_does_within_its_roundings(
    precision: str, config: MakeConfig, float32_store: Path
) -> None:
    made = config(precision=precision)
    run_extraction(made)
    for name in ("tokens/2", "q/1", "embed"):
        whole, half = read(float32_store, name).astype(float), read(made.store, name).astype(float)
        assert 0 < np.linalg.norm(half - whole) / np.linalg.norm(whole) < BOUND[precision]


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_half_precision_goes_with_every_dtype(dtype: str, config: MakeConfig) -> None:
    made = config(precision="bfloat16", dtype=dtype, max_error=0.2)
    assert run_extraction(made).failures == ()


def test_a_store_keeps_its_precision_unless_another_is_asked_for(config: MakeConfig) -> None:
    made = config(precision="bfloat16", layers="2")
    run_extraction(made)
    more = config(layers="1:")
    assert more.precision == "auto"

    run_extraction(more)

    with FeatureStore.open(made.store) as store:
        assert store.manifest.spec["precision"] == "bfloat16"
        assert "tokens/1" in store.arrays("train")
    with pytest.raises(StoreKeyMismatch, match="precision: stored 'bfloat16', asked for nothing"):
        run_extraction(config(precision="float32"))


def test_verify_deep_and_repair_compute_in_the_precision_of_the_store(config: MakeConfig, vcache: RunCommand) -> None:
    made = config(precision="float16")
    run_extraction(made)
    shard = made.store / "train" / "view-0" / "tokens" / "2" / "c" / "0" / "0" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])

    assert vcache(f"repair {made.store}")[0] == 0

    assert shard.read_bytes() == whole
    assert vcache(f"verify {made.store} --deep --sample 3")[0] == 0


def test_decord_gives_the_frames_of_pyav_under_another_key(config: MakeConfig, float32_store: Path) -> None:
    pytest.importorskip("decord")
    made = config(decoder="decord")
    run_extraction(made)
    with FeatureStore.open(made.store) as store, FeatureStore.open(float32_store) as other:
        assert store.manifest.spec["decoder"]["decoder"] == "decord"
        assert store.manifest.facts["request"]["decoder"] == "decord"
        assert store.manifest.key != other.manifest.key
    np.testing.assert_array_equal(read(made.store, "frame_index"), read(float32_store, "frame_index"))
    np.testing.assert_allclose(read(made.store, "embed"), read(float32_store, "embed"), atol=0.02)


def test_an_unknown_decoder_or_precision_is_refused_with_those_that_there_are(config: MakeConfig) -> None:
    with pytest.raises(ExtractionError, match="--decoder 'opencv': there are decord, images, pyav, torchcodec"):
        config(decoder="opencv")
    with pytest.raises(ExtractionError, match="--precision 'half': there are auto, float32, float16, bfloat16"):
        config(precision="half")
