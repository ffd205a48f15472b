"""`--layers none`: stores of the embedding alone, which hold what stores with layers hold of it, and become such stores."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vcache.extract.backbone import BackboneFacts
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.fitting_store import NoFittingStore, find_store
from vcache.pipelines.matching import HeadStoreMismatch, match
from vcache.pipelines.plan import plan_extraction
from vcache.pipelines.request import ExtractionConfig, ExtractionError
from vcache.pipelines.setup import array_specs
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

MakeConfig = Callable[..., ExtractionConfig]
DieAfter = Callable[[pytest.MonkeyPatch, int], None]
Vcache = Callable[..., tuple[int, str, str]]
NONE = {"layers": "none", "cross_frame": "none"}
RECORDED = ("crop", "flip", "frame_index")
RECORD_BYTES = 4 * 4 + 1
"""Of crop and flip."""


def files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file of a store."""
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes()) for file in found}


def values(path: Path) -> dict[tuple[str, int, str], bytes]:
    """The bytes of every array, by split, view and name; a row without a commit record is an error."""
    with FeatureStore.open(path) as store:
        assert verify_store(store).ok
        places = [(split, view) for split in store.splits for view in store.views(split)]
        return {
            (split, view, name): store.read(split, name, np.arange(store.splits[split]), view=view).tobytes()
            for split, view in places
            for name in store.arrays(split, view)
        }


@pytest.mark.parametrize(
    "fields",
    [
        {"split": ("val",)},
        {"split": ("val",), "dtype": "int8"},
        {"dtype": "float16", "views": 2, "eval_views": "2x1"},
    ],
)
def test_the_embedding_is_that_of_a_store_with_layers_bit_for_bit(
    config: MakeConfig, tmp_path: Path, fields: dict[str, object]
) -> None:
    alone, whole = tmp_path / "alone.zarr", tmp_path / "whole.zarr"
    assert run_extraction(config(store=alone, **NONE, **fields)).layers == ()
    run_extraction(config(store=whole, **fields))
    beside_layers = values(whole)
    stored = values(alone)
    assert {name for _, _, name in stored} == {"embed", *RECORDED}
    assert {key[:2] for key in stored} == {key[:2] for key in beside_layers}
    assert stored.items() <= beside_layers.items()


def test_in_whatever_order_layers_come_the_store_ends_as_the_same(config: MakeConfig, tmp_path: Path) -> None:
    some, others = {"layers": "-1", "cross_frame": "none"}, {"layers": "0,2", "cross_frame": "qk"}
    ends = []
    for number, order in enumerate(((NONE, some, others), (others, NONE, some), (some, others, NONE))):
        path = tmp_path / f"{number}.zarr"
        for request in order:
            before = files(path)
            run_extraction(config(store=path, split=("val",), **request))
            kept = {name: content for name, content in before.items() if not name.endswith("zarr.json")}
            assert kept.items() <= files(path).items()  # nothing stored is rewritten
        ends.append(values(path))
    assert {name for _, _, name in ends[0]} >= {"embed", "tokens/0", "tokens/2", "cls/2", "q/0", "k/2"}
    assert all(end == ends[0] for end in ends[1:])


def test_a_store_with_layers_has_all_that_is_asked_for_without_them(config: MakeConfig) -> None:
    run_extraction(config())
    before = files(config().store)
    summary = run_extraction(config(**NONE))
    assert (summary.progress.videos_done, summary.progress.videos_skipped) == (0, 18)
    assert files(config().store) == before


def test_a_killed_run_goes_on_to_the_same_store(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: DieAfter
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    whole, killed = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    run_extraction(config(store=whole, **NONE))
    with monkeypatch.context() as patch:
        die_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_extraction(config(store=killed, **NONE))
    resumed = run_extraction(config(store=killed, **NONE))
    assert resumed.progress.videos_skipped == 4
    assert values(killed) == values(whole)


@pytest.mark.slow  # starts processes that load torch
def test_worker_processes_store_the_same(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode_processes: None
) -> None:
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 3)
    one, several = tmp_path / "one.zarr", tmp_path / "several.zarr"
    run_extraction(config(store=one, split=("val",), **NONE))
    run_extraction(config(store=several, split=("val",), workers=2, cluster_decode_workers=1, **NONE))
    assert values(several) == values(one)


def test_a_video_of_8_frames_of_vit_b16_takes_8_kilobytes(tiny_extraction: MakeConfig) -> None:
    tower = CLIP_TOWERS["ViT-B-16-quickgelu"]
    facts = BackboneFacts(
        model="ViT-B-16-quickgelu",
        num_layers=tower.num_layers,
        width=tower.width,
        num_heads=tower.num_heads,
        head_dim=64,
        patch_size=tower.patch_size,
        image_size=tower.image_size,
        grid=tower.grid,
        num_tokens=197,
        embed_dim=tower.embed_dim,
        layer_norm_eps=1e-5,
    )
    for dtype in ("float16", "int8"):
        specs = {spec.name: spec for spec in array_specs(facts, (), tiny_extraction(frames=8, dtype=dtype, **NONE))}
        assert specs["embed"].row_bytes == 8192 and set(specs) == {"embed", *RECORDED}
        assert sum(spec.row_bytes for spec in specs.values()) == 8192 + RECORD_BYTES + 8 * 4


def test_the_plan_has_its_bytes_and_one_row_a_dtype(config: MakeConfig) -> None:
    plan = plan_extraction(config(**NONE), seconds=None)
    assert {choice.cross_frame for choice in plan.choices} == {"none"} and plan.stores[0].layers == ()
    assert plan.asked.video_bytes == 5 * 20 * 4 + 5 * 4 + RECORD_BYTES  # 5 frames of 20 channels, and their index
    run_extraction(config(**NONE))
    shards = [file for file in config().store.rglob("view-0/**/c/**/*") if file.is_file()]
    assert (plan.asked.missing_files, plan.asked.missing_bytes) == (len(shards), sum(x.stat().st_size for x in shards))
    after = plan_extraction(config(**NONE), seconds=None).asked
    assert (after.missing_bytes, after.missing_videos) == (0, 0)


def test_the_commands_take_it_and_show_it(config: MakeConfig, vcache: Vcache, tmp_path: Path) -> None:
    made, path = config(), tmp_path / "home" / "alone.zarr"
    path.parent.mkdir()
    words = f"{made.dataset} --frames 5 --stride 3 --model {made.model} --device cpu --batch-size 3 --store {path}"
    status, printed, _ = vcache(f"plan {words} --layers none --quick")
    assert status == 0 and "no layers, the embedding alone" in printed
    assert vcache(f"extract {words} --layers none --views 2 --pixels 10")[0] == 0
    status, printed, _ = vcache(f"ls {path.parent} --json")
    assert [(row["layers"], row["cross_frame"]) for row in json.loads(printed)] == [([], "none")]
    assert "layers none" in vcache(f"ls {path.parent}")[1]
    with FeatureStore.open(path) as store:
        assert store.arrays("train", 1).keys() >= {"embed", "pixels"}
    arrays = json.loads(vcache(f"info {path} --json")[1])["splits"]["train"]["arrays"]
    assert arrays["embed"] == arrays["embed"] | {"stored": 12, "shape": [5, 20], "dtype": "float16"}
    assert vcache(f"extract {words} --layers -1: --cross-frame none --views 2 --pixels 10")[0] == 0
    with FeatureStore.open(path) as store:
        assert "tokens/2" in store.arrays("train", 1) and "q/2" not in store.arrays("train", 1)


def test_a_damaged_embedding_is_found_and_extracted_again(config: MakeConfig, vcache: Vcache) -> None:
    path = config().store
    run_extraction(config(**NONE))
    before = values(path)
    shard = next(file for file in (path / "val/view-0/embed").rglob("*") if file.is_file() and file.name != "zarr.json")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert vcache(f"verify {path}")[0] == 1
    assert vcache(f"repair {path}")[0] == 0
    assert values(path) == before
    assert vcache(f"verify {path} --deep")[0] == 0


@pytest.mark.parametrize("layers", ["none,3", "-1,none"])
def test_none_beside_layers_is_refused(config: MakeConfig, vcache: Vcache, layers: str) -> None:
    made = config()
    status, _, said = vcache(f"extract {made.dataset} --model {made.model} --store {made.store} --layers {layers}")
    assert status == 1 and f"layers '{layers}': 'none' is no layer at all. Say it alone" in " ".join(said.split())
    assert not made.store.exists()


@pytest.mark.parametrize("cross_frame", ["qk", "maps", "derive"])
def test_attention_between_frames_of_no_layer_is_refused(config: MakeConfig, vcache: Vcache, cross_frame: str) -> None:
    message = f"--cross-frame {cross_frame}: attention between frames is of layers, and --layers none keeps none"
    with pytest.raises(ExtractionError, match=message):
        config(layers="none", cross_frame=cross_frame)
    made = config()
    line = f"extract {made.dataset} --store {made.store} --layers none --cross-frame {cross_frame}"
    status, _, said = vcache(line)
    assert status == 1 and message in " ".join(said.split())


def test_a_head_is_told_the_line_that_adds_what_it_reads(config: MakeConfig) -> None:
    run_extraction(config(**NONE))
    with FeatureStore.open(config().store) as store:
        assert match("made-up", HeadRequirements(embed=True), store, store.splits).arrays == ("embed",)
        with pytest.raises(HeadStoreMismatch) as refused:
            match("made-up", HeadRequirements(cls=(-1,)), store, store.splits)
        assert "holds the embedding.\nExtract the rest with:  vcache extract " in str(refused.value)
        assert " --layers 2: " in str(refused.value) and "--cross-frame none" in str(refused.value)
        with pytest.raises(HeadStoreMismatch) as refused:  # another number of frames is another store
            match("made-up", HeadRequirements(embed=True, num_frames=7), store, store.splits)
        assert " --layers none " in str(refused.value) and "--cross-frame" not in str(refused.value)


@pytest.mark.parametrize(("head", "layers"), [("text4vis", "none"), ("actionclip", "none"), ("linear", "-4:")])
def test_where_there_is_no_store_the_line_makes_what_the_head_reads(head: str, layers: str) -> None:
    with pytest.raises(NoFittingStore, match=f"vcache extract DATASET --layers {layers} "):
        find_store(head, {}, "train")
