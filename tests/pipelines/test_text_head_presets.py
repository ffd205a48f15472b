"""Presets of the heads on the frames' embeddings: the rows of Text4Vis's and ActionCLIP's tables, and stores made for them."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.main import get_command

from vcache.extract.datasets.registry import list_datasets
from vcache.heads.registry import get_head
from vcache.heads.requirements import Recipe
from vcache.pipelines import head_presets, text4vis_presets
from vcache.pipelines.cli import app
from vcache.pipelines.clip_towers import CLIP_TOWERS, ClipTower
from vcache.pipelines.counting import preset_config
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.head_presets import HeadPreset, check_store, presets_of
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.stored_views import parse_grid
from vcache.pipelines.templates import EVERY_STORE, TEMPLATE_SETS
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.reader import FeatureStore

ALL = {f"{head} {name}": preset for head in ("text4vis", "actionclip") for name, preset in presets_of(head).items()}
Vcache = Callable[..., tuple[int, str, str]]

# Wu et al. 2023, Table 5: one view and 4x3.
TABLE_5 = {
    **{"b32-8f": (77.97, 79.57), "b32-16f": (79.17, 80.37), "b16-8f": (81.52, 82.65), "b16-16f": (82.34, 83.15)},
    **{"l14-8f": (84.82, 85.83), "l14-16f": (85.85, 86.36), "l14-32f": (86.39, 87.09)},
    **{"l14-336-8f": (84.94, 86.23), "l14-336-16f": (86.05, 86.63), "l14-336-32f": (86.60, 87.30)},
}
TEXT4VIS = {
    **{f"k400-{row}": one for row, (one, _) in TABLE_5.items()},
    **{f"k400-{row}-4x3": twelve for row, (_, twelve) in TABLE_5.items()},
    **{"k400-b16-8f-random": 59.30, "k400-b16-8f-orthogonal": 59.44, "k400-b16-8f-distilbert": 81.45},  # Table 1
    "k400-b16-8f-lda": 80.77,
    "k400-b16-8f-vision-only": 75.27,  # Table 3
    **{"k400-b16-8f-tap": 80.13, "k400-b16-8f-t1d": None},  # Table 2
    **{"k400-b16-8f-label": 81.37, "k400-b16-8f-templates": 80.88, "k400-b16-8f-coop": 81.22},  # Table 4
    "k400-b16-8f-unfrozen": 79.16,  # Table A.2
    **{"k400-b16-8f-few-shot": 80.13, "ucf101-b16-8f-few-shot": 95.24, "hmdb51-b16-8f-few-shot": 73.18},  # Table 8
    **{"k300-b16-8f-zero-shot": 66.38, "k400-b16-8f-zero-shot": 74.67},  # Table 9
    **{"ucf101-l14-8f": 98.2, "hmdb51-l14-8f": 79.0},  # Table A.1
}
ACTIONCLIP = {
    "k400-b32-8f-frozen": 72.21,  # Table 5, V1
    "k400-b32-8f": 78.36,
    "k400-b32-8f-label": 77.82,  # Table 3
    **{"k400-b32-8f-meanp": 77.11, "k400-b32-8f-lstm": 77.09, "k400-b32-8f-conv1d": 77.04},  # Table 4
    "k400-b32-8f-transf-cls": 78.12,
    **{"k400-b16-8f": 81.09, "k400-b16-16f": 81.68, "k400-b16-32f": 82.32},  # Table 6
    **{"k400-b16-16f-10x3": 82.6, "k400-b16-32f-10x3": 83.8},  # Table 8
}


@pytest.mark.parametrize(("head", "rows"), [("text4vis", TEXT4VIS), ("actionclip", ACTIONCLIP)])
def test_the_rows_of_the_tables_are_there_with_their_accuracies(head: str, rows: dict[str, float | None]) -> None:
    assert {name: preset.top1 for name, preset in presets_of(head).items()} == rows
    assert len(presets_of(head)) == len(__import__(f"vcache.pipelines.{head}_presets", fromlist=["PRESETS"]).PRESETS)


def test_every_note_says_that_the_paper_trained_the_towers_but_for_the_row_that_did_not() -> None:
    without = [name for name, preset in ALL.items() if "paper trains" not in preset.note]
    assert without == ["actionclip k400-b32-8f-frozen"]
    assert all("frozen here" in preset.note for name, preset in ALL.items() if name not in without)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text4vis k400-b16-8f-random", {"classifier": "random"}),
        ("text4vis k400-b16-8f-orthogonal", {"classifier": "orthogonal"}),
        ("text4vis k400-b16-8f-lda", {"classifier": "lda"}),
        ("text4vis k400-b16-8f-vision-only", {"classifier": "learned", "temporal": "tap"}),
        ("text4vis k400-b16-8f-templates", {"training_templates": "clip_kinetics"}),
        ("text4vis k400-b16-8f-coop", {"classifier": "coop"}),
        ("text4vis k400-b16-8f-tap", {"temporal": "tap"}),
        ("text4vis k400-b16-8f-unfrozen", {"frozen": False}),
        ("text4vis k400-b16-8f-label", {"templates": "label"}),
        ("text4vis k400-b16-8f-4x3", {}),
        ("actionclip k400-b32-8f-frozen", {}),
        ("actionclip k400-b32-8f-transf-cls", {"prompt": "transf_cls"}),
        ("actionclip k400-b32-8f-label", {"templates": "label"}),
    ],
)
def test_a_variant_is_the_default_but_for_what_it_is_named_after(name: str, settings: dict[str, object]) -> None:
    preset = ALL[name]
    tower, head = CLIP_TOWERS[preset.model], get_head(preset.head)
    default = head.Config(num_classes=400, **tower.facts_for(head.Config))
    assert preset_config(preset.head, tower, preset, {}) == replace(default, **settings)


@pytest.mark.parametrize("name", ALL)
def test_every_preset_can_be_built_and_its_extract_line_makes_what_its_head_reads(name: str) -> None:
    preset = ALL[name]
    tower, head = CLIP_TOWERS[preset.model], get_head(preset.head)
    config = preset_config(preset.head, tower, preset, {})
    asked = head.requires(config)
    assert config.embed_dim == tower.embed_dim and config.num_classes == preset.num_classes
    assert getattr(config, "num_frames", preset.frames) == preset.frames
    assert asked.embed and not (asked.tokens or asked.cls or asked.maps or asked.pixels)
    assert "Table" in preset.source and preset.dataset in list_datasets()
    Recipe(**{**vars(head.recipe), **preset.recipe})
    _, command, dataset, *words = shlex.split(preset.extract_line)
    context = get_command(app).commands[command].make_context(command, [dataset, *words])  # type: ignore[attr-defined]
    said = context.params
    assert (said["layers"], said["cross_frame"]) == ("none", None) and "--cross-frame" not in words
    assert (said["frames"], said["tsn"], said["pixels"]) == (preset.frames, True, 0)
    assert (said["model"] or ["ViT-B-16-quickgelu"]) == [preset.model]
    assert said["augment"] == preset.head and said["eval_views"] == preset.eval_views
    assert parse_grid(preset.eval_views) in ((1, 1), (4, 3), (10, 3))


@pytest.mark.parametrize("name", ALL)
def test_text_that_extract_does_not_write_is_added_by_the_lines_of_the_preset(name: str) -> None:
    preset = ALL[name]
    asked = get_head(preset.head).requires(preset_config(preset.head, CLIP_TOWERS[preset.model], preset, {}))
    commands = get_command(app).commands  # type: ignore[attr-defined]
    added = set()
    for line in preset.text_lines:
        words = shlex.split(line)
        assert words[:4] == ["vcache", "text", "STORE", "--templates"] and words[1] in commands
        assert words[4] in TEMPLATE_SETS and words[5:] == (["--encoder", preset.encoder] if preset.encoder else [])
        added.add(words[4] + ("_distilbert_base_uncased" if preset.encoder else ""))
    wanted = {asked.text, getattr(asked, "training_text", None)} - {None, *EVERY_STORE}
    assert added == wanted


def test_the_screens_show_them(vcache: Vcache) -> None:
    for head, rows in (("text4vis", TEXT4VIS), ("actionclip", ACTIONCLIP)):
        status, printed, _ = vcache(f"heads {head}", columns=80)
        listed = printed[printed.index("--preset NAME") :].splitlines()[1:-2]
        assert status == 0 and max(map(len, listed)) <= 80 and [line.split()[0] for line in listed] == list(rows)
        assert "reads      the embedding; text of the classes\n" in printed
    status, printed, _ = vcache("heads text4vis --preset k400-b16-8f-distilbert")
    assert status == 0 and "  settings   templates=text4vis_distilbert_base_uncased\n" in printed
    assert "vcache text STORE --templates text4vis --encoder distilbert/distilbert-base-uncased\n" in printed
    assert "vcache extract k400 --layers none --tsn --views 8 --augment text4vis\n" in printed
    assert "without a number there" in vcache("heads text4vis --preset k400-b16-8f-t1d")[1]
    printed = vcache("heads text4vis --preset ucf101-b16-8f-few-shot")[1]
    assert "epochs=200" in printed and "88.77, 92.78 and 93.87%" in printed and "scale of the cosines" in printed
    described = json.loads(vcache("heads actionclip --preset k400-b32-8f-frozen --json")[1])
    assert (described["top1"], described["text"], described["settings"]) == (72.21, [], {})


@contextmanager
def presets(monkeypatch: pytest.MonkeyPatch, *own: HeadPreset) -> Iterator[None]:
    tower = ClipTower(num_layers=3, width=48, num_heads=4, patch_size=8, image_size=32, embed_dim=20)
    with monkeypatch.context() as patch:
        patch.setattr(head_presets, "CLIP_TOWERS", {**CLIP_TOWERS, "tiny": tower})
        patch.setattr(text4vis_presets, "PRESETS", own)
        yield


TINY = HeadPreset(
    name="tiny-5f",
    head="text4vis",
    source="Table 0",
    settings={"temporal": "tap", "classifier": "random", "frozen": False},
    recipe={"epochs": 2, "warmup_epochs": 0.0},
    dataset="toy",
    num_classes=3,
    model="tiny",
    frames=5,
    eval_views="1x1",
    augment="text4vis",
)


@pytest.fixture(scope="module")
def alone(tiny_extraction: Callable[..., ExtractionConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of 5 segments of each video; read only."""
    path = tmp_path_factory.mktemp("store") / "alone.zarr"
    run_extraction(tiny_extraction(store=path, layers="none", cross_frame="none", tsn=True, stride=16))
    return path


def test_a_head_that_takes_any_number_of_frames_is_trained_on_those_of_the_preset(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "num_frames" not in {field.name for field in fields(get_head("text4vis").Config)}
    config = TrainingConfig(head="text4vis", preset="tiny-5f", store=alone, out=tmp_path / "run", device="cpu")
    with presets(monkeypatch, TINY), FeatureStore.open(alone) as store:
        assert train_head(config).epochs == 2  # batches of 256, of 12 videos
        other = replace(TINY, frames=7)
        with pytest.raises(HeadStoreMismatch, match=r"of 7 frames, sampled as in TSN; alone\.zarr holds") as refused:
            check_store(other, store.manifest, {}, "alone.zarr")
        assert " --layers none " in str(refused.value) and " --frames 7 " in str(refused.value)


@pytest.mark.parametrize("shots", [None, 1])
def test_training_the_scale_alone_works_and_changes_no_answer(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: int | None
) -> None:
    """What the rows with TAP and frozen text are on frozen embeddings."""
    settings = {"temporal": "tap", "classifier": "random", "lr": 0.1}
    config = TrainingConfig(
        head="text4vis",
        preset="tiny-5f",
        settings=settings | {"frozen": True},
        store=alone,
        out=tmp_path / "run",
        device="cpu",
        **({"shots": shots} if shots else {}),
    )
    with presets(monkeypatch, TINY):
        train_head(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({line["val_top1"] for line in lines if "val_top1" in line}) == 1
