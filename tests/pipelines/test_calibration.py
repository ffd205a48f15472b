"""Extraction as int8 and bfloat16: statistics of a sample, measured errors, refusal before anything is written, resume."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr

from vcache.extract.backbone import load_backbone
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.decode import decode_clip
from vcache.extract.preprocess import from_open_clip_config
from vcache.pipelines.batches import ClipExtractor
from vcache.pipelines.calibration import CalibrationError
from vcache.pipelines.extract_commands import bytes_per_clip
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.listing import describe_store, print_store
from vcache.pipelines.plan import plan_extraction
from vcache.pipelines.precision_error import PrecisionRefused
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.errors import NotFinite, StoreExists
from vcache.store.layout import widened_bfloat16
from vcache.store.quantise import quantise, quantise_tokens
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

MakeConfig = Callable[..., ExtractionConfig]
DieAfter = Callable[[pytest.MonkeyPatch, int], None]


def contents(path: Path) -> dict[str, bytes]:
    """All files but the manifest, which has the time of creation in it."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file != path / "zarr.json")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def online(config: ExtractionConfig, paths: list[Path]) -> dict[str, np.ndarray]:
    """What the backbone makes of these videos: (video, frame, ...)."""
    backbone = load_backbone(config.model, None)
    prepare = from_open_clip_config(backbone.preprocess_config, mode=config.preprocess)
    taps = [backbone(prepare(decode_clip(path, config.sampling).frames), tokens=[1, 2], qk=[1, 2]) for path in paths]
    arrays = {f"tokens/{layer}": [tap.tokens[layer] for tap in taps] for layer in (1, 2)}
    arrays |= {f"q/{layer}": [tap.q[layer] for tap in taps] for layer in (1, 2)}
    arrays |= {f"k/{layer}": [tap.k[layer] for tap in taps] for layer in (1, 2)}
    return {name: torch.stack(features).numpy() for name, features in arrays.items()}


def test_an_int8_store_holds_what_the_reference_makes_of_the_features(config: MakeConfig, video_folder: Path) -> None:
    made = config(dtype="int8")
    run_extraction(made)
    with FeatureStore.open(made.store) as store:
        expected = online(made, [video_folder / path for path in store.videos("train").paths])
        for name, x in expected.items():
            kind, layer = name.split("/")
            constants = (
                [store.constant(f"tokens_{what}/{layer}") for what in ("mean", "std")] if kind == "tokens" else []
            )
            q, scale = quantise_tokens(x, *constants) if constants else quantise(x)
            stored = store.read("train", name, np.arange(12))
            # Features agree to float32 rounding in any batch, so a number near the middle of a step may fall to either side.
            assert np.abs(stored.astype(int) - q).max() <= 1
            assert np.mean(stored != q) < 1e-3
            np.testing.assert_allclose(store.read("train", f"{kind}_scale/{layer}", np.arange(12)), scale, rtol=1e-3)
        kinds = {name: spec.dtype for name, spec in store.arrays("train").items()}
        assert {kinds[name] for name in ("cls/2", "embed", "tokens_scale/2", "k_scale/1")} == {"float16"}
        assert all(store.arrays("train")[f"{kind}_scale/2"].by_frame for kind in "qk")
        assert verify_store(store).ok


def test_statistics_are_those_of_four_in_five_of_a_shuffled_sample(config: MakeConfig, video_folder: Path) -> None:
    """A video that does not decode is passed over."""
    made = config(dtype="int8", split=("train",))
    dataset = load_dataset(made.dataset, root=None, splits=("train",), val_fraction=0.2)
    paths = [video_folder / video.path for video in dataset.split("train")]
    sample = [paths[i] for i in np.random.default_rng(0).permutation(12)]
    calibrated = [path for number, path in enumerate(sample, start=1) if number % 5]
    assert len(calibrated) == 10
    run_extraction(made)
    expected = online(made, calibrated)["tokens/2"].reshape(-1, 48).astype(np.float64)
    with FeatureStore.open(made.store) as store:
        np.testing.assert_allclose(store.constant("tokens_mean/2"), expected.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(store.constant("tokens_std/2"), expected.std(axis=0), rtol=1e-4)
        assert store.manifest.facts["errors"]["tokens/2"]["videos"] == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_the_recorded_error_is_the_one_of_the_stored_rows(config: MakeConfig, video_folder: Path, dtype: str) -> None:
    """Measured on a sample, so equal to that of all rows but for a factor; and each dtype has the error that its bits allow."""
    made = config(dtype=dtype, split=("train",))
    run_extraction(made)
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 0.02}[dtype]
    with FeatureStore.open(made.store) as store:
        exact = online(made, [video_folder / path for path in store.videos("train").paths])["tokens/2"]
        stored = store.read("train", "tokens/2", np.arange(12))
        if dtype == "int8":
            scale = store.read("train", "tokens_scale/2", np.arange(12)).astype(np.float32)
            stored = stored * scale[..., None] * store.constant("tokens_std/2") + store.constant("tokens_mean/2")
        elif dtype == "bfloat16":
            stored = widened_bfloat16(stored)
        errors = store.manifest.facts["errors"]
    relative = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
    assert errors["tokens/2"]["relative"] == pytest.approx(relative, rel=0.1)
    assert errors.keys() == {"embed", *(f"{kind}/{layer}" for kind in ("tokens", "cls", "q", "k") for layer in (1, 2))}
    assert all(0 < error["relative_standardised"] < step for error in errors.values())
    assert all(0 < errors[name]["maps_total_variation"] < step for name in ("q/1", "k/2"))


def test_float32_has_no_error_to_record(config: MakeConfig) -> None:
    run_extraction(config())
    with FeatureStore.open(config().store) as store:
        assert "errors" not in store.manifest.facts


def test_above_the_bound_nothing_is_written_and_the_named_dtype_then_fits(config: MakeConfig) -> None:
    with pytest.raises(
        PrecisionRefused, match=r"tokens/1 would lose .* \(allowed: 0\.001\).* Store it with --dtype float16"
    ):
        run_extraction(config(dtype="int8", max_error=0.001))
    assert not config().store.exists()
    assert run_extraction(config(dtype="float16", max_error=0.001)).progress.videos_done == 18


def test_a_layer_above_the_bound_is_not_added(config: MakeConfig) -> None:
    run_extraction(config(dtype="int8", layers="-1"))
    before = contents(config().store)
    with pytest.raises(PrecisionRefused, match="tokens/0"):
        run_extraction(config(dtype="int8", layers="0,2", max_error=0.001))
    assert contents(config().store) == before


def test_int8_without_a_video_to_calibrate_with_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "one" / "a" / "x.mp4").write_bytes(b"")
    with pytest.raises(CalibrationError, match="none of the videos can be decoded"):
        run_extraction(config(dataset=str(tmp_path / "one"), dtype="int8"))
    assert run_extraction(config(dataset=str(tmp_path / "one"), dtype="float16")).too_many_failures(1.0)


def test_features_that_are_not_finite_are_refused_before_they_are_quantised(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: ClipExtractor, *arguments: object) -> dict[str, torch.Tensor]:
        features = original(self, *arguments)  # type: ignore[arg-type]
        features["tokens/2"].flatten()[7] = torch.nan
        return features

    original = ClipExtractor.features
    with monkeypatch.context() as patch:
        patch.setattr(ClipExtractor, "features", spoilt)
        with pytest.raises(NotFinite, match="to calibrate with hold NaN"):
            run_extraction(config(dtype="int8", layers="-1"))
    run_extraction(config(dtype="int8", layers="-1", split=("val",)))
    monkeypatch.setattr(ClipExtractor, "features", spoilt)
    with pytest.raises(NotFinite, match=r"tokens_scale/2 of row 0 holds 1 values that are not finite"):
        run_extraction(config(dtype="int8", layers="-1"))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_that_dies_resumes_to_the_same_tree(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_after: DieAfter, workers: int
) -> None:
    """Before the constants, between them and the errors, before the first shard, between shards; whatever the workers."""
    monkeypatch.setattr("vcache.pipelines.setup.MAX_ROWS_PER_SHARD", 4)
    whole, killed = config(dtype="int8", store=tmp_path / "whole.zarr"), config(dtype="int8", store=tmp_path / "k.zarr")
    run_extraction(whole)
    for place in ("calibration.write_constants", "calibration.record_facts", "extraction.missing_shards"):
        with monkeypatch.context() as patch:
            patch.setattr(f"vcache.pipelines.{place}", _die)
            with pytest.raises(KeyboardInterrupt):
                run_extraction(config(dtype="int8", store=killed.store, decode_workers=workers))
    with monkeypatch.context() as patch:
        die_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_extraction(killed)
    assert run_extraction(killed).progress.videos_skipped == 4
    assert contents(killed.store) == contents(whole.store)
    with FeatureStore.open(killed.store) as one, FeatureStore.open(whole.store) as other:
        assert one.manifest.constants == other.manifest.constants
        assert one.manifest.facts["errors"] == other.manifest.facts["errors"]


def _die(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_more_layers_calibrate_only_themselves(config: MakeConfig) -> None:
    run_extraction(config(dtype="int8", layers="-1"))
    before = contents(config().store)
    with FeatureStore.open(config().store) as store:
        constants, errors = store.manifest.constants, store.manifest.facts["errors"]
    run_extraction(config(dtype="int8", layers="all"))
    after = contents(config().store)
    assert {name: after[name] for name in before} == before
    with FeatureStore.open(config().store) as store:
        assert store.manifest.constants.items() > constants.items()
        assert store.manifest.facts["errors"].items() > errors.items()
        assert "tokens_mean/0" in store.manifest.constants
        assert verify_store(store).ok


def test_a_lost_constant_is_made_anew_and_another_one_is_refused(config: MakeConfig, video_folder: Path) -> None:
    run_extraction(config(dtype="int8"))
    before = contents(config().store)
    folder = config().store / "constants" / "tokens_mean" / "2"
    shutil.rmtree(folder)
    run_extraction(config(dtype="int8"))
    assert contents(config().store) == before
    shutil.rmtree(folder)
    with pytest.raises(StoreExists, match="other values of tokens_mean/2"):  # of six videos, not of ten
        run_extraction(config(dtype="int8", split=("val",)))


def test_zarr_python_and_xarray_read_int8_in_two_lines(config: MakeConfig, video_folder: Path) -> None:
    """As the README says."""
    made = config(dtype="int8")
    run_extraction(made)
    store = zarr.open_group(made.store, mode="r")
    view, constants = store["val/view-0"], store["constants"]
    x = view["tokens/2"][3] * view["tokens_scale/2"][3][..., None].astype("float32")
    x = x * constants["tokens_std/2"][:] + constants["tokens_mean/2"][:]
    with FeatureStore.open(made.store) as opened:
        exact = online(made, [video_folder / opened.videos("val").paths[3]])["tokens/2"][0]
    assert np.linalg.norm(x - exact) < 0.02 * np.linalg.norm(exact)
    tokens, scale = (
        xarray.open_zarr(f"{made.store}/val/view-0/{kind}", consolidated=False, chunks=None)["2"]
        for kind in ("tokens", "tokens_scale")
    )
    mean, std = (
        xarray.open_zarr(f"{made.store}/constants/tokens_{what}", consolidated=False, chunks=None)["2"]
        for what in ("mean", "std")
    )
    named = (tokens * scale.astype("float32") * std + mean).isel(video=3)
    np.testing.assert_allclose(named.transpose("frame", "token", "channel").values, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_the_bytes_that_a_message_names_are_those_of_the_arrays(config: MakeConfig, dtype: str) -> None:
    for way in ("qk", "maps", "derive"):
        run_extraction(config(dtype=dtype, cross_frame=way, split=("val",), layers="0,2"))
    with FeatureStore.open(config().store) as store:
        features = {
            name: spec for name, spec in store.arrays("val").items() if name not in ("crop", "flip", "frame_index")
        }
        assert bytes_per_clip(features, store.manifest) == sum(spec.row_bytes for spec in features.values())


@pytest.mark.parametrize("head", ["linear", "evl"])
def test_training_on_int8_follows_training_on_float32(
    config: MakeConfig, float32_store: Path, tmp_path: Path, head: str
) -> None:
    run_extraction(config(dtype="int8"))
    settings = {"epochs": 8, "batch_size": 4, "lr": 1e-3} | ({"layers": "-2:"} if head == "evl" else {})
    exact, compact = (
        train_head(TrainingConfig(head=head, store=store, out=tmp_path / store.stem, settings=settings, device="cpu"))
        for store in (float32_store, config().store)
    )
    assert compact.last.train_loss == pytest.approx(exact.last.train_loss, rel=0.02)
    assert compact.last.val_loss == pytest.approx(exact.last.val_loss or 0.0, rel=0.02)


def test_info_shows_the_errors(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run_extraction(config(dtype="int8", cross_frame="maps"))
    description = describe_store(config().store)
    error = description["errors"]["tokens/2"]["relative_standardised"]
    print_store(description)
    shown = capsys.readouterr().out
    assert f"{error:.1e}" in shown
    assert f"{description['errors']['maps/1']['relative']:.1e}" in shown


def test_a_plan_measures_int8_without_a_store(config: MakeConfig) -> None:
    plan = plan_extraction(config(dtype="int8", split=("val",)), seconds=1.0)
    assert plan.rates is not None
    assert plan.rates.forward_seconds[0] > 0
    sizes = {(choice.dtype, choice.cross_frame): choice.video_bytes for choice in plan.choices}
    assert sizes["int8", "none"] < 0.6 * sizes["bfloat16", "none"] == 0.6 * sizes["float16", "none"]
    run_extraction(config(dtype="int8", split=("val",)))
    assert plan_extraction(config(dtype="int8", split=("val",)), seconds=None).asked.missing_bytes == 0
