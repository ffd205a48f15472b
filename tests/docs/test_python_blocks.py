"""The Python on the pages: all of it is Python, and what reads a store reads what was extracted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import PAGES, fenced

from vcache.pipelines.demo.render import TINY_CLIP, render_world
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig

BLOCKS = [(page, line, text) for page in PAGES for line, text in fenced(page, "python")]
READING, CONVERTING = (text for page, _, text in BLOCKS if page == "docs/stores.md")


@pytest.mark.parametrize(("page", "line", "text"), BLOCKS, ids=[f"{page}:{line}" for page, line, _ in BLOCKS])
def test_every_block_is_python(page: str, line: int, text: str) -> None:
    compile(text, f"{page}:{line}", "exec")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each dtype with STORE.zarr in it, of the last layer of the tiny CLIP, four videos to validate on."""
    folder = tmp_path_factory.mktemp("stores")
    csv = render_world(folder / "world", train=2, val=4)
    for dtype in ("float32", "int8", "bfloat16"):
        (folder / dtype).mkdir()
        model = {"model": f"local-dir:{TINY_CLIP}", "pretrained": None, "device": "cpu"}
        asked: dict[str, Any] = {
            "dataset": str(csv),
            "layers": "-1",
            "cross_frame": "none",
            "frames": 3,
            "dtype": dtype,
        }
        run_extraction(ExtractionConfig(**asked, **model, store=folder / dtype / "STORE.zarr"))
    return folder


def made(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What the lines call `x`, in the folder. The page speaks of ViT-B/16, whose last layer is 11."""
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(lines.replace("/11", "/3"), names)
    return np.asarray(names["x"])


def test_the_lines_for_other_programs_give_the_tokens(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_int8, of_bfloat16 = CONVERTING.split("\n\n")
    opened = "\n".join(line for line in of_int8.splitlines() if not line.startswith("x ="))
    exact = made(f"{READING}x = tokens[3]", stores / "float32", monkeypatch)
    int8 = made(f"import zarr\n{of_int8}", stores / "int8", monkeypatch)
    bfloat16 = made(f"import zarr\n{opened}\n{of_bfloat16}", stores / "bfloat16", monkeypatch)
    assert exact.shape == (3, 65, 128)
    assert 0 < np.abs(bfloat16 - exact).max() <= 2**-8 * np.abs(exact).max()
    assert 0 < np.abs(int8 - exact).max() < 0.05 * exact.std()
