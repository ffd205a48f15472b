"""The official module of DiST's head for benchmarks/dist_head.py, imported from a checkout of alibaba-mmai-research/DiST.

Only the two files that it needs are loaded: the repository's packages import its data sets and trainers.
"""

import importlib.util
import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vcache.heads.dist import DiST
from vcache.heads.requirements import ClipFeatures


class _Registry:
    """Stands for the repository's own, which is of no use here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def register(self) -> Any:
        return lambda registered: registered


def _namespace(**fields: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(**fields)


def _load(name: str, file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for timm.models.layers, which has moved
        spec.loader.exec_module(module)
    return module


def _module(checkout: Path) -> types.ModuleType:
    for name in ("utils", "models", "models.base"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["utils.logging"] = logging
    logging.get_logger = logging.getLogger  # type: ignore[attr-defined]
    sys.modules["utils"].logging = logging  # type: ignore[attr-defined]
    sys.modules["utils.registry"] = types.ModuleType("utils.registry")
    sys.modules["utils.registry"].Registry = _Registry  # type: ignore[attr-defined]
    _load("models.base.clip", checkout / "models/base/clip.py")
    return _load("official_dist", checkout / "models/module_zoo/branches/dist.py")


class OfficialHead(nn.Module):
    """The official network under the names of `DiST`; of features in its own layout, which are made beforehand."""

    def __init__(self, config: DiST.Config, checkout: Path) -> None:
        super().__init__()
        dist = _namespace(
            SELECTED_LAYERS=list(config.read_layers), TEMPORAL_DIM=config.temporal_dim, INTEGRATION_DIM=config.integration_dim,
            S_PATCH_SIZE=config.patch_size, T_PATCH_SIZE=5, TEMPORAL_KERNEL_SIZE=3, TEMPORAL_CONV_MLP_RATIO=1,
            INTEGRATION_MLP_RATIO=1, INTEGRATION_TEMPORAL_MLP_RATIO=0.25, ADA_POOLING_LAYERS=config.adaptive_pooling_layers,
        )  # fmt: skip
        data = _namespace(NUM_INPUT_FRAMES=config.num_frames * config.gamma, SPARSE_SAMPLE_ALPHA=config.gamma)
        cfg = _namespace(VIDEO=_namespace(BACKBONE=_namespace(DIST=dist)), DATA=data)
        self.net = _module(checkout).DiSTNetwork(cfg, config.width, config.width // 64, config.embed_dim)

    def forward(self, given: dict[str, Any]) -> Tensor:
        return self.net(given)[0]


def official_features(config: DiST.Config, features: ClipFeatures) -> dict[str, Any]:
    """float32 tokens with the clips inside, normalised images of all frames."""
    assert features.pixels is not None
    mean, std = (torch.tensor(x, device=features.pixels.device) for x in (config.pixel_mean, config.pixel_std))
    images = ((features.pixels / 255 - mean) / std).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    tokens = {layer: x.float().flatten(0, 1).transpose(0, 1).contiguous() for layer, x in features.tokens.items()}
    return {"mid_feat": {"img": tokens}, "images": images}
