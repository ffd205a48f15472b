"""vcache explain of a head with a temporal encoder: norms are those of its features, and motion is that of the pixels."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from vcache.extract.backbone import BackboneFacts
from vcache.extract.views import PreparedClip
from vcache.heads.dist import DiST
from vcache.heads.requirements import ClipFeatures, InnerFeatures
from vcache.pipelines.evaluation.predicting import predict_logits
from vcache.pipelines.explained_clip import ExplainedClip
from vcache.pipelines.explaining import explain
from vcache.pipelines.explaining_magnitude import explain_magnitudes, patch_motion
from vcache.pipelines.explanation import ExplainError, Explanation, Magnitudes, Question
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.pictures import Tiling
from vcache.pipelines.rank_correlation import rank_correlation
from vcache.pipelines.runs import Run
from vcache.store.reader import FeatureStore

T, GAMMA, ROW = 5, 2, 3
FACTS = BackboneFacts(
    model="m",
    num_layers=4,
    width=1,
    num_heads=1,
    head_dim=1,
    patch_size=4,
    image_size=12,
    grid=(2, 3),
    num_tokens=7,
    embed_dim=1,
    layer_norm_eps=1e-5,
)


@pytest.fixture(scope="module")
def explanation(dist_run: Path) -> Explanation:
    return explain(dist_run, Question(row=ROW, layer="all"), device="cpu")


def test_norms_and_prediction_are_those_of_the_head_on_the_stored_features(
    dist_run: Path, pixel_store: Path, explanation: Explanation
) -> None:
    head = Run.open(dist_run).load_head()
    with FeatureStore.open(pixel_store) as store:
        plan = match("dist", type(head).requires(head.config), store, ["val"])
        loader = ClipLoader(store, "val", plan, batch_size=6, device=torch.device("cpu"))
        (batch,) = loader.in_order()
        inner = head.inner_features(batch.features())
        logits, _ = predict_logits(head, loader.in_order())
        names = store.manifest.class_names
        pixels, index = (store.read("val", name, [ROW])[0] for name in ("pixels", "pixel_index"))
    found = explanation.found
    assert isinstance(found, Magnitudes) and explanation.notes == ()
    assert np.array_equal(found.pixels, pixels) and found.pixel_index == tuple(index.tolist())
    assert [one.layer for one in found.layers] == [0, 1, 2]
    for one, expected in zip(found.layers, inner, strict=True):
        for got, x in ((one.spatial, expected.spatial), (one.temporal, expected.temporal)):
            np.testing.assert_allclose(got.reshape(len(got), -1), x[ROW].square().sum(-1).sqrt().numpy(), rtol=1e-4)
        assert (len(one.spatial), len(one.temporal)) == (T, GAMMA * T)
    probabilities = dict(zip(names, logits.softmax(dim=1)[ROW].tolist(), strict=True))
    assert dict(explanation.predictions) == pytest.approx(probabilities, abs=1e-5)


def shown(pixels: np.ndarray, spatial: np.ndarray, temporal: np.ndarray, question: Question) -> ExplainedClip:
    """A head that gives these norms, in one channel each, for a clip of these pixels."""

    def one_channel(norms: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(norms.reshape(1, len(norms), -1, 1))

    inner = InnerFeatures(layer=-1, spatial=one_channel(spatial), integrated=None, temporal=one_channel(temporal))
    clip = PreparedClip(
        torch.zeros(3, 3, 12, 12, dtype=torch.uint8), {"pixels": pixels, "pixel_index": np.arange(len(pixels))}
    )
    facts = FACTS
    return ExplainedClip(
        run=Path("run"),
        head=SimpleNamespace(inner_features=lambda features: [inner]),
        question=question,
        clip=clip,
        computed={},
        features=ClipFeatures(),
        facts=facts,
        tiling=Tiling(grid=(2, 3), patch=(4, 4)),
    )


def test_norms_are_compared_with_the_motion_of_their_own_frames() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3 * GAMMA, 12, 12, 3), dtype=np.uint8)
    motion = patch_motion(pixels, Tiling(grid=(2, 3), patch=(4, 4)))
    follows = np.concatenate([np.zeros((1, 2, 3), dtype=np.float32), motion]) + 1
    (one,) = explain_magnitudes(shown(pixels, 5 - follows[::GAMMA], follows, Question())).layers
    assert one.layer == 3
    assert one.correlation.temporal == pytest.approx(1) == one.correlation.temporal_at_clip_frames
    assert one.correlation.spatial == pytest.approx(-1)
    still = np.repeat(pixels[:1], 3 * GAMMA, axis=0)
    (one,) = explain_magnitudes(shown(still, follows[::GAMMA], follows, Question())).layers
    assert (one.correlation.temporal, one.correlation.spatial) == (None, None)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), size=st.integers(1, 12))
def test_rank_correlation_is_that_of_counted_ranks(data: st.DataObject, size: int) -> None:
    few = st.integers(0, 5).map(float)
    a, b = (data.draw(arrays(np.float64, size, elements=few)) for _ in range(2))

    def ranks(x: np.ndarray) -> np.ndarray:
        return np.array([(x < value).sum() + ((x == value).sum() - 1) / 2 for value in x])

    got = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert got is None
        return
    assert got == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert rank_correlation(np.exp(a), 3 * b - 7) == pytest.approx(got)


@settings(max_examples=20, deadline=None)
@given(frames=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_motion_of_a_patch_is_the_mean_change_of_its_pixels(frames: int, rows: int, columns: int, seed: int) -> None:
    side = max(4 * rows, 5 * columns) + 2
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    got = patch_motion(pixels, Tiling(grid=(rows, columns), patch=(4, 5)))
    assert got.shape == (frames - 1, rows, columns)
    for t, row, column in np.ndindex(got.shape):
        now, before = (
            pixels[i, 4 * row : 4 * row + 4, 5 * column : 5 * column + 5].astype(float) / 255 for i in (t + 1, t)
        )
        assert got[t, row, column] == pytest.approx(abs(now - before).mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question(row=ROW, frame=1), "no query that attends: leave out --frame and --patch"),
        (Question(row=ROW, patch=(1, 1)), "no query that attends: leave out --frame and --patch"),
        (Question(row=ROW, layer=-4), "layers -4: asked of a backbone with 3 blocks"),
    ],
)
def test_what_a_head_without_a_query_cannot_be_asked_is_refused(dist_run: Path, question: Question, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        explain(dist_run, question, device="cpu")


def test_a_head_without_a_temporal_encoder_is_refused(dist_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DiST.inner_features

    def without(self: DiST, features: ClipFeatures) -> list[InnerFeatures]:
        return [dataclasses.replace(one, temporal=None) for one in whole(self, features)]

    monkeypatch.setattr(DiST, "inner_features", without)
    with pytest.raises(ExplainError, match="was trained without a temporal encoder"):
        explain(dist_run, Question(row=ROW), device="cpu")


def test_the_command_draws_the_norms_and_tells_how_they_follow_the_motion(
    vcache: Callable[[str], tuple[int, str, str]], dist_run: Path, tmp_path: Path
) -> None:
    status, out, err = vcache(f"explain {dist_run} --row {ROW} --layer 1 --out {tmp_path / 'o'} --json")
    assert status == 0, err
    told = json.loads(out)
    assert told == json.loads((tmp_path / "o" / "explain.json").read_text())
    (layer,) = told["layers"]
    assert layer["layer"] == 1 and set(layer["correlation_with_motion"]) == {
        "temporal",
        "temporal_at_clip_frames",
        "spatial",
    }
    assert told["motion"][0] is None and len(told["motion"]) == GAMMA * T == len(layer["temporal"]["frame_mean"])
    low, high = layer["spatial"]["colours"]
    assert 0 < low < layer["spatial"]["median"] < high <= layer["spatial"]["largest"]
    with Image.open(told["pictures"]["magnitude"]) as image:
        assert image.width > 8 * 128
    status, out, _ = vcache(f"explain {dist_run} --row {ROW} --out {tmp_path / 'o'}")
    assert status == 0 and "layer 2: rank correlation of the norm" in out and "magnitude.png" in out
