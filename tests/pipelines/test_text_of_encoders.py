"""Text embeddings of other encoders than CLIP's: beside CLIP's own in a store, never mixed with them, mended, and refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from store_files import flip, tree
from tiny_encoder import WIDTH, WORDS, save_distilbert

from vcache.extract.text_encoders import load_text_encoder
from vcache.heads.actionclip import ActionCLIP
from vcache.heads.requirements import HeadRequirements
from vcache.heads.text import OPENAI_LOGIT_SCALE
from vcache.pipelines import text_sets
from vcache.pipelines.class_text import class_text, set_encoders
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.matching import HeadStoreMismatch, match
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.templates import EVERY_STORE, TEMPLATE_SETS
from vcache.pipelines.text_command import add_text
from vcache.pipelines.text_sets import TextMismatch
from vcache.pipelines.trainable import check_trainable
from vcache.store.constants import CONSTANTS
from vcache.store.groups import write_manifest
from vcache.store.reader import FeatureStore

Vcache = Callable[..., tuple[int, str, str]]
NAME = "text4vis_tiny_distilbert"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return save_distilbert(tmp_path_factory.mktemp("models") / "tiny-distilbert")


@pytest.fixture
def encoder(model: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(model, tmp_path / "tiny-distilbert"))


@pytest.fixture(scope="module")
def made(video_folder: Path, worded_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the text of CLIP; read only."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("worded") / "s.zarr"
    run_extraction(request(video_folder, worded_clip, path))
    return path


def request(videos: Path, clip: Path, store: Path) -> ExtractionConfig:
    return ExtractionConfig(
        dataset=str(videos), layers="-1", frames=3, tsn=True, cross_frame="none", model=f"local-dir:{clip}",
        pretrained=None, device="cpu", store=store,
    )  # fmt: skip


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


def chunk(store: Path, name: str) -> Path:
    (path,) = (path for path in (store / CONSTANTS / "text" / name / "c").rglob("*") if path.is_file())
    return path


def test_a_set_of_another_encoder_lies_beside_those_of_clip(store: Path, encoder: Path, vcache: Vcache) -> None:
    before = tree(store / CONSTANTS)
    status, out, err = vcache(f"text {store} --templates text4vis --encoder {encoder}")
    assert status == 0, err
    assert f"added {NAME}" in out and f"{NAME} (1 template, of {encoder})" in out
    array = zarr.open_array(str(store / CONSTANTS / "text" / NAME), mode="r")
    assert (array.shape, array.metadata.dimension_names) == ((3, 1, WIDTH), ("class", "template", "channel"))
    loaded = load_text_encoder(str(encoder))
    texts = [f"a video of a person {name}." for name in ("clap hands", "jump", "wave")]
    np.testing.assert_allclose(np.asarray(array[...])[:, 0], loaded.encode(texts).numpy(), rtol=1e-5, atol=1e-6)
    with FeatureStore.open(store) as opened:
        assert set_encoders(opened.manifest) == {
            NAME: {
                "encoder": str(encoder), "pooling": "mean", "width": WIDTH,
                "weights_sha256": loaded.weights_sha256, "tokens_sha256": loaded.tokens_sha256(texts),
            }
        }  # fmt: skip
        text = class_text(opened, NAME, classes=[2, 0])
        assert text.embeddings.shape == (2, 1, WIDTH)
        assert text.logit_scale == class_text(opened, "label").logit_scale
    after = tree(store / CONSTANTS)
    assert {name: after[name] for name in before} == before
    assert "nothing to add" in vcache(f"text {store} --templates text4vis --encoder {encoder}")[1]
    assert tree(store / CONSTANTS) == after


def test_the_screens_name_the_encoder_of_each_set(store: Path, encoder: Path, vcache: Vcache) -> None:
    add_text(store, ["label", "actionclip"], encoder=str(encoder), pooling="cls")
    name = "actionclip_tiny_distilbert_cls"
    assert f"{name} (16 templates, of {encoder}), label (1 template)," in vcache(f"info {store}")[1]
    told = json.loads(vcache(f"info {store} --json")[1])
    assert told["text"][name] == list(TEMPLATE_SETS["actionclip"].templates)
    assert told["text_encoders"].keys() == {name, "label_tiny_distilbert_cls"}
    assert told["text_encoders"][name]["pooling"] == "cls"
    assert json.loads(vcache(f"text {store} --json")[1])["encoders"] == told["text_encoders"]


def test_damage_is_found_and_mended_bit_for_bit(store: Path, encoder: Path, vcache: Vcache) -> None:
    add_text(store, ["text4vis"], encoder=str(encoder), device="cpu")
    sound = tree(store)
    for damage in (lambda path: flip(path, 0), Path.unlink):
        damage(chunk(store, NAME))
        status, out, _ = vcache(f"verify {store}")
        assert status == 1 and f"text/{NAME} is damaged" in " ".join(out.split())
        assert vcache(f"repair {store} --device cpu")[0] == 0
        assert tree(store) == sound
    flip(chunk(store, "label"), 0)  # of CLIP's own tower
    assert vcache(f"repair {store} --device cpu")[0] == 0 and tree(store) == sound


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: save_distilbert(folder, seed=6), "has other weights now than"),
        (lambda folder: (folder / "vocab.txt").write_text("\n".join([*WORDS[:5], *WORDS[:4:-1]])), "has other tokens now"),
        (shutil.rmtree, f"the text encoder that {NAME!r} was made with cannot be loaded: --encoder"),
    ],
    ids=["weights", "vocabulary", "gone"],
)  # fmt: skip
def test_another_encoder_mends_nothing(
    store: Path, encoder: Path, vcache: Vcache, change: Callable[[Path], object], words: str
) -> None:
    add_text(store, ["text4vis"], encoder=str(encoder))
    change(encoder)
    flip(chunk(store, NAME), 3)
    status, out, _ = vcache(f"repair {store} --device cpu")
    assert status == 1 and words in out


def test_another_encoder_of_the_same_name_is_refused(store: Path, encoder: Path, tmp_path: Path) -> None:
    add_text(store, ["text4vis"], encoder=str(encoder))
    before, other = tree(store), save_distilbert(tmp_path / "elsewhere" / "tiny-distilbert", seed=6)
    for templates in ("text4vis", "label"):
        with pytest.raises(TextMismatch, match=r"the text encoder \S+ has weights \w{16}, and that of .* had \w{16}"):
            add_text(store, [templates], encoder=str(other))
    assert tree(store) == before
    moved = Path(shutil.copytree(encoder, tmp_path / "moved" / "tiny-distilbert"))
    assert add_text(store, ["label"], encoder=str(moved))["added"] == ["label_tiny_distilbert"]


def test_a_file_cannot_take_the_name_of_an_encoders_set_nor_the_reverse(
    store: Path, encoder: Path, tmp_path: Path
) -> None:
    add_text(store, ["label"], encoder=str(encoder))
    own = tmp_path / "label_tiny_distilbert.txt"
    own.write_text("{}")
    with pytest.raises(TextMismatch, match=rf"has the set 'label_tiny_distilbert' of {encoder}, and"):
        add_text(store, [str(own)])
    own = own.rename(tmp_path / f"{NAME}.txt")
    own.write_text("a video of a person {}.")
    add_text(store, [str(own)])
    with pytest.raises(TextMismatch, match=f"has the set {NAME!r} of CLIP's text tower, and"):
        add_text(store, ["text4vis"], encoder=str(encoder))


def test_a_store_without_text_gets_both_in_either_order(
    store: Path, made: Path, encoder: Path, forget_text: Callable[[Path], None], video_folder: Path, worded_clip: Path
) -> None:
    add_text(store, ["text4vis"], encoder=str(encoder), device="cpu")
    both = tree(store)
    shutil.rmtree(store)
    shutil.copytree(made, store)
    forget_text(store)
    add_text(store, ["text4vis"], encoder=str(encoder), device="cpu")
    with FeatureStore.open(store) as opened:
        assert class_text(opened, NAME).logit_scale == OPENAI_LOGIT_SCALE
        assert "weights_sha256" not in opened.manifest.facts["text"]
    assert run_extraction(request(video_folder, worded_clip, store)).text_note is not None  # of texts that are cut
    assert tree(store) == both


def test_a_model_without_a_text_tower_has_text_of_another(
    video_folder: Path, tiny_clip: Path, encoder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "wordless.zarr"
    run_extraction(request(video_folder, tiny_clip, path))
    result = add_text(path, ["label", "text4vis"], encoder=str(encoder))
    assert result["added"] == ["label_tiny_distilbert", NAME] and result["sets"].keys() == set(result["added"])


def test_what_a_killed_command_left_is_done_again(store: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text_sets, "write_constants", die)
        add_text(store, ["text4vis"], encoder=str(encoder))
    with FeatureStore.open(store) as opened:
        assert not set_encoders(opened.manifest)
    save_distilbert(encoder, seed=6)  # nothing is stored of the first
    assert add_text(store, ["text4vis"], encoder=str(encoder))["added"] == [NAME]


def test_heads_take_text_of_clip_alone_unless_they_say_otherwise(
    store: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_text(store, ["label"], encoder=str(encoder))
    asked = HeadRequirements(embed=True, text="label_tiny_distilbert")
    with FeatureStore.open(store) as opened:
        with pytest.raises(HeadStoreMismatch) as refused:
            match("actionclip", asked, opened, ["train"])
        assert (
            "head 'actionclip' compares videos with text in the 20 channels of CLIP's embeddings; 'label_tiny_distilbert' of "
            f"s.zarr has 28 channels of the text encoder {encoder}.\nChoose a set of CLIP's with --set templates=NAME: "
            "actionclip, label, text4vis."
        ) in str(refused.value)
        monkeypatch.setattr(ActionCLIP, "any_text_width", True, raising=False)
        assert match("actionclip", asked, opened, ["train"]).text == "label_tiny_distilbert"
        with pytest.raises(HeadStoreMismatch, match=r"Text of any encoder is taken by: .*actionclip"):
            match("dist", asked, opened, ["train"])


def test_text_of_another_encoder_is_refused_at_the_same_width_too(store: Path, encoder: Path) -> None:
    """As that of DistilBERT beside ViT-L/14: both have 768 channels."""
    add_text(store, ["label"], encoder=str(encoder))
    with FeatureStore.open(store) as opened:
        manifest = opened.manifest
    backbone = {**manifest.facts["backbone"], "embed_dim": WIDTH}
    write_manifest(store, replace(manifest, facts={**manifest.facts, "backbone": backbone}))
    with FeatureStore.open(store) as opened, pytest.raises(HeadStoreMismatch, match="in the 28 .* has 28 channels of"):
        match("dist", HeadRequirements(embed=True, text="label_tiny_distilbert"), opened, ["train"])


def test_text_to_train_on_is_of_the_encoder_that_classifies(store: Path, encoder: Path) -> None:
    add_text(store, ["label", "text4vis"], encoder=str(encoder))
    add_text(store, ["label"], encoder=str(encoder), pooling="cls")
    with FeatureStore.open(store) as opened:
        for text, training in (("text4vis", "label"), (NAME, "label_tiny_distilbert")):
            check_trainable("text4vis", HeadRequirements(embed=True, text=text, training_text=training), opened)
        said = f"'label_tiny_distilbert_cls' of {encoder} .pooling cls. and classify by '{NAME}' of {encoder} .pooling mean."
        mixed = {
            NAME: ("label_tiny_distilbert_cls", said),
            "label": (NAME, "'label' of CLIP's text tower: they are in diff"),
        }
        for text, (training, words) in mixed.items():
            with pytest.raises(HeadStoreMismatch, match=words):
                check_trainable("text4vis", HeadRequirements(embed=True, text=text, training_text=training), opened)


def test_a_missing_set_of_an_encoder_is_added_as_the_refusal_says(store: Path, encoder: Path, vcache: Vcache) -> None:
    asked = HeadRequirements(embed=True, text="clip_kinetics_tiny_distilbert")
    with FeatureStore.open(store) as opened, pytest.raises(HeadStoreMismatch) as refused:
        match("text4vis", asked, opened, ["train"])
    said, command = str(refused.value).split("with:  vcache ")
    assert "If it is of a text encoder 'tiny_distilbert', add it" in said
    assert vcache(command.replace("FOLDER", str(encoder)))[0] == 0
    with FeatureStore.open(store) as opened:
        assert "clip_kinetics_tiny_distilbert" in set_encoders(opened.manifest)


def test_all_names_every_set_and_the_stage_counts_texts(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sets, "_TEXTS_AT_ONCE", 40)
    stages: list[str] = []
    added = add_text(store, ["all"], on_stage=stages.append)["added"]
    assert added == [name for name in TEMPLATE_SETS if name not in EVERY_STORE]
    assert stages[1:] == [f"encoding the class names: {done} of 84 texts" for done in (0, 40, 80, 84)]


def test_the_options_of_clips_own_tower_do_not_go_with_an_encoder(store: Path, encoder: Path, vcache: Vcache) -> None:
    for option in ("--model ViT-B-16", "--pretrained a.pt"):
        status, _, err = vcache(f"text {store} --encoder {encoder} {option}")
        assert status == 1 and "leave --model and --pretrained out" in err
    status, _, err = vcache(f"text {store} --encoder {encoder} --pooling max")
    assert status == 1 and "--pooling max: there are mean and cls" in err
