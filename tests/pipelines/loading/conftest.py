"""Stores that several tests of the loader read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from viewed import viewed_store

from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig


@pytest.fixture(scope="session")
def int8_store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 2 of 3 in int8, cross-frame attention to be derived, 5 frames of stride 3; read only."""
    path = tmp_path_factory.mktemp("int8") / "int8.zarr"
    run_extraction(tiny_extraction(store=path, dtype="int8", cross_frame="derive", max_error=1.0))
    return path


@pytest.fixture(scope="session")
def views_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 videos to train on in 3 views, 7 to validate with in 3x1, 5 of them to a shard; read only."""
    path = tmp_path_factory.mktemp("views") / "views.zarr"
    viewed_store(path).close()
    return path
