"""Exported folders: the scores of the run to the bit without anything of it, and every damage named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vcache.extract.datasets.base import Video
from vcache.extract.views import PreparedClip
from vcache.heads.prompt_learning import ClassPrompts
from vcache.heads.requirements import ClipFeatures
from vcache.heads.text4vis import Text4Vis
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.prediction import export
from vcache.pipelines.prediction.export import export_run
from vcache.pipelines.prediction.export_check import ExportError, check_program
from vcache.pipelines.prediction.export_files import settled_head
from vcache.pipelines.prediction.export_program import ProgramInput
from vcache.pipelines.prediction.exported_folder import ExportedFolderError, is_exported, open_exported
from vcache.pipelines.prediction.video_model import VideoModel, open_video_model
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head

SHORT = {"epochs": 1, "batch_size": 6, "lr": 0.01}


def trained(store: Path, out: Path, head: str, frame_step: int = 1, **settings: Any) -> Path:
    train_head(
        TrainingConfig(
            head=head, store=store, out=out, device="cpu", frame_step=frame_step, settings={**SHORT, **settings}
        )
    )
    return out


def real_clips(model: VideoModel, videos: Path) -> list[PreparedClip]:
    (view,) = model.views()
    paths = sorted((videos / "val").rglob("*.mp4"))[:3]
    return [model.extractor.prepare(Video(path.stem, str(path), 0, "val"), view) for path in paths]


@pytest.fixture(scope="module")
def run(float32_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return trained(float32_store, tmp_path_factory.mktemp("runs") / "evl", "evl", layers="-2:")


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, out=tmp_path_factory.mktemp("exports") / "evl").folder


@pytest.mark.parametrize(
    ("head", "extracted", "settings"),
    [
        ("evl", {"layers": "stem,0:", "dtype": "int8", "cross_frame": "derive"}, {"layers": "-2:"}),
        ("evl", {"dtype": "bfloat16", "cross_frame": "maps"}, {"layers": "-1:"}),
        ("linear", {"dtype": "float16", "frames": 6}, {"frame_step": 3}),
        ("aim", {"layers": "0:", "cross_frame": "none"}, {"blocks": 2, "warmup_epochs": 0.0}),
    ],
    ids=["int8 and derived maps", "bfloat16 and maps", "every third frame", "top blocks"],
)
def test_a_folder_gives_the_bits_of_the_run_when_run_store_and_checkpoint_are_gone(
    head: str,
    extracted: dict[str, Any],
    settings: dict[str, Any],
    tiny_extraction: Callable[..., ExtractionConfig],
    tiny_clip: Path,
    video_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_extraction(tiny_extraction(store=tmp_path / "store.zarr", **extracted))
    run = trained(tmp_path / "store.zarr", tmp_path / "run", head, **settings)
    model = open_video_model(run, device="cpu")
    wanted = model.scores(clips := real_clips(model, video_folder))
    export_run(run, out=tmp_path / "folder")
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "store.zarr")
    monkeypatch.setattr("vcache.extract.backbone.find_checkpoint", None)  # what is called would fail
    exported = open_video_model(tmp_path / "folder", device="cpu")
    assert exported.class_names == model.class_names and exported.notes == ()
    torch.testing.assert_close(exported.scores(real_clips(exported, video_folder)), wanted, rtol=0, atol=0)
    assert len(clips) == 3 and wanted.std() > 0


def test_a_head_on_pixels_and_text_keeps_its_bits(dist_run: Path, video_folder: Path, tmp_path: Path) -> None:
    model = open_video_model(dist_run, device="cpu")
    exported = open_exported(export_run(dist_run, out=tmp_path / "dist").folder, "cpu")
    clips = real_clips(exported, video_folder)
    torch.testing.assert_close(exported.scores(clips), model.scores(clips), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["config.json", "classes.txt", "head.safetensors", "backbone.safetensors"])
@pytest.mark.parametrize("place", [0.1, 0.6])
def test_a_flipped_byte_is_refused_by_name(folder: Path, tmp_path: Path, name: str, place: float) -> None:
    shutil.copytree(folder, copy := tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ExportedFolderError, match=rf"{name} .*was (exported|not written)|{name} was not written"):
        open_exported(copy, "cpu")
    (copy / name).unlink()
    with pytest.raises(ExportedFolderError, match=name):
        open_exported(copy, "cpu")


@pytest.mark.parametrize("damage", ["gone", "no JSON", "another kind"])
def test_a_damaged_config_is_named_where_a_run_might_be_too(folder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(folder, copy := tmp_path / "copy")
    text = (copy / "config.json").read_text()
    (copy / "config.json").unlink()
    if damage != "gone":
        (copy / "config.json").write_text(
            text[1:] if damage == "no JSON" else text.replace("vcache export", "vcache exporT")
        )
    with pytest.raises(ExportedFolderError, match=r"config\.json"):
        open_video_model(copy, device="cpu")


def test_what_is_asked_of_runs_alone_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportedFolderError, match=r"has the last weights .* vcache export RUN --which best"):
        open_video_model(folder, which="best", device="cpu")
    with pytest.raises(ExportedFolderError, match="Leave --store out"):
        open_video_model(folder, store=tmp_path / "x.zarr", device="cpu")
    if (run / "best.safetensors").exists():
        best = export_run(run, out=tmp_path / "best", which="best").folder
        for which in ("last", "best"):  # the default, which asks for nothing, and what it has
            assert open_video_model(best, which=which, device="cpu").class_names


def test_what_a_killed_export_left_is_removed_by_the_next(run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".mine[1].0123456789ab.tmp"
    left.mkdir()
    (left / "backbone.safetensors").write_bytes(b"half")
    (tmp_path / ".other.0123456789ab.tmp").mkdir()
    export_run(run, out=tmp_path / "mine[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123456789ab.tmp", "mine[1]"]


def test_programs_are_compared_in_batches_of_three_where_the_model_has_smaller_ones(run: Path) -> None:
    model = open_video_model(run, device="cpu")
    clips = ProgramInput.of(model).random_clips(model, 3)
    scores = torch.cat([model.scores(clips[i : i + 1]) for i in range(3)]).numpy()
    model.extractor.batch_size = 1
    asked: list[int] = []

    def only_one(frames: Any) -> Any:
        asked.append(len(frames))
        return scores[: len(frames)] if len(frames) == 1 else scores[: len(frames)] + 1.0

    with pytest.raises(ExportError, match="gives other logits"):
        check_program("model.onnx", only_one, model)
    assert asked == [1, 3]


def test_a_changed_model_card_is_told_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / "README.md").write_text("mine")
    assert open_exported(copy, "cpu").notes == (f"{copy / 'README.md'} is not the model card that was exported.",)


def test_a_folder_is_recognised_and_nothing_else_is(folder: Path, run: Path, tmp_path: Path) -> None:
    assert is_exported(folder) and not is_exported(run) and not is_exported(tmp_path)
    with pytest.raises(ExportedFolderError, match=r"has no config\.json.*vcache export RUN"):
        open_exported(tmp_path, "cpu")


def test_the_config_names_no_folder_of_this_machine(folder: Path, tmp_path: Path, tiny_clip: Path) -> None:
    for name in ("config.json", "README.md"):
        text = (folder / name).read_text()
        assert "local-dir:" not in text and str(tiny_clip.parent) not in text and str(Path.home()) not in text


def test_what_fails_half_way_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(export, "write_config", fail)
    with pytest.raises(OSError, match="the disk is full"):
        export_run(run, out=tmp_path / "out" / "folder")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("wrong", [lambda x: x + 2e-3, lambda x: x * float("nan"), lambda x: x[:, :1]])
def test_a_program_with_other_logits_is_refused(run: Path, wrong: Callable[[Any], Any]) -> None:
    model = open_video_model(run, device="cpu")
    clips = ProgramInput.of(model).random_clips(model, 3)

    def right(frames: Any) -> Any:
        return model.scores(clips[: len(frames)]).numpy()

    assert check_program("model.onnx", right, model).max_difference < 1e-5
    with pytest.raises(ExportError, match=r"model\.onnx gives .*not kept"):
        check_program("model.onnx", lambda frames: wrong(right(frames)), model)


def test_the_command_writes_a_folder_with_a_card(
    run: Path, tmp_path: Path, vcache: Callable[..., tuple[int, str, str]]
) -> None:
    assert vcache(f"eval {run} --device cpu")[0] == 0
    status, out, _ = vcache(f"export {run} --out {tmp_path / 'mine'} --json")
    told = json.loads(out)
    assert status == 0 and told["folder"] == str(tmp_path / "mine") and told["num_classes"] == 3
    card = (tmp_path / "mine" / "README.md").read_text()
    assert re.search(r"\| val \| 1x1 \| 6 \| top-1 \| [\d.]+% \| [\d.]+% to [\d.]+% \|", card)
    assert "vcache predict mine" in card and "clap hands, jump, wave" in card
    status, _, err = vcache(f"export {run} --out {tmp_path / 'mine'}")
    assert status == 1 and "is there already" in err
    status, _, err = vcache(f"export {run} --out .")
    assert status == 1 and "name a new one in it" in err
    status, _, err = vcache(f"export {tmp_path / 'mine'} --out {tmp_path / 'other'}")
    assert status == 1 and "is an exported folder already" in err
    status, _, err = vcache(f"export {run} --out {tmp_path / 'other'} --format pdf")
    assert status == 1 and "choose from: folder, onnx, torch" in err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("own", [False, True], ids=["one context", "a context for each class"])
def test_learnt_prompts_become_what_they_were_read_as(own: bool) -> None:
    torch.manual_seed(5)
    config = Text4Vis.Config(
        num_classes=3, embed_dim=8, classifier="coop", context_length=2, context_width=6, class_specific_context=own
    )
    head = Text4Vis(config).eval()
    mix = torch.randn(6, 8)
    head.set_prompts(
        ClassPrompts(
            torch.randn(3, 7, 6),
            torch.tensor([6, 4, 5]),
            lambda tokens, ends: tokens.mean(dim=1) @ mix,
            logit_scale=2.0,
        )
    )
    features = ClipFeatures(embed=torch.randn(4, 5, 8))
    settled = settled_head(head)
    assert settled.config.classifier == "text" and not type(settled).requires(settled.config).prompts
    with torch.no_grad():
        torch.testing.assert_close(settled(features), head(features), rtol=0, atol=0)
