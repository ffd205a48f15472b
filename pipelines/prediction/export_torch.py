"""model.pt2: head and backbone as one program of torch.export, which `torch.export.load` runs without vcache."""

from pathlib import Path

import numpy as np
import torch

from vcache.pipelines.prediction.export_check import Checked, check_program
from vcache.pipelines.prediction.export_onnx import compiled
from vcache.pipelines.prediction.video_model import VideoModel

PT2 = "model.pt2"


def write_torch(folder: Path, model: VideoModel, metadata: str) -> Checked:
    """Compile the model into folder/model.pt2, with the metadata as the extra file "vcache.json", and compare it with the model.

    Raises:
        ExportError: the head cannot be compiled, or the program gives other logits.
    """
    path = folder / PT2
    torch.export.save(compiled(model), path, extra_files={"vcache.json": metadata})
    module = torch.export.load(path).module()

    def run(frames: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(frames)).numpy())

    return check_program(PT2, run, model)
