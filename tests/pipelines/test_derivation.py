"""Stored Q/K, stored maps and derived ones are three ways to the same head, and the store says what it needs for each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vcache.heads.registry import get_head
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config, match
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.upkeep.store_listing import describe_folder
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

MakeConfig = Callable[..., ExtractionConfig]


def evl_logits(store: FeatureStore, layers: str) -> tuple[torch.Tensor, ReadPlan]:
    torch.manual_seed(3)
    config = build_head_config("evl", {"layers": layers}, store.manifest)
    head = get_head("evl")(config).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plan = match("evl", head.requires(config), store, store.manifest.splits)
    with torch.no_grad():
        batches = ClipLoader(store, "val", plan, batch_size=4, device=torch.device("cpu")).in_order()
        return torch.cat([head(batch.features()) for batch in batches]), plan


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 1.6e-2), ("int8", 1.6e-2)]
)
def test_three_ways_to_the_same_logits_from_the_first_block_to_the_last(
    config: MakeConfig, tmp_path: Path, dtype: str, bound: float
) -> None:
    """Relative to the largest logit. Block 0 has no tokens before it: what enters it is an array of its own."""
    logits = {}
    for way in ("qk", "maps", "derive"):
        run_extraction(config(layers="all", cross_frame=way, dtype=dtype, store=tmp_path / f"{way}.zarr"))
        with FeatureStore.open(tmp_path / f"{way}.zarr") as store:
            logits[way], plan = evl_logits(store, "all")
            assert plan.maps_from == way
    assert plan.features == ("tokens/0", "tokens/1", "tokens/2", "block_input/0")
    for way in ("maps", "derive"):
        assert (logits[way] - logits["qk"]).abs().max() <= bound * logits["qk"].abs().max(), way


def test_derivation_stores_one_array_per_layer_and_one_more_and_the_weights_once(
    config: MakeConfig, tmp_path: Path
) -> None:
    made = config(cross_frame="derive")
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        assert {name for name in store.arrays("train") if name[0] in "tqkmb"} == {"tokens/0", "tokens/1", "tokens/2"}
        assert "cls/0" not in store.arrays("train")
        assert sorted({name.rsplit("/", 1)[0] for name in store.manifest.constants}) == ["blocks/1", "blocks/2"]
        assert verify_store(store).ok
    assert describe_folder(tmp_path)[0]["cross_frame"] == "derive"


def test_a_store_that_derives_is_completed_by_deriving(config: MakeConfig) -> None:
    made = config(layers="-1", cross_frame="derive")
    run_extraction(made)
    with (
        FeatureStore.open(made.store) as store,
        pytest.raises(HeadStoreMismatch, match="--cross-frame derive") as error,
    ):
        evl_logits(store, "-2:")
    assert "--layers 1:" in str(error.value)
    run_extraction(config(layers="1:", cross_frame="derive"))
    with FeatureStore.open(made.store) as store:
        assert evl_logits(store, "-2:")[1].maps_from == "derive"


def test_queries_and_keys_can_be_added_to_a_store_that_derives(config: MakeConfig) -> None:
    run_extraction(config(cross_frame="derive"))
    with FeatureStore.open(config().store) as store:
        derived, _ = evl_logits(store, "-2:")
    run_extraction(config(cross_frame="qk"))
    with FeatureStore.open(config().store) as store:
        stored, plan = evl_logits(store, "-2:")
    assert plan.maps_from == "qk"
    torch.testing.assert_close(derived, stored, rtol=1e-5, atol=1e-5)
