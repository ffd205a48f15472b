"""Real tiny videos, a real tiny CLIP and a real store: what the tests of the pipelines stand on."""

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared"

# Small, and all different, so that a swapped axis fails.
TINY_VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 12}  # 17 tokens, 4 heads
TINY_TEXT = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TINY_EMBED = 20


@pytest.fixture(autouse=True)
def _few_threads_and_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's stores, and two cores are not fought over."""
    torch.set_num_threads(1)
    monkeypatch.setenv("VCACHE_HOME", str(tmp_path / "vcache-home"))
    monkeypatch.delenv("VCACHE_DATA", raising=False)


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """write_video(path, seed=0, num_frames=20, height=36, width=50, codec="mpeg4"): a moving noise pattern as a real file."""

    def write(
        path: Path, *, seed: int = 0, num_frames: int = 20, height: int = 36, width: int = 50, codec: str = "mpeg4"
    ) -> Path:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (num_frames, 5, 7, 3), dtype=np.uint8)
        rows, columns = np.arange(height) * 5 // height, np.arange(width) * 7 // width
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.bit_rate = 400_000
            for frame in coarse[:, rows][:, :, columns]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly drawn CLIP of 3 blocks as an open_clip `local-dir:` folder; real weights as far as the loader can tell."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    config = {"embed_dim": TINY_EMBED, "quick_gelu": True, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.25, 0.2, 0.3],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """train/ and val/ folders of three classes: 4 + 2 videos of each, one of them a single frame long."""
    root = tmp_path_factory.mktemp("videos")
    for i, label in enumerate(("clap hands", "jump", "wave")):
        for split, count in (("train", 4), ("val", 2)):
            for j in range(count):
                frames = 1 if (i, split, j) == (1, "train", 0) else 14 + 5 * j
                write_video(root / split / label / f"{label[0]}{j}.mp4", seed=100 * i + j, num_frames=frames)
    return root
