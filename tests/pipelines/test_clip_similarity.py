"""vcache cka: what is compared are the head's own features on the store's videos."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vcache.pipelines.cka import Scatter
from vcache.pipelines.clip_similarity import (
    CkaError,
    LayerSimilarity,
    Similarity,
    clip_similarity,
    examples,
    spread,
)
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.runs import Run
from vcache.pipelines.similarity_chart import chart
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

T, P, NUM_VAL = 5, 16, 6


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Of whole matrices."""
    x, y = (z.astype(np.float64) - z.mean(axis=0, dtype=np.float64) for z in (x, y))
    return float(np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


@pytest.fixture(scope="module")
def evl_run(pixel_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "evl"
    short = {"epochs": 1, "batch_size": 6, "lr": 0.02, "layers": "1:"}
    train_head(TrainingConfig(head="evl", store=pixel_store, out=out, device="cpu", settings=short))
    return out


@pytest.mark.parametrize(("level", "num"), [("patch", NUM_VAL * T * P), ("frame", NUM_VAL * T), ("clip", NUM_VAL)])
def test_every_layer_is_compared_over_all_examples_of_the_split(
    dist_run: Path, pixel_store: Path, level: str, num: int
) -> None:
    got = clip_similarity(dist_run, level=level, device="cpu")
    head = Run.open(dist_run).load_head()
    with FeatureStore.open(pixel_store) as store:
        plan = match("dist", type(head).requires(head.config), store, ["val"])
        (batch,) = ClipLoader(store, "val", plan, batch_size=NUM_VAL, device=torch.device("cpu")).in_order()
        inner = head.inner_features(batch.features())
    assert (got.split, got.level, got.num_videos, got.num_examples) == ("val", level, NUM_VAL, num)
    assert [one.layer for one in got.layers] == [0, 1, 2]
    axes = {"patch": (), "frame": (2,), "clip": (1, 2)}[level]

    def rows(x: torch.Tensor) -> np.ndarray:
        return x.double().numpy().mean(axis=axes).reshape(num, x.shape[-1])

    for one, expected in zip(got.layers, inner, strict=True):
        x = rows(expected.spatial)
        assert one.integrated == pytest.approx(cka(x, rows(expected.integrated)), abs=1e-5)
        assert one.temporal == pytest.approx(cka(x, rows(expected.temporal[:, ::2])), abs=1e-5)
    assert bool(got.notes) == (level != "patch")  # of so few examples everything is similar


def test_of_a_head_without_a_temporal_encoder_the_integrated_features_are_compared(
    evl_run: Path, pixel_store: Path
) -> None:
    got = clip_similarity(evl_run, store=pixel_store, device="cpu")
    assert [(one.layer, one.temporal, one.temporal_by_chance) for one in got.layers] == [
        (1, None, None),
        (2, None, None),
    ]
    assert all(one.integrated is not None and 0.5 < one.integrated < 1 for one in got.layers)


def test_fewer_videos_are_spread_over_the_split_and_progress_is_told(dist_run: Path) -> None:
    heard: list[tuple[int, int]] = []
    got = clip_similarity(dist_run, videos=3, device="cpu", on_clips=lambda done, total: heard.append((done, total)))
    assert (got.num_videos, heard) == (3, [(2, 3), (3, 3)])


@given(total=st.integers(1, 60), num=st.integers(1, 80))
def test_spread_rows_are_so_many_each_once_and_reach_over_the_split(total: int, num: int) -> None:
    rows = 3 * np.arange(total)
    got = spread(rows, num)
    assert len(got) == min(num, total) == len(set(got.tolist())) and set(got) <= set(rows)
    if num > 1:
        assert got[0] == rows[0] and got[-1] == rows[-1]


def test_an_example_is_a_patch_or_a_mean_of_patches() -> None:
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    assert torch.equal(examples(x, "patch"), x.reshape(24, 5))
    torch.testing.assert_close(examples(x, "frame"), x.double().mean(2).reshape(6, 5))
    torch.testing.assert_close(examples(x, "clip"), x.double().mean((1, 2)))


def test_random_features_in_place_of_the_heads_are_unlike_clips(dist_run: Path, pixel_store: Path) -> None:
    head = Run.open(dist_run).load_head()
    with FeatureStore.open(pixel_store) as store:
        plan = match("dist", type(head).requires(head.config), store, ["val"])
        (batch,) = ClipLoader(store, "val", plan, batch_size=NUM_VAL, device=torch.device("cpu")).in_order()
        spatial = head.inner_features(batch.features())[-1].spatial
    scatter, drawn = Scatter(), torch.randn(spatial.shape, generator=torch.Generator().manual_seed(0))
    scatter.add([examples(x, "patch") for x in (spatial, drawn)])
    assert scatter.cka(0, 1) < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "token"}, "--level token: say one of patch, frame, clip"),
        ({"split": "test"}, r"has no split 'test'; it has: .*val. Choose one with --split"),
        ({"videos": 0}, "--videos 0: say at least 1"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(dist_run: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(CkaError, match=words):
        clip_similarity(dist_run, device="cpu", **options)  # type: ignore[arg-type]


def test_a_head_that_shows_no_features_is_refused_with_those_that_do(pixel_store: Path, tmp_path: Path) -> None:
    short = {"epochs": 1, "batch_size": 6}
    config = TrainingConfig(head="linear", store=pixel_store, out=tmp_path / "linear", device="cpu", settings=short)
    train_head(config)
    with pytest.raises(CkaError, match=r"head 'linear' of .* Runs of these heads can be compared: dist, evl"):
        clip_similarity(tmp_path / "linear", device="cpu")


def test_a_head_that_reads_cls_alone_is_refused(pixel_store: Path, tmp_path: Path) -> None:
    short = {"epochs": 1, "batch_size": 6, "layers": "1:", "pooling": "cls", "temporal_cross_attention": False}
    config = TrainingConfig(head="evl", store=pixel_store, out=tmp_path / "cls", device="cpu", settings=short)
    train_head(config)
    with pytest.raises(CkaError, match="reads no patches, so there is nothing to compare"):
        clip_similarity(tmp_path / "cls", device="cpu")


def similarity(layers: tuple[LayerSimilarity, ...]) -> Similarity:
    return Similarity(
        run="run",
        head="DiST",
        store="store.zarr",
        split="val",
        level="patch",
        num_videos=2,
        num_examples=64,
        layers=layers,
        notes=(),
    )


def test_lines_rise_with_their_values_and_missing_ones_are_left_out() -> None:
    values = [(0.1, 0.9), (0.5, None), (0.8, None)]
    layers = tuple(
        LayerSimilarity(layer=i, integrated=a, temporal=b, integrated_by_chance=0.0, temporal_by_chance=0.0)
        for i, (a, b) in enumerate(values)
    )
    image = np.asarray(chart(similarity(layers)))
    red, blue = (np.argwhere((image == colour).all(axis=-1)) for colour in ((178, 24, 43), (33, 102, 172)))
    line = red[red[:, 1] < red[:, 1].min() + 420]
    heights = [
        line[line[:, 1] == x][:, 0].mean() for x in (line[:, 1].min() + 4, line[:, 1].min() + 200, line[:, 1].max() - 4)
    ]
    assert heights[0] > heights[1] > heights[2]
    assert len(blue) and blue[:, 0].max() < heights[2]  # 0.9 is above all of them


def test_the_command_writes_chart_and_numbers_and_takes_the_store_or_finds_it(
    vcache: Callable[[str], tuple[int, str, str]], dist_run: Path, pixel_store: Path, tmp_path: Path
) -> None:
    status, out, err = vcache(f"cka {dist_run} {pixel_store} --videos 4 --out {tmp_path / 'x.png'} --json")
    assert status == 0, err
    told = json.loads(out)
    assert told == json.loads((tmp_path / "x.json").read_text()) and told["num_videos"] == 4
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 500
    status, out, _ = vcache(f"cka {dist_run} --store {pixel_store} --videos 4 --out {tmp_path / 'y.png'}")
    assert status == 0 and f"{told['layers'][2]['temporal']:.3f}" in out and "320 patches of 4 videos of val" in out
    status, _, err = vcache(f"cka {dist_run} --out {tmp_path / 'z.jpg'}")
    assert status == 2 and "ends in .png" in err
    status, _, err = vcache(f"cka {dist_run} {pixel_store} --store {tmp_path}")
    assert status == 2 and "is another store than" in err
    status, out, _ = vcache(f"cka {dist_run} --videos 1 --out {tmp_path / 'y.png'}")
    assert status == 0 and "80 patches of 1 video of val" in out
