"""Imported heads on stores: what is checked in the place of a key, whose classes are whose, and what is said."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from viewed import TOKENS, video_ids, viewed_store

from vcache.heads.evl import EVL
from vcache.pipelines.evaluation.evaluate import evaluate_run, open_run_store
from vcache.pipelines.evaluation.metrics import Metrics
from vcache.pipelines.importing import ImportConfig, import_head
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.runs import Run, RunError

# What the stores of viewed.py hold: layer 2 of 3, 4 frames of 2x2 patches, width 6, 2 heads, classes a, b, c.
FITTING = {"num_classes": 3, "num_frames": 4, "width": 6, "num_heads": 2, "grid": (2, 2), "layers": (-1,)}
NUM_VIDEOS = 29


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store.zarr"
    ids = {"val": video_ids(NUM_VIDEOS)}
    viewed_store(path, ids=ids, definitions=(), held={"val": (0,)}, arrays={0: (TOKENS,)}).close()
    return path


def imported(folder: Path, *, classes: str | None = None, order: tuple[int, ...] = (0, 1, 2), **fields: Any) -> Path:
    """The run of a head with seeded weights, its outputs in `order`; `fields` are those in which its Config differs."""
    config = EVL.Config(**{**FITTING, "temporal_cross_attention": False, **fields})
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {
        name: torch.randn(x.shape, generator=generator) for name, x in EVL(config).state_dict().items()
    }
    if len(order) == config.num_classes:
        state |= {name: state[name][list(order)] for name in ("proj.2.weight", "proj.2.bias")}
    folder.mkdir()
    torch.save({"model": state}, folder / "file.pth")
    if classes is not None:
        (folder / "classes.txt").write_text("\n".join(classes))
    settings = {"num_heads": str(config.num_heads), "grid": ",".join(map(str, config.grid))}
    import_head(
        ImportConfig(
            head="evl",
            file=folder / "file.pth",
            classes=None if classes is None else folder / "classes.txt",
            settings=settings,
            out=folder / "run",
        )
    )
    return folder / "run"


def evaluated(run: Path, store: Path) -> tuple[Metrics, list[str]]:
    notes: list[str] = []
    return evaluate_run(run, store=store, device="cpu", on_note=notes.append), notes


def test_outputs_find_their_classes_by_name_in_any_order(store: Path, tmp_path: Path) -> None:
    same, _ = evaluated(imported(tmp_path / "same", classes="abc"), store)
    turned, notes = evaluated(imported(tmp_path / "turned", classes="cab", order=(2, 0, 1)), store)
    assert turned == same
    assert any("store's classes in another order" in note for note in notes)
    mistaken, _ = evaluated(imported(tmp_path / "mistaken", classes="abc", order=(2, 0, 1)), store)
    assert mistaken.loss != pytest.approx(same.loss, rel=1e-3)  # so the order mattered


def test_without_names_the_outputs_are_the_store_s_classes_and_it_is_said(store: Path, tmp_path: Path) -> None:
    named, notes = evaluated(imported(tmp_path / "named", classes="abc"), store)
    unnamed, more = evaluated(imported(tmp_path / "unnamed"), store)
    assert unnamed == named
    assert [note for note in more if note not in notes] == [
        "the checkpoint came without class names: its 3 outputs are taken for the classes of toy in their order. Import it "
        "with --classes FILE to have that checked."
    ]
    with pytest.raises(RunError, match="was imported without class names. Import it again with --classes FILE"):
        Run.open(tmp_path / "unnamed" / "run").class_names()


@pytest.mark.parametrize(
    ("fields", "classes", "error", "words"),
    [
        ({"width": 8}, None, RunError, "reads features of width 8; .* holds those of tiny, with 6. .* vcache extract DATASET"),
        ({"grid": (1, 4)}, None, RunError, "reads features of grid 1x4; .* with 2x2"),
        ({"num_frames": 5}, None, HeadStoreMismatch, "reads clips of 5 frames; store.zarr holds clips of 4"),
        ({"layers": (-2, -1)}, None, HeadStoreMismatch, "tokens of layers 1-2; split 'val' .* holds tokens of layers 2"),
        ({"layers": (-4, -3, -2, -1)}, None, HeadStoreMismatch, "reads a layer that tiny does not have"),
        ({"num_classes": 4}, None, RunError, "has 4 classes; .*store.zarr holds toy with 3"),
        ({}, "abd", RunError, "other classes than .*, which holds toy with 3: 'd' and 0 more are not among them"),
        ({"temporal_cross_attention": True}, None, HeadStoreMismatch, "Q/K of layers 2"),
    ],
)  # fmt: skip
def test_a_store_that_the_head_cannot_read_is_refused_in_words(
    fields: Mapping[str, Any], classes: str | None, error: type[Exception], words: str, store: Path, tmp_path: Path
) -> None:
    run = imported(tmp_path / "a", classes=classes, **fields)
    with pytest.raises(error, match=words):
        evaluate_run(run, store=store)


def test_a_store_has_to_be_named(store: Path, tmp_path: Path) -> None:
    run = imported(tmp_path / "a")
    with pytest.raises(
        RunError, match="so it has no store of its own. Name one with --store; .* vcache extract DATASET"
    ):
        evaluate_run(run)
    with pytest.raises(RunError, match="none.zarr is not there"):
        evaluate_run(run, store=tmp_path / "none.zarr")
    with open_run_store(Run.open(run), store) as opened:
        assert opened.path == store


def test_whose_features_they_are_is_said_where_it_is_not_openai_s(tmp_path: Path) -> None:
    run = imported(tmp_path / "a", classes="abc")
    said = {}
    for name, pretrained in (("openai", "openai"), ("laion", "laion2b_s34b_b88k"), ("folder", None)):
        path = tmp_path / f"{name}.zarr"
        request = {"pretrained": pretrained, "model": "local-dir:clip" if pretrained is None else "ViT-B-16"}
        held, arrays = {"val": (0,)}, {0: (TOKENS,)}
        viewed_store(path, definitions=(), ids={"val": video_ids(7)}, held=held, arrays=arrays, request=request).close()
        said[name] = evaluated(run, path)[1]
    rounding = "its backbone ran in float32, the official one in float16: "
    assert [len(said[name]) for name in said] == [1, 2, 2]
    assert all(notes[-1].startswith(rounding) for notes in said.values())
    assert "laion.zarr has those of laion2b_s34b_b88k" in said["laion"][0]
    assert "folder.zarr has those of local-dir:clip" in said["folder"][0]


def test_the_command_line_keeps_what_it_notes_out_of_the_json(
    store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    run = imported(tmp_path / "a")
    status, out, err = vcache(f"eval {run} --store {store} --json")
    assert status == 0
    assert np.isfinite(json.loads(out)["loss"]) and json.loads(out)["num_videos"] == NUM_VIDEOS
    assert err.count("note: ") == 2
    status, _, err = vcache(f"eval {run}")
    assert (status, "has no store of its own" in err) == (1, True)
