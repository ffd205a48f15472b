"""Views as `vcache extract` stores them: each can be made again from its record, and no other view changes a bit of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vcache.extract.decode import decode_video
from vcache.extract.sampling import ClipRule, StridedSampling
from vcache.extract.video import DecodeRequest
from vcache.extract.views import view_from_dict
from vcache.pipelines.extract_commands import extract_command
from vcache.pipelines.extraction import ExtractionSummary, run_extraction
from vcache.pipelines.listing import describe_store, print_store
from vcache.pipelines.request import ExtractionConfig, ExtractionError
from vcache.pipelines.setup import prepare_extraction
from vcache.pipelines.stored_views import extraction_words
from vcache.pipelines.verification import verify
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]
VIEWED = {"views": 3, "eval_views": "2x3", "augment": "evl", "pixels": 10}


@pytest.fixture(scope="module")
def viewed(video_folder: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractionConfig:
    """Three training views, a grid of six, and the pixels of twice as many frames; read only."""
    config = ExtractionConfig(
        dataset=str(video_folder),
        layers="-1",
        frames=5,
        stride=3,
        cross_frame="none",
        model=f"local-dir:{tiny_clip}",
        pretrained=None,
        dtype="float32",
        store=tmp_path_factory.mktemp("viewed") / "store.zarr",
        batch_size=3,
        device="cpu",
        **VIEWED,
    )
    run_extraction(config)
    return config


def rows_of(store: FeatureStore, split: str, view: int, *names: str) -> list[np.ndarray]:
    rows = np.flatnonzero(store.committed_rows(split, list(names), view))
    assert len(rows) == store.splits[split]
    return [store.read(split, name, rows, view=view) for name in names]


def test_each_split_has_its_views_and_the_manifest_says_what_they_are(viewed: ExtractionConfig) -> None:
    with FeatureStore.open(viewed.store) as store:
        definitions = store.manifest.facts["views"]
        assert store.views("train") == (0, 1, 2) and store.views("val") == (0, 3, 4, 5, 6, 7, 8)
        assert [definition["kind"] for definition in definitions] == ["evaluation"] + 2 * ["training"] + 6 * [
            "evaluation"
        ]
        assert definitions[5] == {"kind": "evaluation", "temporal": [0, 2], "spatial": [2, 3]}
        assert {"frame_index", "crop", "flip", "augment", "pixels", "pixel_index"} <= store.arrays("train", 1).keys()
        assert "augment" not in store.arrays("train", 0)


@pytest.mark.parametrize("split, view", [("train", 0), ("train", 2), ("val", 4)])
def test_a_stored_view_is_made_again_from_its_record(viewed: ExtractionConfig, split: str, view: int) -> None:
    setup = prepare_extraction(viewed)
    with FeatureStore.open(viewed.store) as store:
        names = [name for name in store.arrays(split, view) if "/" not in name and name != "embed"]
        records = dict(zip(names, rows_of(store, split, view, *names), strict=True))
        (tokens,) = rows_of(store, split, view, "tokens/2")
        definition = view_from_dict(store.manifest.facts["views"][view])
        paths = store.videos(split).paths
        for row, path in enumerate(paths):
            record = {name: values[row] for name, values in records.items()}
            every = ClipRule(sampling=StridedSampling(num_frames=40, stride_frames=1))  # longer than any video
            decoded = decode_video(DecodeRequest(path=Path(viewed.dataset) / path, clips=(every,)))
            images = definition.replay(decoded.pick(record["frame_index"].tolist()), record, setup.preprocessing)
            np.testing.assert_array_equal(record["pixels"][::2], images.permute(0, 2, 3, 1).numpy())
            taps = setup.backbone(setup.preprocessing.normalise(images.contiguous()), tokens=[2])
            torch.testing.assert_close(torch.from_numpy(tokens[row]), taps.tokens[2], rtol=1e-4, atol=1e-5)


def test_views_differ_from_each_other(viewed: ExtractionConfig) -> None:
    with FeatureStore.open(viewed.store) as store:
        pixels = [rows_of(store, "train", view, "pixels")[0] for view in (0, 1, 2)]
        assert all((a != b).any(axis=(1, 2, 3, 4)).all() for a, b in [(pixels[0], pixels[1]), (pixels[1], pixels[2])])


def test_verify_deep_makes_rows_of_all_views_again(viewed: ExtractionConfig) -> None:
    deep = verify(viewed.store, deep=30)
    assert deep["ok"] and deep["deep"]["rows"] == deep["deep"]["equal_rows"] == 30


def test_the_same_command_gives_the_same_view_under_any_number(viewed: ExtractionConfig, config: MakeConfig) -> None:
    words = {"layers": "-1", "cross_frame": "none"}
    run_extraction(config(**words, eval_views="1x3"))
    run_extraction(config(**words, views=2, augment="evl"))
    with FeatureStore.open(config().store) as other, FeatureStore.open(viewed.store) as store:
        assert other.views("train") == (0, 4) and store.views("train") == (0, 1, 2)
        names = ("frame_index", "crop", "flip", "augment", "tokens/2")
        for ours, theirs in zip(rows_of(other, "train", 4, *names), rows_of(store, "train", 1, *names), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_views_and_pixels_are_added_and_nothing_stored_is_rewritten(config: MakeConfig) -> None:
    def files() -> dict[str, bytes]:
        store = config().store
        return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}

    run_extraction(config(layers="-1", cross_frame="none", views=2))
    before = files()
    run_extraction(config(layers="-1", cross_frame="none", views=3, pixels=5))
    after = files()
    assert {name for name in before if after[name] != before[name]} == {"zarr.json"}  # which holds the definitions
    with FeatureStore.open(config().store) as store:
        assert store.views("train") == (0, 1, 2) and store.views("val") == (0,)
        for split, view in [("train", 0), ("train", 1), ("train", 2), ("val", 0)]:
            pixels, clip, index = rows_of(store, split, view, "pixels", "frame_index", "pixel_index")
            assert pixels.shape[1:] == (5, 32, 32, 3) and (clip == index).all()
    with pytest.raises(ExtractionError, match="--pixels 10: .* keeps 5 pixel frames of each clip. Say --pixels 5"):
        run_extraction(config(layers="-1", cross_frame="none", pixels=10))


def test_a_video_that_broke_before_views_were_added_is_counted_and_named(
    config: MakeConfig, video_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(video_folder, videos)

    def extract(views: int) -> ExtractionSummary:
        return run_extraction(config(dataset=str(videos), layers="-1", cross_frame="none", views=views))

    extract(1)
    with FeatureStore.open(config().store) as store:
        broken = store.videos("train").paths[2]
    (videos / broken).write_bytes(b"")
    summary = extract(3)
    assert [(failure.row, failure.path, failure.kind) for failure in summary.failures] == [(2, broken, "empty")]
    description = describe_store(config().store)
    train = description["splits"]["train"]
    assert train["failed"] == 1 and train["arrays"]["embed"]["stored"] == train["videos"]
    print_store(description)
    line = f"train: views 1 to 2: training, crop-flip, seed 0, of {train['videos'] - 1} of {train['videos']} videos"
    assert line in capsys.readouterr().out


def test_the_command_that_adds_a_view_names_its_recipe(viewed: ExtractionConfig) -> None:
    with FeatureStore.open(viewed.store) as store:
        words = extraction_words(store.manifest, [0, 1, 2, 9])
        assert words == {"views": 4, "augment": "evl", "view_seed": 0}
        line = extract_command(
            store.manifest, layers="-1", frames=None, store=store.path, cross_frame="none", words=words
        )
    assert "--views 4 --eval-views 2x3 --augment evl --pixels 10 " in line


@pytest.mark.parametrize(
    "words, message",
    [
        ({"views": 0}, "--views 0: must be at least 1, which is view 0"),
        ({"eval_views": "3"}, "--eval-views '3': say TxS"),
        ({"eval_views": "0x3"}, "--eval-views '0x3': say TxS"),
        ({"pixels": 7}, "--pixels 7: must be a multiple of the 5 frames of a clip, as 10"),
        ({"augment": "evll"}, "--augment: there is no recipe 'evll'. Did you mean 'evl'?"),
    ],
)
def test_words_that_make_no_views_are_refused(config: MakeConfig, words: dict[str, object], message: str) -> None:
    with pytest.raises(ExtractionError) as caught:
        config(**words)
    assert message in str(caught.value)


def test_a_model_that_sees_squashed_frames_has_one_crop(config: MakeConfig, tiny_clip: Path, tmp_path: Path) -> None:
    squashing = shutil.copytree(tiny_clip, tmp_path / "squashing")
    words = json.loads((squashing / "open_clip_config.json").read_text())
    words["preprocess_cfg"]["resize_mode"] = "squash"
    (squashing / "open_clip_config.json").write_text(json.dumps(words))
    with pytest.raises(ExtractionError, match="--eval-views 4x3: .* there is one crop. Say --eval-views 4x1"):
        prepare_extraction(config(model=f"local-dir:{squashing}", eval_views="4x3"))
    assert len(prepare_extraction(config(model=f"local-dir:{squashing}", eval_views="4x1")).wanted_views) == 5


def test_the_command_line_takes_the_views(
    vcache: Callable[[str], tuple[int, str, str]], video_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    words = "--views 4 --eval-views 3x1 --view-seed 5 --augment dist --pixels 6"
    status, _, err = vcache(
        f"extract {video_folder} --model local-dir:{tiny_clip} --layers -1 --frames 3 --stride 2 --cross-frame none "
        f"--split val {words} --store {tmp_path / 's.zarr'} --device cpu"
    )
    assert status == 0, err
    with FeatureStore.open(tmp_path / "s.zarr") as store:
        asked = {"views": 4, "eval_views": "3x1", "view_seed": 5, "augment": "dist", "pixels": 6}
        assert {name: store.manifest.facts["request"][name] for name in asked} == asked
        assert store.views("val") == (0, 4, 5, 6)
