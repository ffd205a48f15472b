"""The cached tail is the backbone: what is replayed on stored tokens is what the whole forward pass made."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vcache.extract import backbone
from vcache.extract.weights import RandomWeightsRefused
from vcache.heads.aim import AIM
from vcache.heads.tail import FrozenTail
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.frozen_tail import SharedTails, kept_dtype, tail_key, tail_of_store
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config, match
from vcache.pipelines.read_plan import ReadPlan
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.tail_check import check_tail
from vcache.pipelines.tail_file import TailKey, read_tail, tail_bytes, unlike
from vcache.store.groups import write_manifest
from vcache.store.reader import FeatureStore

CPU = torch.device("cpu")


def make_head(store: FeatureStore, **settings: object) -> AIM:
    head = AIM(build_head_config("aim", settings, store.manifest))
    head.set_tail(tail_of_store(store, head.config.num_blocks, head.config.frozen_dtype, CPU))
    return head.eval()


def plan_of(head: AIM, store: FeatureStore) -> ReadPlan:
    return match("aim", head.requires(head.config), store, ["train"])


def checked(head: AIM, store: FeatureStore, plan: ReadPlan | None = None) -> float | None:
    return check_tail(head, head.tail, plan or plan_of(head, store), store, "train", CPU)


def renamed(store: Path, out: Path, model: Path) -> Path:
    """The store as if it had been made from the checkpoint in that folder."""
    shutil.copytree(store, out)
    with FeatureStore.open(out) as opened:
        manifest = opened.manifest
    request = {**manifest.facts["request"], "model": f"local-dir:{model}"}
    write_manifest(out, replace(manifest, facts={**manifest.facts, "request": request}))
    return out


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices that backbones are loaded on from here on."""
    devices, original = [], backbone.load_backbone

    def load(*args: object, device: str = "cpu", **options: object) -> object:
        devices.append(device)
        return original(*args, device=device, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone, "load_backbone", load)
    return devices


@pytest.fixture(scope="module")
def stem_store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What enters block 0 and the outputs of the others, in float32."""
    path = tmp_path_factory.mktemp("store") / "stem.zarr"
    run_extraction(tiny_extraction(store=path, layers="stem,0:", cross_frame="none"))
    return path


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_the_tail_on_cached_tokens_is_the_whole_backbone(stem_store: Path, num_blocks: int) -> None:
    with FeatureStore.open(stem_store) as store:
        head = make_head(store, blocks=num_blocks)
        plan = replace(plan_of(head, store), embed=True)
        for batch in ClipLoader(store, "train", plan, batch_size=5, device=CPU).in_order():
            features = batch.features(plan)
            replayed = head.tail.embed(head.read(features), num_blocks)
            torch.testing.assert_close(replayed, features.embed, rtol=1e-5, atol=1e-5)
        assert (found := checked(head, store)) is not None and found < 1e-6


def test_heads_with_and_without_the_patch_embedding_share_one_tail(
    pixel_store: Path, tmp_path: Path, loads: list[str]
) -> None:
    with FeatureStore.open(pixel_store) as store:
        whole = TailKey(num_blocks=3, dtype="float32", weights_sha256=store.manifest.spec["weights_sha256"], stem=True)
        tails = SharedTails()
        tails.load(store, CPU, [replace(whole, stem=False), whole, replace(whole, num_blocks=1, stem=False)])
        tail = tails.of(whole, CPU)
    assert len(loads) == 1 and tail.shape.stem is not None and not unlike(tail, whole)
    (tmp_path / "few.safetensors").write_bytes(tail_bytes(tail, 1))
    few = read_tail(tmp_path / "few.safetensors")
    assert few.shape.stem is None and "no patch embedding" in unlike(few, replace(whole, num_blocks=1))
    (tmp_path / "all.safetensors").write_bytes(tail_bytes(tail, 3))
    assert read_tail(tmp_path / "all.safetensors", whole).shape == tail.shape


def test_heads_side_by_side_share_one_tail_and_one_pass_over_the_checkpoint(
    pixel_store: Path, loads: list[str]
) -> None:
    with FeatureStore.open(pixel_store) as store:
        digest = store.manifest.spec["weights_sha256"]
        one, two, half = (
            TailKey(num_blocks=k, dtype=dtype, weights_sha256=digest)
            for k, dtype in ((1, "float32"), (2, "float32"), (1, "float16"))
        )
        tails = SharedTails()
        tails.load(store, CPU, [two, half, one])
        assert loads == ["cpu"]  # where the heads are on a GPU, the backbone is not moved there
        assert tails.of(one, CPU) is tails.of(two, CPU) and tails.of(two, CPU).shape.num_blocks == 2
        assert tails.of(half, CPU).shape.num_blocks == 1 and tails.of(half, CPU).proj.dtype == torch.float16
        tails.load(store, CPU, [one, half])
        assert len(loads) == 1 and tails.of(one, CPU).shape.num_blocks == 2
        tails.load(store, CPU, [replace(one, num_blocks=3)])
        assert len(loads) == 2 and tails.of(one, CPU).shape.num_blocks == 3
        heads = [AIM(build_head_config("aim", {"blocks": k}, store.manifest)) for k in (1, 2)]
        for head in heads:
            head.set_tail(tails.of(one, CPU))
        assert heads[0].tower_blocks()[0] is heads[1].tower_blocks()[1]
        tails.load(store, CPU, [])  # of a group that runs none, nothing is kept
        tails.load(store, CPU, [one])
        assert len(loads) == 3


def test_of_the_backbone_nothing_but_the_blocks_stays_in_memory(pixel_store: Path) -> None:
    """Weights read from a safetensors file may look into the whole of it."""
    with FeatureStore.open(pixel_store) as store:
        state = make_head(store, blocks=1).tail.state_dict()
    assert {x.untyped_storage().nbytes() - x.nbytes for x in state.values()} == {0}
    assert len({x.untyped_storage().data_ptr() for x in state.values()}) == len(state)


def test_a_head_without_numbers_leaves_the_shared_tail_alone(pixel_store: Path) -> None:
    """A head that failed beside others gives back its memory by a move to the meta device."""
    with FeatureStore.open(pixel_store) as store:
        head = make_head(store, blocks=1)
    head.to("meta")
    assert head.tail.ln_post.weight.device.type == "cpu" and not head.tail.proj.is_meta


def test_what_the_weights_are_kept_in_is_what_the_backbone_ran_in(pixel_store: Path) -> None:
    with FeatureStore.open(pixel_store) as store:
        manifest = store.manifest
    half = replace(manifest, spec={**manifest.spec, "precision": "bfloat16"})
    older = replace(manifest, spec={name: value for name, value in manifest.spec.items() if name != "precision"})
    assert [kept_dtype("auto", one) for one in (manifest, half, older)] == ["float32", "bfloat16", "float32"]
    assert kept_dtype("float16", half) == "float16"
    config = build_head_config("aim", {"blocks": 2, "frozen_dtype": "float16"}, manifest)
    key = tail_key(AIM.requires(config), config, manifest)
    assert key == TailKey(num_blocks=2, dtype="float16", weights_sha256=manifest.spec["weights_sha256"])


def test_a_checkpoint_that_is_gone_is_named_with_what_to_do(pixel_store: Path, tmp_path: Path) -> None:
    gone = renamed(pixel_store, tmp_path / "store.zarr", tmp_path / "moved")
    with FeatureStore.open(gone) as store, pytest.raises(HeadStoreMismatch) as refused:
        make_head(store, blocks=2)
    said = str(refused.value)
    assert f"the head runs the top 2 blocks of local-dir:{tmp_path / 'moved'}, which made {gone}" in said
    assert "Put the checkpoint back where it was." in said


def test_a_checkpoint_that_was_changed_is_refused_by_its_digest(
    pixel_store: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["visual.proj"] = weights["visual.proj"] + 1e-3
    save_file(weights, file)
    with (
        FeatureStore.open(renamed(pixel_store, tmp_path / "store.zarr", tmp_path / "clip")) as store,
        pytest.raises(
            HeadStoreMismatch, match=r"was made with weights \w{16} of .* which now has \w{16}.* Put that back"
        ),
    ):
        make_head(store, blocks=1)


def test_the_same_weights_computed_otherwise_are_refused(pixel_store: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """The other GELU is within the rounding of half precision, so that replaying a clip does not find it."""
    shutil.copytree(tiny_clip, tmp_path / "clip")
    told = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    told["model_cfg"]["quick_gelu"] = not told["model_cfg"]["quick_gelu"]
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(told))
    with (
        FeatureStore.open(renamed(pixel_store, tmp_path / "store.zarr", tmp_path / "clip")) as store,
        pytest.raises(
            HeadStoreMismatch, match=r"was made with ViT-8-32px-\w{12} of .* which now is ViT-8-32px-\w{12}: "
        ),
    ):
        make_head(store, blocks=1)


def test_tokens_of_another_layer_are_refused(pixel_store: Path) -> None:
    with FeatureStore.open(pixel_store) as store:
        head = make_head(store, blocks=1)
        plan = plan_of(head, store)
        assert plan.tokens == {-2: 1}
        with pytest.raises(HeadStoreMismatch, match=r"the top 1 of 3 blocks .*% off the stored one.*--deep"):
            checked(head, store, replace(plan, tokens={-2: 0}))


def test_blocks_that_are_not_computed_as_the_backbones_are_refused(pixel_store: Path) -> None:
    """By the wrong GELU, which few other checks would see."""
    with FeatureStore.open(pixel_store) as store:
        head = make_head(store, blocks=1)
        shape = replace(head.tail.shape, block=replace(head.tail.shape.block, activation="gelu"))
        head.set_tail(FrozenTail.of(shape, head.tail.state_dict()))
        with pytest.raises(HeadStoreMismatch, match="do not belong together"):
            checked(head, store)


def test_weights_that_are_no_numbers_are_refused(pixel_store: Path) -> None:
    with FeatureStore.open(pixel_store) as store:
        head = make_head(store, blocks=1)
        head.tail.proj[0] = torch.nan
        with pytest.raises(HeadStoreMismatch, match="nan% off"):
            checked(head, store)


@pytest.mark.parametrize(("dtype", "least", "most"), [("float16", 1e-5, 0.004), ("int8", 1e-3, 0.03)])
def test_the_rounding_of_what_is_stored_passes(
    tiny_extraction: Callable[..., ExtractionConfig], tmp_path: Path, dtype: str, least: float, most: float
) -> None:
    """Far below the bounds."""
    run_extraction(tiny_extraction(store=tmp_path / "store.zarr", dtype=dtype, cross_frame="none"))
    with FeatureStore.open(tmp_path / "store.zarr") as store:
        head = make_head(store, blocks=1, frozen_dtype="float16")
        assert (found := checked(head, store)) is not None and least < found < most


def test_a_store_without_such_a_clip_is_not_checked(pixel_store: Path) -> None:
    with FeatureStore.open(pixel_store) as store:
        head = make_head(store, blocks=1)
        assert checked(head, store, replace(plan_of(head, store), tokens={-2: 9})) is None


def test_a_download_that_fails_is_told_as_it_is(pixel_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RandomWeightsRefused("the 'openai' weights could not be downloaded.")

    monkeypatch.setattr(backbone, "load_backbone", refuse)
    with FeatureStore.open(pixel_store) as store, pytest.raises(HeadStoreMismatch, match=r"be downloaded\. Put the"):
        make_head(store, blocks=1)
