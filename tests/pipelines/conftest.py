"""Stores that several tests of the pipelines read."""

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.extract.video import DecodedVideo, DecodeRequest
from vcache.extract.workers import DecodePool
from vcache.pipelines import decoding
from vcache.pipelines.cli import main
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.pipelines.writing import RowBatch, ShardWriting
from vcache.store.constants import CONSTANTS, Constant, write_constants
from vcache.store.groups import write_manifest
from vcache.store.reader import FeatureStore


class DecodesHere:
    """In place of `DecodePool`: the same decoder in the calling thread, as starting processes takes longer than most tests."""

    def __init__(self, num_workers: int, *, decoder: str = "pyav") -> None:
        pass

    def decode(self, request: DecodeRequest) -> DecodedVideo:
        return decoding.decode_video(request)

    def close(self) -> None:
        pass


@pytest.fixture(scope="session", autouse=True)
def _decode_in_threads() -> Iterator[None]:
    """Unless a test asks for the processes with the fixture `decode_processes`. Before the fixtures of modules make stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "DecodePool", DecodesHere)
        yield


@pytest.fixture
def decode_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are decoded as they are outside of tests."""
    monkeypatch.setattr(decoding, "DecodePool", DecodePool)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the video files that are decoded from here on, one entry each time."""
    names: list[str] = []
    original = decoding.decode_video

    def decode(request: DecodeRequest) -> DecodedVideo:
        names.append(request.path.name)
        return original(request)

    monkeypatch.setattr(decoding, "decode_video", decode)
    return names


@pytest.fixture(scope="session")
def tiny_extraction(video_folder: Path, tiny_clip: Path) -> Callable[..., ExtractionConfig]:
    """Layers 1 and 2 of 3 with Q/K in float32, 5 frames of stride 3, of the tiny videos; any field can be given."""

    def make(**fields: object) -> ExtractionConfig:
        defaults: dict[str, object] = {
            "dataset": str(video_folder),
            "layers": "-2:",
            "frames": 5,
            "stride": 3,
            "model": f"local-dir:{tiny_clip}",
            "pretrained": None,
            "dtype": "float32",
            "device": "cpu",
        }
        return ExtractionConfig(**{**defaults, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture
def config(tiny_extraction: Callable[..., ExtractionConfig], tmp_path: Path) -> Callable[..., ExtractionConfig]:
    """The same into a store of the test, in batches of three."""
    return lambda **fields: tiny_extraction(**{"store": tmp_path / "store.zarr", "batch_size": 3, **fields})


@pytest.fixture
def die_after() -> Callable[[pytest.MonkeyPatch, int], None]:
    """die_after(patch, n): Ctrl-C when batch n + 1 goes to the writer, with the batches before it written."""

    def arrange(patch: pytest.MonkeyPatch, num_batches: int) -> None:
        submit, left = ShardWriting.submit, iter(range(num_batches))

        def submit_or_die(self: ShardWriting, batch: RowBatch) -> None:
            if next(left, None) is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._unwritten == 1)
                raise KeyboardInterrupt
            submit(self, batch)

        patch.setattr(ShardWriting, "submit", submit_or_die)

    return arrange


@pytest.fixture(scope="session")
def float32_store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny_extraction` makes; read only."""
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    run_extraction(tiny_extraction(store=path))
    return path


@pytest.fixture
def forget_text() -> Callable[[Path], None]:
    """forget_text(store): the store as a version before there was text left it."""

    def forget(path: Path) -> None:
        with FeatureStore.open(path) as store:
            manifest = store.manifest
        constants = {name: crc for name, crc in manifest.constants.items() if not name.startswith("text/")}
        facts = {name: fact for name, fact in manifest.facts.items() if name != "text"}
        write_manifest(path, replace(manifest, constants=constants, facts=facts))
        shutil.rmtree(path / CONSTANTS / "text")

    return forget


@pytest.fixture
def vcache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """vcache("ls --json") -> (exit status, standard output, standard error), through the real entry point.

    `columns=80` narrows the terminal.
    """

    def run(line: str, columns: int = 200) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vcache", *shlex.split(line)])
        monkeypatch.setenv("COLUMNS", str(columns))
        status: object = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return int(str(status)), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def pixel_store(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 3 layers, two pixel frames for each frame, and text embeddings drawn at random; read only."""
    path = tmp_path_factory.mktemp("store") / "pixels.zarr"
    run_extraction(tiny_extraction(store=path, layers="0:", pixels=10))
    with FeatureStore.open(path) as store:
        drawn = np.random.default_rng(3).standard_normal((3, 1, 20), dtype=np.float32)
        text = {"text/label": Constant(("class", "template", "channel"), drawn)}
        text["text/logit_scale"] = Constant(("scale",), np.array([2.5], dtype=np.float32))
        write_constants(store, {name: value for name, value in text.items() if name not in store.manifest.constants})
    return path


@pytest.fixture(scope="session")
def dist_run(pixel_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DiST after two steps; read only."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "dist"
    sizes = {"integration_dim": 64, "temporal_dim": 6, "adaptive_pooling_layers": 1}
    short = {"epochs": 1, "batch_size": 6, "warmup_epochs": 0.0, "lr": 0.01, "mixup": 0.0, "cutmix": 0.0}
    train_head(TrainingConfig(head="dist", store=pixel_store, out=out, device="cpu", settings={**sizes, **short}))
    return out
