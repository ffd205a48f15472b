"""`vcache zero-shot`: the embeddings of videos against text, held against NumPy, on toy stores; and a real text tower."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from named import named_store
from safetensors.torch import load_file, save_file
from worded import CLASSES, clip_scores, cosines_100, embeddings, labels_of, softmax, text_of, worded_store

from vcache.extract.text import load_text_tower
from vcache.pipelines.class_file import ClassFileError
from vcache.pipelines.class_text import class_text
from vcache.pipelines.evaluation.ensemble import EnsembleConfig, run_ensemble
from vcache.pipelines.evaluation.half_classes import HalfClassesError
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.runs import RunError
from vcache.pipelines.text_command import add_text
from vcache.pipelines.text_sets import TextMismatch
from vcache.pipelines.zero_shot import ZeroShot, ZeroShotConfig, ZeroShotError, zero_shot
from vcache.pipelines.zero_shot_classes import read_candidates
from vcache.pipelines.zero_shot_text import encode_others
from vcache.store.groups import write_manifest
from vcache.store.reader import FeatureStore

Vcache = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return worded_store(tmp_path_factory.mktemp("zero-shot") / "toy.zarr")


@pytest.fixture(scope="module")
def encoded(video_folder: Path, worded_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of videos of "clap hands", "jump" and "wave", with a text tower that reads; read only."""
    path = tmp_path_factory.mktemp("encoded") / "s.zarr"
    run_extraction(
        ExtractionConfig(
            dataset=str(video_folder), layers="-1", frames=3, tsn=True, cross_frame="none",
            model=f"local-dir:{worded_clip}", pretrained=None, device="cpu", store=path,
        )
    )  # fmt: skip
    short = path.parent / "short.txt"  # the tower reads 9 letters
    short.write_text("{}\no {}")
    add_text(path, [str(short)])
    return path


def ask(store: Path, **options: Any) -> ZeroShot:
    return zero_shot(ZeroShotConfig(store=store, device="cpu", batch_size=7, **options))


def named(folder: Path, *names: str) -> Path:
    file = folder / "names.txt"
    file.write_text("\n".join(names))
    return file


@pytest.mark.parametrize(("views", "numbers"), [((1, 1), (0,)), (None, (3, 4, 5))])
@pytest.mark.parametrize("ensemble", ["embeddings", "probabilities"])
def test_scores_are_cosines_with_the_text(
    store: Path, ensemble: str, views: tuple[int, int] | None, numbers: tuple[int, ...]
) -> None:
    found = ask(store, ensemble=ensemble, views=views)
    assert [(row.templates, row.num_templates) for row in found.rows] == [("five", 5), ("label", 1)]
    x, labels = embeddings(views=numbers), labels_of(store)
    for row in found.rows:
        said, expected = row.evaluation.predictions, clip_scores(x, text_of(CLASSES, row.templates), ensemble)
        given = said.scores if ensemble == "embeddings" else softmax(said.scores)
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
        assert said.class_names == CLASSES and said.targets is not None and said.targets.tolist() == labels.tolist()
        assert row.evaluation.metrics.top1 == pytest.approx((expected.argmax(axis=1) == labels).mean())


def test_of_one_template_both_ensembles_rank_alike(store: Path) -> None:
    one, other = (ask(store, templates=("label",), views=(1, 1), ensemble=e) for e in ("embeddings", "probabilities"))
    scores = [found.rows[0].evaluation.predictions.scores for found in (one, other)]
    np.testing.assert_allclose(softmax(scores[0]), softmax(scores[1]), rtol=1e-3, atol=1e-6)


def test_a_file_of_classes_keeps_their_videos_alone(store: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    file = named(tmp_path, "wave", "Jump", "kick")  # in another order, and another case
    config = ZeroShotConfig(store=store, templates=("label",), classes=file, views=(1, 1), device="cpu")
    found = zero_shot(config, on_note=notes.append)
    said, labels = found.rows[0].evaluation.predictions, labels_of(store)
    places = [CLASSES.index(name) for name in ("jump", "wave", "kick")]
    rows = np.flatnonzero(np.isin(labels, places))
    assert said.class_names == ("jump", "wave", "kick") and said.targets is not None
    assert said.targets.tolist() == [places.index(labels[row]) for row in rows]
    expected = cosines_100(embeddings(views=(0,))[0][rows], text_of(CLASSES, "label")[places, 0])
    np.testing.assert_allclose(said.scores, expected, rtol=1e-4)
    assert notes == [f"{40 - len(rows)} videos of the 10 classes that {file} does not name are left out."]


def test_a_file_of_all_classes_is_as_none(store: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    config = ZeroShotConfig(store=store, templates=("label",), device="cpu")
    every = zero_shot(replace(config, classes=named(tmp_path, *CLASSES[::-1])), on_note=notes.append)
    said, expected = (found.rows[0].evaluation.predictions for found in (every, zero_shot(config)))
    np.testing.assert_array_equal(said.scores, expected.scores)
    assert not notes and said.of_classes == expected.of_classes == "all"


def test_other_names_are_encoded_by_the_stores_own_tower(encoded: Path, worded_clip: Path) -> None:
    """As its classes were: their own names give what the store holds."""
    tower = load_text_tower(f"local-dir:{worded_clip}", None)
    with FeatureStore.open(encoded) as opened:
        for templates in ("label", "short"):
            text = encode_others(opened, tower, ["wave", "clap hands"], templates)
            np.testing.assert_allclose(text, class_text(opened, templates, [2, 0]).embeddings, rtol=1e-4, atol=1e-5)
            assert (text[0] - text[1]).abs().max() > 0.1


def test_videos_can_be_taken_for_names_that_no_video_has(encoded: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    with FeatureStore.open(encoded) as opened:
        dataset = opened.manifest.dataset
    file = named(tmp_path, "sing_a_song", "wave", "jump", "clap hands", "FlyKite")
    sets = ("label", "short")
    config = ZeroShotConfig(store=encoded, templates=sets, classes=file, device="cpu")
    found = zero_shot(config, on_note=notes.append)
    alone = ask(encoded, templates=sets)
    assert [row.templates for row in found.rows] == ["label", "short"]
    for row, without in zip(found.rows, alone.rows, strict=True):
        said = row.evaluation.predictions
        assert said.class_names == ("clap hands", "jump", "wave", "sing_a_song", "FlyKite")
        np.testing.assert_allclose(said.scores[:, :3], without.evaluation.predictions.scores, rtol=1e-4, atol=1e-4)
        assert said.scores.shape == (6, 5) and np.isfinite(said.scores).all()
    assert notes == [
        f"2 names of {file} beside the classes of {dataset}, which videos can be taken for: sing_a_song, FlyKite."
    ]
    some = (
        ask(encoded, templates=sets, classes=named(tmp_path, "wave", "FlyKite", "jump")).rows[0].evaluation.predictions
    )
    np.testing.assert_allclose(
        some.scores, found.rows[0].evaluation.predictions.scores[2:][:, [1, 2, 4]], rtol=1e-4, atol=1e-4
    )


def test_a_class_goes_by_its_words_where_no_other_has_them(tmp_path: Path) -> None:
    """ "applyeyemakeup" is no word of the name, and "Dig" is the class of that very name."""
    classes = ("ApplyEyeMakeup", "brush_hair", "dig", "Dig", "jump")
    with FeatureStore.open(named_store(tmp_path / "s.zarr", classes, {"val": [("v", "dig")]})) as opened:
        candidates = read_candidates(named(tmp_path, "Dig", "apply eye makeup", "brush hair"), opened.manifest)
        assert candidates.places == (0, 1, 3) and candidates.others == ()
        candidates = read_candidates(named(tmp_path, "DIG", "Jump", "applyeyemakeup"), opened.manifest)
        assert candidates.places == (4,) and candidates.others == ("DIG", "applyeyemakeup")
        with pytest.raises(ClassFileError, match="'jump' and 'Jump' in it are one class of the store. Name it once"):
            read_candidates(named(tmp_path, "jump", "Jump", "dig"), opened.manifest)


def test_names_that_no_class_has_are_refused_with_the_nearest(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ClassFileError, match="none of its 2 names is a class of toy, .* 'jumb'. Did you mean 'jump'?"):
        ask(store, classes=named(tmp_path, "jumb", "sail"))
    with pytest.raises(ClassFileError, match="none of its 1 name .* There are: jump, run, clap, wave, spin, ..."):
        ask(store, classes=named(tmp_path, "qqq"))
    with pytest.raises(ClassFileError, match="names one class, and there is nothing to tell it from"):
        ask(store, classes=named(tmp_path, "jump"))
    with pytest.raises(ClassFileError, match=r"--classes .*none.txt cannot be read: no such file"):
        ask(store, classes=tmp_path / "none.txt")


def test_of_videos_with_several_classes_other_names_are_negatives(tmp_path: Path) -> None:
    """The precision of a class is of its own scores alone, so that names beside it change nothing."""
    store = worded_store(tmp_path / "several.zarr", several=True)
    found = ask(store, templates=("five",), classes=named(tmp_path, "jump", "run", "sit")).rows[0].evaluation
    labels = [set(np.flatnonzero(row)) for row in targets_of(store)]
    assert len(found.predictions) == sum(bool(own & {0, 1, 12}) for own in labels)
    assert found.metrics.mean_average_precision is not None and found.metrics.top1 is None
    assert found.predictions.targets is not None and found.predictions.targets.shape[1] == 3


def targets_of(store: Path) -> np.ndarray:
    with FeatureStore.open(store) as opened:
        return opened.videos("val").columns["multi_hot"]


def test_text_that_is_not_there_is_refused_with_the_command_that_adds_it(store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ZeroShotError, match="no text of the templates 'actionclip'. Add them with:  vcache text .* act"
    ):
        ask(store, templates=("label", "actionclip"))
    with pytest.raises(
        ZeroShotError, match="'mine'. It holds five, label: choose .* vcache text .*--templates FILE.txt"
    ):
        ask(store, templates=("mine",))
    file = tmp_path / "mine.txt"
    file.write_text("a film of {}")
    with pytest.raises(ZeroShotError, match=r"vcache text .*--templates .*mine.txt  and name them mine"):
        ask(store, templates=(str(file),))
    with pytest.raises(ZeroShotError, match="--ensemble 'votes' is none of embeddings, probabilities"):
        ask(store, ensemble="votes")


def test_a_store_without_text_is_refused(float32_store: Path) -> None:
    with pytest.raises(ZeroShotError, match="no text embeddings of its class names .* Add them with:  vcache text"):
        ask(float32_store)


def test_text_of_another_encoder_is_left_out_and_refused(tmp_path: Path) -> None:
    """Also where it happens to have the width of CLIP's."""
    path = worded_store(tmp_path / "s.zarr")
    with FeatureStore.open(path) as opened:
        facts = {**opened.manifest.facts, "text": {"encoders": {"five": {"encoder": "distilbert", "width": 7}}}}
        write_manifest(path, replace(opened.manifest, facts=facts))
    assert [row.templates for row in ask(path).rows] == ["label"]
    with pytest.raises(
        ZeroShotError, match="of the text encoder distilbert, which knows nothing of videos.* holds label"
    ):
        ask(path, templates=("five",))


def test_text_towers_that_are_not_the_stores_are_refused(encoded: Path, worded_clip: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(worded_clip, tmp_path / "clip"))
    state = load_file(other / "open_clip_model.safetensors")
    save_file(
        {name: x + 0.5 if name.startswith("ln_final.") else x for name, x in state.items()},
        other / "open_clip_model.safetensors",
    )
    message = (
        r"text tower of weights .* store's with:  vcache zero-shot .* --classes .*names.txt --model local-dir:FOLDER"
    )
    with pytest.raises(TextMismatch, match=message):
        ask(encoded, classes=named(tmp_path, "wave", "sail"), model=f"local-dir:{other}")


def test_splits_and_halves_that_there_are_not_are_refused(store: Path, encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="toy.zarr has no split 'test'; it has: train, val. Choose one with --split"):
        ask(store, split="test")
    with pytest.raises(HalfClassesError, match="half of 3 classes"):
        ask(encoded, half_classes=True)
    with pytest.raises(ZeroShotError, match="halves of the classes of .* names others: 'sail'"):
        ask(encoded, half_classes=True, classes=named(tmp_path, "wave", "jump", "sail", "dig"))
    assert ask(store, split="train", templates=("label",)).rows[0].evaluation.metrics.num_videos == 12


def test_it_is_printed_and_saved_as_members_of_an_ensemble(store: Path, tmp_path: Path, vcache: Vcache) -> None:
    status, out, _ = vcache(f"zero-shot {store} --device cpu --half-classes --save {tmp_path / 'said'}")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["templates", "texts", "top-1"]
    assert [line[:2] for line in lines[1:3]] == [["five", "5"], ["label", "1"]] and "±" in out
    assert lines[3][:3] == ["chance", "7.7%", "38.5%"]
    assert "(40 videos of all 13 classes, mean of 3x1 views), averaged: embeddings" in out
    assert "half-class: mean and deviation over 10 draws of 6 of the classes" in out
    files = [tmp_path / f"said/zero-shot-{name}-val-3x1.npz" for name in ("five", "label")]
    assert all(file.is_file() and file.with_suffix(".csv").is_file() for file in files)
    with files[0].with_suffix(".csv").open() as file:
        assert "classes" not in next(csv.reader(file))
    ensemble = run_ensemble(EnsembleConfig(members=tuple(files), weights=(1.0, 0.0)))
    assert ensemble.metrics.top1 == Predictions.load(files[0]).metrics().top1
    status, _, err = vcache(f"zero-shot {store} --device cpu --save {tmp_path / 'one.npz'}")
    assert status == 1 and "one file cannot hold the predictions of 2 sets of templates" in err


def test_json_has_all_of_it_by_set(store: Path, tmp_path: Path, vcache: Vcache) -> None:
    file = tmp_path / "one.npz"
    line = f"zero-shot {store} --device cpu --templates label --views 1x1 --ensemble probabilities --save {file} --json"
    described = json.loads(vcache(line)[1])
    (one,) = described["sets"]
    assert (described["ensemble"], one["templates"], one["num_templates"]) == ("probabilities", "label", 1)
    assert (
        one["chance"]["top1"] == pytest.approx(1 / 13)
        and one["half_classes"] is None
        and one["run"] == "zero-shot label"
    )
    assert one["saved"] == [str(file), str(file.with_suffix(".csv"))] and len(one["classes"]) == 13
    halves = json.loads(vcache(f"{line} --half-classes")[1])["sets"][0]["half_classes"]
    assert halves["num_classes"] == 6 and len(halves["draws"]) == 10
    tops = [draw["top1"] for draw in halves["draws"]]
    assert halves["top1"] == {"mean": pytest.approx(np.mean(tops)), "std": pytest.approx(np.std(tops))}


def test_classes_are_shown_by_set(store: Path, vcache: Vcache) -> None:
    status, out, _ = vcache(f"zero-shot {store} --device cpu --per-class --templates label --templates five")
    assert status == 0 and out.count("most confused with") == 2
    assert out.index("label\n") < out.index("five\n") < out.index("chance")


def test_templates_are_averaged_where_a_set_has_several(store: Path, vcache: Vcache) -> None:
    words = "embeddings of several templates averaged"
    _, several, _ = vcache(f"zero-shot {store} --device cpu --templates five")
    _, one, _ = vcache(f"zero-shot {store} --device cpu --templates label")
    assert words in several and words not in one
