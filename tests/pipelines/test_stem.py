"""`--layers stem`: what leaves ln_pre and enters block 0 is stored, extended, checked, mended and read like any layer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import zarr

from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.explained_clip import clip_features, read_arrays
from vcache.pipelines.extract_commands import describe_arrays, layers_word
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.fitting_store import NoFittingStore, find_store
from vcache.pipelines.frozen_tail import tail_of_store
from vcache.pipelines.growth import videos_of
from vcache.pipelines.loading import batch
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import HeadStoreMismatch, match
from vcache.pipelines.plan import plan_extraction
from vcache.pipelines.reextraction import Reextraction
from vcache.pipelines.request import ExtractionConfig, ExtractionError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.preparation import prepare_head
from vcache.pipelines.training.sweep_plan import demand_of
from vcache.pipelines.training.train_head import train_head
from vcache.store.quantise import dequantise_tokens
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

MakeConfig = Callable[..., ExtractionConfig]
Vcache = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
STEM = "block_input/0"
NEEDS = HeadRequirements(stem=True)
NUM_BLOCKS, FRAMES, TOKENS, WIDTH = 3, 5, 17, 48


def files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file of a store, but the metadata that say what is there."""
    found = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "zarr.json")
    return {str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes()) for file in found}


def values(path: Path) -> dict[str, bytes]:
    """The bytes of every array of the split val."""
    with FeatureStore.open(path) as store:
        assert verify_store(store).ok
        rows = range(store.splits["val"])
        return {name: store.read("val", name, rows).tobytes() for name in store.arrays("val")}


def read(store: FeatureStore, needs: HeadRequirements = NEEDS, split: str = "val", **options: Any) -> torch.Tensor:
    """The stem as a head gets it, of all videos."""
    plan = match("made-up", needs, store, [split], frame_step=options.pop("frame_step", 1))
    loader = ClipLoader(store, split, plan, batch_size=4, device=CPU, **options)
    found = [one.features().stem for one in loader.in_order()]
    return torch.cat([stem for stem in found if stem is not None])


@pytest.fixture(scope="module")
def stem_store(tiny_extraction: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stem and layer 2 in float32, and the pixels that the backbone saw; read only."""
    path = tmp_path_factory.mktemp("store") / "stem.zarr"
    fields: dict[str, Any] = {"layers": "stem,-1:", "cross_frame": "none", "pixels": FRAMES}
    run_extraction(tiny_extraction(store=path, **fields))
    return path


@pytest.fixture(scope="module")
def int8_stem(tiny_extraction: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same stem in int8; read only."""
    path = tmp_path_factory.mktemp("store") / "int8.zarr"
    run_extraction(tiny_extraction(store=path, layers="stem", dtype="int8"))
    return path


def test_the_stem_is_what_open_clips_own_tower_puts_out_of_ln_pre(stem_store: Path, tiny_clip: Path) -> None:
    """Read by zarr-python, and made once more of the stored pixels by open_clip alone."""
    group = zarr.open_group(stem_store, mode="r")["val/view-0"]
    assert isinstance(group, zarr.Group)
    stem, pixels, embed = (np.asarray(group[name][:]) for name in (STEM, "pixels", "embed"))  # type: ignore[index]
    assert stem.shape == (6, FRAMES, TOKENS, WIDTH) and stem.dtype == np.float32
    assert group[STEM].metadata.dimension_names == ("video", "frame", "token", "channel")  # type: ignore[union-attr]
    visual = open_clip.create_model(f"local-dir:{tiny_clip}").visual.eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)))
    images = (torch.from_numpy(pixels).flatten(0, 1).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        expected = visual._embeds(images)
        whole = visual(images)
    torch.testing.assert_close(torch.from_numpy(stem).flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(embed).flatten(0, 1), whole, rtol=1e-5, atol=1e-5)


def test_all_blocks_run_on_the_stem_give_the_stored_embedding(stem_store: Path) -> None:
    with FeatureStore.open(stem_store) as store:
        tail = tail_of_store(store, NUM_BLOCKS, "float32", CPU)
        embed = torch.from_numpy(store.read("val", "embed", range(6)))
        torch.testing.assert_close(tail.embed(read(store), NUM_BLOCKS), embed, rtol=1e-5, atol=1e-5)


def test_int8_loses_of_the_stem_what_was_measured(stem_store: Path, int8_stem: Path) -> None:
    with FeatureStore.open(stem_store) as store:
        exact = read(store, split="train")
    with FeatureStore.open(int8_stem) as store:
        assert store.arrays("train")[STEM].dtype == "int8" and "tokens/0" not in store.arrays("train")
        back, measured = read(store, split="train"), store.manifest.facts["errors"][STEM]
        stored, scale = (store.read("train", name, range(12)) for name in (STEM, "block_input_scale/0"))
        mean, std = (store.constant(f"block_input_{name}/0") for name in ("mean", "std"))
    error, size = ((x / torch.tensor(std)).norm() for x in (back - exact, exact))
    assert 0 < measured["relative_standardised"] < 0.02
    assert error / size < 1.2 * measured["relative_standardised"]
    by_hand = torch.from_numpy(dequantise_tokens(stored, scale, mean, std))
    torch.testing.assert_close(back, by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_whenever_the_stem_comes_nothing_is_rewritten_and_the_store_ends_as_the_same(
    config: MakeConfig, tmp_path: Path, dtype: str
) -> None:
    ends = []
    for number, order in enumerate((("stem", "-1"), ("-1", "stem"), ("stem,-1",))):
        path = tmp_path / f"{number}.zarr"
        for layers in order:
            asked = config(store=path, split=("val",), layers=layers, dtype=dtype)
            before, planned = files(path), plan_extraction(asked, seconds=None).asked
            summary = run_extraction(asked)
            assert (summary.stem, summary.layers) == ("stem" in layers, (2,) if "-1" in layers else ())
            after = files(path)
            assert before.items() <= after.items()
            shards = [name for name in after.keys() - before.keys() if name.startswith("val/view-0/")]
            assert planned.missing_files == len(shards)
        ends.append(values(path))
    expected = {STEM, "embed", "tokens/2", "cls/2", "q/2", "k/2", "crop", "flip", "frame_index"}
    scales = {"block_input_scale/0", "tokens_scale/2", "q_scale/2", "k_scale/2"}
    assert ends[0].keys() == expected | (scales if dtype == "int8" else set())
    assert all(end == ends[0] for end in ends[1:])


def test_the_plan_counts_the_bytes_of_the_stem_once_for_all_ways_to_have_attention(
    config: MakeConfig, vcache: Vcache
) -> None:
    made = config(layers="stem", split=("val",))
    plan = plan_extraction(made, seconds=None)
    recorded = 4 * 4 + 1 + 4 * FRAMES
    assert plan.asked.video_bytes == 4 * FRAMES * (TOKENS * WIDTH + 20) + recorded
    assert [choice.dtype for choice in plan.choices if choice.cross_frame == "qk"] == [x.dtype for x in plan.choices]
    words = f"{made.dataset} --frames 5 --stride 3 --model {made.model} --device cpu --quick"
    assert "the stem and the embedding, no layers" in vcache(f"plan {words} --layers -4")[1]
    assert "the stem and layers 1,2" in vcache(f"plan {words} --layers stem,1:")[1]
    run_extraction(made)
    shards = [file for file in made.store.rglob("val/view-0/**/c/**/*") if file.is_file()]
    assert (plan.asked.missing_files, plan.asked.missing_bytes) == (len(shards), sum(x.stat().st_size for x in shards))
    assert plan_extraction(made, seconds=None).asked.missing_bytes == 0


def test_of_three_blocks_layer_minus_four_is_the_stem_alone(config: MakeConfig) -> None:
    """By default queries and keys come with layers, of which there are none."""
    made = config(layers="-4", split=("val",))
    assert made.cross_frame == "qk"
    run_extraction(made)
    assert values(made.store).keys() == {STEM, "embed", "crop", "flip", "frame_index"}


@pytest.mark.parametrize("cross_frame", ["maps", "derive"])
def test_attention_between_frames_of_the_stem_alone_is_refused(config: MakeConfig, cross_frame: str) -> None:
    with pytest.raises(ExtractionError, match=f"--cross-frame {cross_frame}: .* --layers stem keeps none"):
        run_extraction(config(layers="stem", cross_frame=cross_frame))
    assert not config().store.exists()


def test_derivation_of_block_0_and_the_stem_share_an_array_and_its_reading(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads, one of them with maps alone: the array is read, and made float32, once for both."""
    made = config(layers="stem,0", cross_frame="derive", dtype="int8", split=("val",))
    run_extraction(made)
    needs = (HeadRequirements(maps=(0,)), NEEDS)
    with FeatureStore.open(made.store) as store:
        arrays = store.arrays("val")
        assert {name for name in arrays if "block" in name} == {STEM, "block_input_scale/0"}
        plans = [match("made-up", needed, store, ["val"]) for needed in needs]
        assert [plan.features for plan in plans] == [(STEM,), (STEM,)] and plans[0].maps_from == "derive"
        alone = [next(ClipLoader(store, "val", plan, batch_size=6, device=CPU).in_order()).features() for plan in plans]
        both = ClipLoader(store, "val", plans, batch_size=6, device=CPU)
        names: list[str] = []
        dequantised = batch.dequantised
        monkeypatch.setattr(batch, "dequantised", lambda x, name, by: names.append(name) or dequantised(x, name, by))
        (found,) = both.in_order()
        derived, stem = (found.features(plan) for plan in plans)
        assert both.stats.bytes_read == 6 * (arrays[STEM].row_bytes + arrays["block_input_scale/0"].row_bytes)
    assert names == [STEM]
    assert torch.equal(derived.maps[0], alone[0].maps[0])
    assert stem.stem is not None and alone[1].stem is not None and torch.equal(stem.stem, alone[1].stem)


def test_the_stem_is_read_at_a_frame_step_from_memory_and_beside_streamed_tokens(
    config: MakeConfig, stem_store: Path
) -> None:
    with FeatureStore.open(stem_store) as store:
        whole = read(store)
        for kind in ("ram", "gpu"):  # on the CPU "gpu" is the same memory
            assert torch.equal(read(store, resident=kind), whole)
        streamed = HeadRequirements(tokens=(2,), stem=True, streamed=True)
        assert torch.equal(read(store, streamed), whole)
    made = config(layers="stem", frames=6, split=("val",))
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        whole = read(store)
        assert torch.equal(read(store, frame_step=2), whole[:, ::2])
        every, second = (match("made-up", NEEDS, store, ["val"], frame_step=step) for step in (1, 2))
        for beside in ClipLoader(store, "val", [every, second], batch_size=9, device=CPU).in_order():
            assert torch.equal(beside.features(second).stem, whole[:, ::2])  # of what both have read
            assert torch.equal(beside.features(every).stem, whole)


def test_a_flipped_byte_of_the_stem_is_found_and_extracted_again(config: MakeConfig, vcache: Vcache) -> None:
    made = config(layers="stem", dtype="int8", split=("val",))
    run_extraction(made)
    before = values(made.store)
    for folder in (made.store / "val/view-0/block_input/0", made.store / "constants/block_input_mean/0"):
        shard = next(file for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json")
        content = bytearray(shard.read_bytes())
        content[50] ^= 1
        shard.write_bytes(content)
    status, said, _ = vcache(f"verify {made.store}")
    assert status == 1 and "block_input/0" in said and "block_input_mean/0" in said
    assert vcache(f"repair {made.store} --device cpu")[0] == 0
    assert values(made.store) == before
    assert vcache(f"verify {made.store} --deep --device cpu")[0] == 0


def test_a_head_that_runs_all_blocks_is_told_the_line_after_which_it_trains(
    float32_store: Path, tmp_path: Path, vcache: Vcache
) -> None:
    store, out = tmp_path / "tiny.zarr", tmp_path / "run"
    shutil.copytree(float32_store, store)
    settings = {"blocks": NUM_BLOCKS, "epochs": 1, "batch_size": 6, "warmup_epochs": 0.0}
    training = TrainingConfig(head="aim", store=store, out=out, device="cpu", settings=settings)
    with pytest.raises(HeadStoreMismatch) as refused:
        train_head(training)
    first, line, added, other_cuts = str(refused.value).splitlines()
    assert other_cuts == "What is stored serves --set blocks=N for N = 1."  # of 3 blocks the last two layers are stored
    assert first.startswith(
        "head 'aim' reads the stem (what enters block 0); split 'train' of tiny.zarr holds tokens of layers 1-2, "
    )
    assert added == "(adds 16.3 kB per clip; what is stored is kept)"
    command = line.removeprefix("Extract the rest with:  vcache ")
    assert " --layers stem " in command and "--cross-frame" not in command
    before = files(store)
    status, _, said = vcache(command + " --device cpu")
    assert status == 0, said
    assert before.items() <= files(store).items()
    assert np.isfinite(train_head(training).last.train_loss)


def test_a_sweep_counts_the_stem_among_what_a_head_has_in_memory(int8_stem: Path) -> None:
    settings = {"blocks": NUM_BLOCKS, "batch_size": 4}
    training = TrainingConfig(head="aim", store=int8_stem, device="cpu", settings=settings)
    with FeatureStore.open(int8_stem) as store:
        demand = demand_of("one", prepare_head(training, store, CPU), store.manifest)
    of_clips = 4 * FRAMES * TOKENS
    assert demand.features == {STEM: 4 * of_clips * WIDTH}  # in float32
    assert demand.arrays == {STEM: of_clips * WIDTH, "block_input_scale/0": 2 * of_clips}


def test_a_store_for_other_frames_is_extracted_with_the_stem_and_the_layers(float32_store: Path) -> None:
    with FeatureStore.open(float32_store) as store:
        with pytest.raises(HeadStoreMismatch, match="--layers stem,1: .*--cross-frame none"):
            match("made-up", HeadRequirements(tokens=(1, -1), stem=True, num_frames=7), store, ["train"])
        with pytest.raises(HeadStoreMismatch, match=r"--layers stem,0,2 .*--cross-frame none"):
            match("made-up", HeadRequirements(cls=(0, -1), stem=True), store, ["train"])


def test_where_there_is_no_store_the_line_has_the_layers_below_the_last_four(vcache: Vcache) -> None:
    with pytest.raises(NoFittingStore, match="vcache extract DATASET --layers -7 "):
        find_store("aim", {}, "train")


def test_info_and_ls_show_the_stem(stem_store: Path, int8_stem: Path, vcache: Vcache) -> None:
    rows = json.loads(vcache(f"ls {stem_store.parent} --json")[1])
    assert [(row["stem"], row["layers"]) for row in rows] == [(True, [2])]
    assert (
        "layers stem,2" in vcache(f"ls {stem_store.parent}")[1] and "layers stem" in vcache(f"ls {int8_stem.parent}")[1]
    )
    arrays = json.loads(vcache(f"info {stem_store} --json")[1])["splits"]["val"]["arrays"]
    assert arrays[STEM] == arrays[STEM] | {"stored": 6, "shape": [FRAMES, TOKENS, WIDTH]}


def test_words_for_the_stem() -> None:
    assert layers_word([], 3, stem=True) == "stem" and layers_word([1, 2], 3, stem=True) == "stem,1:"
    assert layers_word([0, 2], 3, stem=True) == "stem,0,2" and layers_word([], 3) == "none"
    names = (STEM, "block_input_scale/0", "tokens/0", "tokens/1", "tokens_scale/0", "embed")
    assert describe_arrays(names) == "tokens of layers 0-1, the stem (what enters block 0), the embedding"


def test_a_video_gives_a_head_the_stem_that_the_store_has(stem_store: Path) -> None:
    """As for `vcache predict`: not from the store, but from the video."""
    with FeatureStore.open(stem_store) as store:
        extractor = Reextraction(store, device="cpu").extractor
        (video,) = videos_of(store.part_videos("val"), "val", [4])
        clip = extractor.prepare(video)
        assert read_arrays(NEEDS, NUM_BLOCKS) == [STEM]
        computed = extractor.features([clip], read_arrays(NEEDS, NUM_BLOCKS))
        features = clip_features(NEEDS, computed, NUM_BLOCKS, clip)
        assert features.stem is not None and len(features) == 1
        torch.testing.assert_close(features.stem[0], read(store)[4], rtol=1e-5, atol=1e-5)
