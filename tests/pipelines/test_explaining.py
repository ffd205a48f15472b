"""vcache explain: the shown weights are those of the head and of the backbone, of the very video and frames."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vcache.extract.backbone import load_backbone
from vcache.extract.preprocess import from_open_clip_config
from vcache.pipelines.evaluation.predicting import predict_logits
from vcache.pipelines.explaining import explain
from vcache.pipelines.explaining_attention import cls_attention
from vcache.pipelines.explanation import ExplainError, Explanation, Question
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.finding import UnknownVideo
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.reextraction import Reextraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import Run
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.errors import CannotRecompute
from vcache.store.reader import FeatureStore

T, GRID, P = 5, (4, 4), 16
VIDEO = "val/jump/j1.mp4"


def train(store: Path, out: Path, head: str = "evl", **settings: object) -> Path:
    layers = {"layers": "-2:", "mlp_dropout": 0.0} if head == "evl" else {}
    short = {"epochs": 1, "batch_size": 6, "lr": 0.02, **layers, **settings}
    train_head(TrainingConfig(head=head, store=store, out=out, device="cpu", settings=short))
    return out


@pytest.fixture(scope="module")
def run(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EVL on layers 1 and 2 of 3; read only."""
    torch.set_num_threads(1)
    return train(float32_store, tmp_path_factory.mktemp("runs") / "evl")


@pytest.fixture(scope="module")
def explanation(run: Path) -> Explanation:
    return explain(run, Question(video=VIDEO, layer="all"), device="cpu")


def pixels(path: str) -> np.ndarray:
    """The pixels of a PNG."""
    with Image.open(path) as image:
        return np.asarray(image)


def row_of(store: FeatureStore, video_id: str) -> int:
    return store.videos("val").ids.index(video_id)


def batches(store: FeatureStore, head: nn.Module, batch_size: int) -> Iterator[Batch]:
    """The validation split as a head reads it."""
    plan = match("evl", type(head).requires(head.config), store, ["val"])
    return ClipLoader(store, "val", plan, batch_size=batch_size, device=torch.device("cpu")).in_order()


def test_prediction_and_truth_are_those_of_an_evaluation(
    run: Path, float32_store: Path, explanation: Explanation
) -> None:
    head = Run.open(run).load_head()
    with FeatureStore.open(float32_store) as store:
        logits, labels = predict_logits(head, batches(store, head, batch_size=4))
        row = row_of(store, VIDEO)
        names = store.manifest.class_names
    assert (explanation.row, explanation.split, explanation.truth) == (row, "val", names[labels[row]])
    assert explanation.notes == ()
    expected = dict(zip(names, logits.softmax(dim=1)[row].tolist(), strict=True))
    assert dict(explanation.predictions) == pytest.approx(expected, abs=1e-5)
    assert [name for name, _ in explanation.predictions] == sorted(expected, key=expected.__getitem__, reverse=True)


def test_frames_are_those_that_the_features_were_made_of(
    video_folder: Path, tiny_clip: Path, float32_store: Path, explanation: Explanation
) -> None:
    with FeatureStore.open(float32_store) as store:
        index = store.read("val", "frame_index", [row_of(store, VIDEO)])[0]
    assert explanation.frame_index == tuple(index.tolist())
    with av.open(str(video_folder / VIDEO)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    preprocessing = from_open_clip_config(load_backbone(f"local-dir:{tiny_clip}", None).preprocess_config)
    expected = preprocessing.pixels(frames[index]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(explanation.images, expected)


def test_the_cls_attention_is_that_of_torchs_own_attention_in_the_block(
    tiny_clip: Path, explanation: Explanation
) -> None:
    backbone = load_backbone(f"local-dir:{tiny_clip}", None)
    preprocessing = from_open_clip_config(backbone.preprocess_config)
    images = preprocessing.normalise(torch.from_numpy(explanation.images).permute(0, 3, 1, 2).contiguous())
    taps = backbone(images, inputs=[1, 2])
    assert [one.layer for one in explanation.found.layers] == [1, 2]
    for one in explanation.found.layers:
        block = backbone.visual.transformer.resblocks[one.layer]
        with torch.no_grad():
            x = block.ln_1(taps.inputs[one.layer])
            _, weights = block.attn(x, x, x, need_weights=True)  # (T, N, N), mean over heads
        np.testing.assert_allclose(one.cls, weights[:, 0].numpy(), atol=1e-6)
        np.testing.assert_allclose(one.cls.sum(axis=1), 1, atol=1e-6)


def test_the_querys_weights_are_the_heads_and_sum_to_1_over_all_frames(
    run: Path, float32_store: Path, explanation: Explanation
) -> None:
    head = Run.open(run).load_head()
    with FeatureStore.open(float32_store) as store:
        (batch,) = batches(store, head, batch_size=6)
        attention, row = head.attention(batch.features()), row_of(store, VIDEO)
    for one, (_, weights) in zip(explanation.found.layers, attention, strict=True):
        np.testing.assert_allclose(one.query, weights[row].mean(dim=0).numpy(), atol=1e-6)
        assert one.query.shape == (T, 1 + P) and one.query.sum() == pytest.approx(1, abs=1e-5)


def test_cross_frame_maps_are_the_softmax_of_the_patchs_query_over_both_neighbours(
    run: Path, float32_store: Path
) -> None:
    shown = explain(run, Question(video=VIDEO, frame=2, patch=(1, 3), layer=1), device="cpu").found.cross_frame
    with FeatureStore.open(float32_store) as store:
        q, k = (store.read("val", f"{kind}/1", [row_of(store, VIDEO)])[0] for kind in "qk")  # (T, H, N, d)
    assert shown and (shown.layer, shown.frame, shown.patch) == (1, 2, (1, 3))
    for neighbour, got in ((1, shown.previous), (3, shown.next)):
        scores = np.einsum("hd,hnd->hn", q[2, :, 1 + 4 * 1 + 3], k[neighbour, :, 1:]) / np.sqrt(q.shape[-1])
        expected = (np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)).mean(axis=0).reshape(GRID)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_patch_is_the_most_attended_one_unless_it_is_named(run: Path, explanation: Explanation) -> None:
    query = explanation.found.layers[-1].query[:, 1:]
    frame, patch = np.unravel_index(query.argmax(), query.shape)
    cross = explanation.found.cross_frame
    assert cross and (cross.frame, cross.patch) == (frame, divmod(int(patch), 4))
    first = explain(run, Question(video=VIDEO, frame=0), device="cpu").found.cross_frame
    assert first and (first.frame, first.patch) == (0, divmod(int(query[0].argmax()), 4))
    assert first.previous is None and first.next is not None
    placed = explain(run, Question(video=VIDEO, patch=(3, 1)), device="cpu").found.cross_frame
    assert placed and (placed.frame, placed.patch) == (int(query[:, 13].argmax()), (3, 1))


def test_a_video_is_named_by_id_row_path_or_file(
    run: Path, video_folder: Path, explanation: Explanation, tmp_path: Path
) -> None:
    copy = shutil.copy(video_folder / VIDEO, tmp_path / "mine.mp4")
    for question in (
        Question(row=explanation.row),
        Question(video=str(video_folder / VIDEO)),
        Question(video=str(copy)),
    ):
        other = explain(run, question, device="cpu")
        assert np.array_equal(other.images, explanation.images)
        assert np.array_equal(other.found.layers[-1].query, explanation.found.layers[-1].query)
        listed = question.video != str(copy)
        assert (other.truth, other.row) == ((explanation.truth, explanation.row) if listed else (None, None))


def test_layers_are_chosen_by_the_backbones_numbers(run: Path, explanation: Explanation) -> None:
    for asked, expected in ((None, [2]), (-1, [2]), (1, [1])):
        shown = explain(run, Question(video=VIDEO, layer=asked), device="cpu")
        assert [one.layer for one in shown.found.layers] == expected
        assert np.array_equal(shown.found.layers[0].query, explanation.found.layers[expected[0] - 1].query)


def test_another_video_under_the_name_is_told_and_drawn(run: Path, video_folder: Path, tmp_path: Path) -> None:
    (tmp_path / VIDEO).parent.mkdir(parents=True)
    shutil.copy(video_folder / "val/wave/w1.mp4", tmp_path / VIDEO)
    (note,) = explain(run, Question(video=VIDEO), root=tmp_path, device="cpu").notes
    assert "is not what tiny.zarr holds of this video" in note and "bound 1.0e-04" in note


@pytest.mark.parametrize(
    ("dtype", "cross_frame", "settings"),
    [("int8", "derive", {}), ("bfloat16", "maps", {}), ("float16", "none", {"temporal_cross_attention": False})],
)
def test_every_kind_of_store_is_recomputed_to_its_precision(
    config: Callable[..., ExtractionConfig], tmp_path: Path, dtype: str, cross_frame: str, settings: dict[str, object]
) -> None:
    extraction = config(dtype=dtype, cross_frame=cross_frame)
    run_extraction(extraction)
    assert isinstance(extraction.store, Path)
    shown = explain(train(extraction.store, tmp_path / "run", **settings), Question(row=0), device="cpu")
    assert shown.notes == () and shown.found.cross_frame is not None
    assert shown.found.layers[0].query.sum() == pytest.approx(1, abs=1e-4)


def test_an_imported_head_speaks_of_its_own_classes_in_their_order(
    run: Path, float32_store: Path, explanation: Explanation, tmp_path: Path
) -> None:
    imported = tmp_path / "imported"
    shutil.copytree(run, imported)
    config = json.loads((run / "config.json").read_text())
    config |= {"store": None, "imported": {"extract": "vcache extract", "settings": {}}}
    (imported / "config.json").write_text(json.dumps(config))
    names = (run / "classes.txt").read_text().split("\n")[:3]
    (imported / "classes.txt").write_text("\n".join(reversed(names)) + "\n")
    shown = explain(imported, Question(video=VIDEO), store=float32_store, device="cpu")
    mirrored = dict(zip(names, reversed(names), strict=True))
    assert [name for name, _ in shown.predictions] == [mirrored[name] for name, _ in explanation.predictions]
    assert shown.truth == explanation.truth
    assert any("in another order" in note for note in shown.notes)
    (imported / "classes.txt").unlink()
    unnamed = explain(imported, Question(video=VIDEO), store=float32_store, device="cpu")
    assert dict(unnamed.predictions) == pytest.approx(dict(explanation.predictions))


def test_other_versions_are_told_and_other_weights_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reextraction, "differences", [("versions.torch", "1.0", "2.0")])
    assert explain(run, Question(video=VIDEO), device="cpu").notes == (
        "versions.torch was '1.0' when tiny.zarr was made, and is '2.0' here.",
    )
    monkeypatch.setattr(Reextraction, "differences", [("weights", "aa", "bb")])
    with pytest.raises(CannotRecompute, match=r"weights was 'aa' when tiny.zarr was made, and is 'bb' here"):
        explain(run, Question(video=VIDEO), device="cpu")


@pytest.mark.parametrize(
    ("question", "error", "words"),
    [
        (Question(video="val/jump/j7.mp4"), UnknownVideo, r"neither a video of tiny.zarr nor a file. .* id is 'val/jump/j1"),
        (Question(row=99), UnknownVideo, r"row 99: split 'val' of tiny.zarr has the rows 0 to 5"),
        (Question(), UnknownVideo, r"one of VIDEO and --row"),
        (Question(video=VIDEO, layer=0), ExplainError, r"--layer 0: the head reads the layers 1, 2"),
        (Question(video=VIDEO, frame=5), ExplainError, r"--frame 5: the clip has the frames 0 to 4"),
        (Question(video=VIDEO, patch=(0, 4)), ExplainError, r"--patch 0,4: a frame has the rows 0 to 3 and columns 0 to 3"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_with_what_is(
    run: Path, question: Question, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        explain(run, question, device="cpu")


def test_a_missing_file_asks_for_the_root(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExplainError, match=r"j1.mp4 cannot be shown \(missing: .*\). Say where .* --root FOLDER"):
        explain(run, Question(video=VIDEO), root=tmp_path, device="cpu")


def test_a_run_on_every_few_frames_is_refused_for_that(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "frame_step": 5}))
    with pytest.raises(ExplainError, match=r"every 5. frame of the stored clips .* trained without --frame-step"):
        explain(copy, Question(video=VIDEO), device="cpu")


def test_a_head_without_a_query_is_refused_with_those_that_have_one(float32_store: Path, tmp_path: Path) -> None:
    linear = train(float32_store, tmp_path / "linear", "linear")
    with pytest.raises(ExplainError, match=r"head 'linear' of .* Runs of these heads can be explained: .*evl"):
        explain(linear, Question(video=VIDEO), device="cpu")


@pytest.mark.parametrize("pooling", ["spatial_mean", "temporal_mean", "cls"])
def test_a_head_that_pools_its_tokens_is_refused(float32_store: Path, tmp_path: Path, pooling: str) -> None:
    pooled = train(float32_store, tmp_path / "run", pooling=pooling, temporal_cross_attention=False)
    with pytest.raises(ExplainError, match=r"attends to pooled tokens, .* of \(5, 17\) .* trained without pooling"):
        explain(pooled, Question(video=VIDEO), device="cpu")


def test_cls_attention_of_half_precision_is_that_of_its_float32_values() -> None:
    q, k = torch.randn(2, 3, 4, 7, 5, generator=torch.Generator().manual_seed(0)).half()
    torch.testing.assert_close(cls_attention(q, k), cls_attention(q.float(), k.float()))


def test_the_command_writes_pictures_and_numbers(
    vcache: Callable[[str], tuple[int, str, str]], run: Path, tmp_path: Path
) -> None:
    status, out, err = vcache(f"explain {run} {VIDEO} --layer all --frame 2 --patch 1,3 --out {tmp_path / 'o'} --json")
    assert status == 0, err
    told = json.loads(out)
    assert told == json.loads((tmp_path / "o" / "explain.json").read_text())
    assert [layer["layer"] for layer in told["layers"]] == [1, 2] and told["cross_frame"]["patch"] == [1, 3]
    widths = {name: pixels(path).shape[1] for name, path in told["pictures"].items()}
    assert widths["attention"] > T * 160 and widths["cross_frame"] > 3 * 224
    status, out, _ = vcache(f"explain {run} --row 1 --out {tmp_path / 'o'}")
    assert status == 0 and "share of each frame" in out and "attention.png" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--patch 3", "--patch 3: say row and column, as 3,4."),
        ("--layer last", "--layer last: say the number of a layer, as 11 or -1, or all."),
        ("--split nowhere", "no split 'nowhere'"),
    ],
)
def test_options_that_cannot_be_read_are_one_sentence(
    vcache: Callable[[str], tuple[int, str, str]], run: Path, words: str, expected: str
) -> None:
    status, _, err = vcache(f"explain {run} {VIDEO} {words}")
    assert status == 1 and expected in err and "Traceback" not in err
