"""Compiled programs: onnxruntime gives the logits of the model on real frames, and of what cannot be compiled nothing is left."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_timm
import torch

from vcache.extract.datasets.base import Video
from vcache.extract.preprocess import Preprocessing
from vcache.extract.sampling import StridedSampling, TSNSampling
from vcache.extract.views import EvaluationView
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.prediction import export_onnx
from vcache.pipelines.prediction.export import export_run
from vcache.pipelines.prediction.export_check import ExportError
from vcache.pipelines.prediction.export_program import ProgramInput
from vcache.pipelines.prediction.video_model import VideoModel, open_video_model
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head

SHORT = {"epochs": 1, "batch_size": 6, "lr": 0.01, "warmup_epochs": 0.0}
DIST = {"integration_dim": 64, "temporal_dim": 6, "adaptive_pooling_layers": 1, "mixup": 0.0, "cutmix": 0.0}


def trained(store: Path, out: Path, head: str, **settings: Any) -> Path:
    train_head(TrainingConfig(head=head, store=store, out=out, device="cpu", settings={**SHORT, **settings}))
    return out


def prepared(model: VideoModel, videos: Path) -> Any:
    (view,) = model.views()
    paths = sorted((videos / "val").rglob("*.mp4"))[:3]
    return [model.extractor.prepare(Video(path.stem, str(path), 0, "val"), view) for path in paths]


def logits(path: Path, frames: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"frames": frames})[0])


def largest_difference(run: Path, program: Path, videos: Path) -> float:
    """On real frames, of one clip and of three."""
    model = open_video_model(run, device="cpu")
    clips = prepared(model, videos)
    frames = ProgramInput.of(model).frames(clips).numpy()
    got = np.concatenate([logits(program, frames[:1]), logits(program, frames)])
    wanted = model.scores(clips).numpy()
    assert wanted.std(axis=0).max() > 1e-4, "the clips are told apart at all"
    return float(np.abs(got - np.concatenate([wanted[:1], wanted])).max())


@pytest.fixture(scope="module")
def evl_run(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All modules, with maps from queries and keys, of features in float16."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evl")
    run_extraction(tiny_extraction(store=folder / "store.zarr", dtype="float16"))
    return trained(folder / "store.zarr", folder / "run", "evl", layers="-1:")


@pytest.fixture(scope="module")
def evl_folder(evl_run: Path) -> Path:
    return export_run(evl_run, out=evl_run.parent / "folder", formats=("onnx",)).folder


def test_onnxruntime_gives_the_logits_of_the_model_on_real_frames(
    evl_run: Path, evl_folder: Path, video_folder: Path
) -> None:
    assert largest_difference(evl_run, evl_folder / "model.onnx", video_folder) < 1e-4
    told = json.loads((evl_folder / "config.json").read_text())["programs"]["model.onnx"]
    assert 0 <= told["max_difference"] < told["tolerance"]
    session = onnxruntime.InferenceSession(str(evl_folder / "model.onnx"), providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["vcache"])
    assert metadata["class_names"] == ["clap hands", "jump", "wave"]
    assert metadata["input"]["shape"] == [None, 5, 32, 32, 3] and metadata["sampling"]["stride_frames"] == 3
    assert metadata["preprocessing"]["mean"] == [0.5, 0.4, 0.3] and "onnxruntime" in metadata["versions"]


def test_weights_above_the_limit_lie_beside_the_program(
    float32_store: Path, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(float32_store, tmp_path / "run", "linear")
    monkeypatch.setattr(export_onnx, "EXTERNAL_ABOVE", 1000)
    folder = export_run(run, out=tmp_path / "folder", formats=("onnx",)).folder
    assert (folder / "model.onnx.data").stat().st_size > 100_000
    assert "model.onnx.data" in json.loads((folder / "config.json").read_text())["files"]
    assert largest_difference(run, folder / "model.onnx", video_folder) < 1e-5


def test_what_cannot_be_compiled_is_refused_before_anything_is_written(
    evl_run: Path, pixel_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tada = trained(pixel_store, tmp_path / "tada", "dist", temporal_block="tada", **DIST)
    with pytest.raises(ExportError, match=r"head 'dist' .*calibration.in.* Leave out --format"):
        export_run(tada, out=tmp_path / "folder", formats=("torch",))
    model = open_video_model(evl_run, device="cpu")
    model.extractor.backbone.dtype = torch.bfloat16
    with pytest.raises(ExportError, match=r"made in bfloat16, .*--precision float32"):
        export_onnx.check_onnx(model)
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnx", "no_such_onnxruntime"))
    with pytest.raises(ExportError, match=r"needs no_such_onnxruntime, .*pip install no_such_onnxruntime"):
        export_run(evl_run, out=tmp_path / "folder", formats=("onnx",))
    assert not (tmp_path / "folder").exists()


EVERY_HEAD = [
    ("linear", {}),
    ("evl", {"layers": "-2:", "pooling": "temporal_mean"}),
    ("evl", {"layers": "-2:", "pooling": "cls", "temporal_cross_attention": False}),
    *[("text4vis", {"templates": "label", "temporal": temporal}) for temporal in ("t_trans", "tap", "t1d")],
    *[("actionclip", {"templates": "label", "prompt": prompt}) for prompt in ("meanp", "conv1d", "lstm", "transf")],
    *[("dist", {**DIST, "temporal_block": block}) for block in ("r2plus1d", "c3d", "joint")],
    ("aim", {"blocks": 2}),
    ("st-adapter", {"blocks": 2}),
    ("finetune-top", {"blocks": 1, "classifier": "text"}),
    ("tokent1d", {"blocks": 2}),
    ("shift", {"blocks": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "settings"), EVERY_HEAD, ids=lambda value: value if isinstance(value, str) else str(list(value.values()))
)
def test_every_head_compiles_to_its_logits(
    head: str, settings: dict[str, Any], pixel_store: Path, video_folder: Path, tmp_path: Path
) -> None:
    run = trained(pixel_store, tmp_path / "run", head, **settings)
    folder = export_run(run, out=tmp_path / "folder", formats=("onnx",)).folder
    assert largest_difference(run, folder / "model.onnx", video_folder) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("cross_frame", ["qk", "derive", "maps"])
def test_every_rounding_of_a_store_compiles(
    dtype: str,
    cross_frame: str,
    tiny_extraction: Callable[..., ExtractionConfig],
    video_folder: Path,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store.zarr"
    run_extraction(tiny_extraction(store=store, dtype=dtype, cross_frame=cross_frame, layers="0:"))
    run = trained(store, tmp_path / "run", "evl", layers="-2:")
    folder = export_run(run, out=tmp_path / "folder", formats=("onnx",)).folder
    assert largest_difference(run, folder / "model.onnx", video_folder) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_eva01", "tiny_eva02", "tiny_siglip", "tiny_mci"])
def test_every_kind_of_tower_compiles(
    name: str, tiny_extraction: Callable[..., ExtractionConfig], video_folder: Path, tmp_path: Path
) -> None:
    model, embed = tmp_path / name, tiny_timm.WIDTH if name == "tiny_siglip" else tiny_timm.EMBED
    model.mkdir()
    text = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "context_length": 6, "vocab_size": 64}
    config = {"embed_dim": embed, "vision_cfg": tiny_timm.vision(name), "text_cfg": text}
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    store = tmp_path / "store.zarr"
    run_extraction(tiny_extraction(store=store, model=f"local-dir:{model}", random_weights=True))
    run = trained(store, tmp_path / "run", "evl", layers="-2:")
    folder = export_run(run, out=tmp_path / "folder", formats=("onnx", "torch")).folder
    assert largest_difference(run, folder / "model.onnx", video_folder) < 1e-4


def example() -> str:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    return page.partition("```python\n")[2].partition("```")[0]


def test_the_example_of_the_page_says_what_predict_says(
    evl_run: Path, evl_folder: Path, video_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "classify.py").write_text(example())
    video, model = video_folder / "val" / "wave" / "w1.mp4", open_video_model(evl_run, device="cpu")
    command = [sys.executable, str(tmp_path / "classify.py"), str(evl_folder / "model.onnx"), str(video)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (view,) = model.views()
    clip = model.extractor.prepare(Video("w1", str(video), 0, "val"), view)
    told = dict(zip(model.class_names, model.probabilities(model.scores([clip]))[0].tolist(), strict=True))
    found = {name: float(value) for value, name in (line.split("  ") for line in printed)}
    assert found.keys() == told.keys()
    assert [name for _, name in (line.split("  ") for line in printed)] == sorted(told, key=lambda k: -told[k])
    assert all(abs(found[name] - told[name]) < 0.01 for name in told)


@pytest.mark.parametrize("sampling", [StridedSampling(num_frames=3, stride_frames=4), TSNSampling(num_frames=5)])
@pytest.mark.parametrize(("pixels", "every"), [(1, 1), (1, 3), (2, 1), (4, 2)])
def test_the_example_chooses_the_frames_of_the_extractor(sampling: Any, pixels: int, every: int) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    exec(example(), names)
    rule = {**sampling.to_dict(), "pixels_per_frame": pixels, "every": every}
    view = EvaluationView(pixels_per_frame=pixels if pixels > 1 else 0)
    for num_frames in range(1, 80):
        wanted = view.clip_rule(sampling, "v").indices(num_frames)[::every]
        assert tuple(names["chosen_frames"](num_frames, rule)) == wanted, num_frames


@pytest.mark.parametrize(("height", "width"), [(36, 50), (97, 64), (20, 31), (32, 32)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_example_prepares_frames_as_pillow_does(height: int, width: int, interpolation: str) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    exec(example(), names)
    frame = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exact = Preprocessing(image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation, mode="exact")
    made = names["prepared"](frame, exact.to_dict())
    wanted = exact.pixels(frame[None])[0].permute(1, 2, 0).numpy()
    off = np.abs(made.astype(int) - wanted)
    assert off.max() <= 2 and off.mean() < 0.1  # both round twice, Pillow with weights of few bits
