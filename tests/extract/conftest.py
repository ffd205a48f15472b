"""Tiny image towers as open_clip `local-dir:` folders: the official one of the goldens, and any other configuration."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """clip_folder(vision, weights, embed_dim=20, quick_gelu=True): a folder for `local-dir:`.

    `weights` are under the names of the image tower; there is no text tower in the file.
    """

    def make(
        vision: Mapping[str, Any], weights: Mapping[str, Tensor], *, embed_dim: int = 20, quick_gelu: bool = True
    ) -> Path:
        folder = tmp_path_factory.mktemp("clip")
        text = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        model = {"embed_dim": embed_dim, "quick_gelu": quick_gelu, "vision_cfg": dict(vision), "text_cfg": text}
        preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
        save_file(
            {f"visual.{name}": tensor.contiguous() for name, tensor in weights.items()},
            folder / "open_clip_model.safetensors",
        )
        return folder

    return make


@pytest.fixture(scope="session")
def golden_clip(clip_folder: Callable[..., Path]) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    """golden_clip(name, prefix="w/"): the image tower of a golden as a folder, and the golden's arrays.

    The goldens keep it under OpenAI's names, in `evl_backbone_taps` as w/..., in `evl_end2end` as w/clip.visual....
    """

    def make(name: str, prefix: str = "w/") -> tuple[Path, dict[str, np.ndarray]]:
        about = json.loads((GOLDENS / f"{name}.json").read_text())
        with np.load(GOLDENS / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        weights = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(prefix)}
        vision = {
            "image_size": about["resolution"],
            "patch_size": about["patch"],
            "width": about["width"],
            "layers": about["layers"],
            "head_width": about["width"] // about["heads"],
        }
        return clip_folder(vision, weights, embed_dim=weights["proj"].shape[1]), arrays

    return make
