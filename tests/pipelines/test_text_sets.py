"""Text embeddings in a store: written by `vcache extract` and `vcache text`, never changed, verified and mended."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file
from store_files import flip, tree

from vcache.extract.text import FrozenTextTower, load_text_tower
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines import text_sets
from vcache.pipelines.class_text import class_text, stored_sets
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.matching import HeadStoreMismatch, match
from vcache.pipelines.plan import plan_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.templates import EVERY_STORE, TEMPLATE_SETS
from vcache.pipelines.text_command import add_text
from vcache.pipelines.text_sets import TextMismatch
from vcache.store.constants import CONSTANTS
from vcache.store.errors import ArrayNotFound, StoreBusy
from vcache.store.groups import write_manifest
from vcache.store.locks import sole_writer
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]
Vcache = Callable[..., tuple[int, str, str]]
NAMES = ["clap hands", "jump", "wave"]
EVERY_TEMPLATES = {name: list(TEMPLATE_SETS[name].templates) for name in sorted(EVERY_STORE)}
DIMS = ("class", "template", "channel")


@pytest.fixture(scope="module")
def made(video_folder: Path, worded_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with text; read only."""
    torch.set_num_threads(1)  # as in the tests: it decides on last bits
    path = tmp_path_factory.mktemp("worded") / "s.zarr"
    run_extraction(
        ExtractionConfig(
            dataset=str(video_folder), layers="-1", frames=3, tsn=True, cross_frame="none", dtype="int8", max_error=1.0,
            model=f"local-dir:{worded_clip}", pretrained=None, device="cpu", store=path,
        )
    )  # fmt: skip
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


@pytest.fixture
def old_store(store: Path, forget_text: Callable[[Path], None]) -> Path:
    """As a version before there was text made it."""
    forget_text(store)
    return store


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a {}\n{}!\n")
    return path


def chunk(store: Path, name: str) -> Path:
    (path,) = (path for path in (store / CONSTANTS / "text" / name / "c").rglob("*") if path.is_file())
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose text tower is loaded from here on."""
    models: list[str] = []
    original = text_sets.load_text_tower

    def load(model: str, *args: object, **kwargs: object) -> FrozenTextTower:
        models.append(model)
        return original(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(text_sets, "load_text_tower", load)
    return models


def test_a_new_store_has_the_embedding_of_each_label(made: Path, worded_clip: Path) -> None:
    tower = load_text_tower(f"local-dir:{worded_clip}", None)
    with FeatureStore.open(made) as store:
        text = class_text(store, "label", classes=[2, 0])
        assert store.manifest.facts["text"] == {
            "weights_sha256": tower.weights_sha256, "class_words": NAMES, "templates": EVERY_TEMPLATES,
        }  # fmt: skip
    torch.testing.assert_close(text.embeddings[:, 0], tower.encode(["wave", "clap hands"]), rtol=1e-5, atol=1e-6)
    assert text.logit_scale == pytest.approx(tower.logit_scale)


def test_any_reader_sees_the_embeddings_with_their_axes_and_templates(made: Path) -> None:
    group = zarr.open_group(str(made), mode="r")
    array = group["constants/text/label"]
    assert array.metadata.dimension_names == DIMS and array.shape == (3, 1, 20) and array.dtype == np.float32
    assert group["constants/text/logit_scale"].metadata.dimension_names == ("scale",)
    assert group.attrs["vcache"]["facts"]["text"]["templates"] == EVERY_TEMPLATES  # type: ignore[index, call-overload]


def test_text_changes_neither_key_nor_features(
    config: MakeConfig, worded_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"local-dir:{worded_clip}"
    with_text = run_extraction(config(model=model))
    with FeatureStore.open(Path(with_text.store)) as store:
        features = store.read("val", "tokens/2", [0, 5])
    monkeypatch.setattr("vcache.pipelines.extraction.add_every_set", lambda *args: None)
    without = run_extraction(config(model=model, store=Path(with_text.store).with_name("other.zarr")))
    with FeatureStore.open(Path(without.store)) as store:
        np.testing.assert_array_equal(store.read("val", "tokens/2", [0, 5]), features)
        assert not stored_sets(store.manifest)
    assert without.key == with_text.key


def test_the_same_extraction_again_leaves_the_text_alone(store: Path, loads: list[str], vcache: Vcache) -> None:
    before, line = tree(store), extract_line(store)
    assert vcache(line)[0] == 0
    assert tree(store) == before and not loads


def extract_line(store: Path) -> str:
    with FeatureStore.open(store) as opened:
        request = opened.manifest.facts["request"]
    return (
        f"extract {request['dataset']} --layers -1 --frames 3 --tsn --cross-frame none --dtype int8 --max-error 1 "
        f"--model {request['model']} --device cpu --store {store}"
    )


def test_an_older_store_gets_the_text_of_the_same_extraction(old_store: Path, made: Path, vcache: Vcache) -> None:
    status, out, err = vcache(extract_line(old_store))
    assert status == 0, err
    assert "0 extracted now, 18 already there" in out and tree(old_store) == tree(made)


def test_an_older_store_gets_the_text_from_vcache_text(old_store: Path, made: Path, vcache: Vcache) -> None:
    with FeatureStore.open(old_store) as opened, pytest.raises(ArrayNotFound):
        class_text(opened, "label")
    status, out, err = vcache(f"text {old_store}")
    assert status == 0, err
    assert "text embeddings of 3 class names: added label, text4vis, actionclip" in out
    assert "it holds actionclip (16 templates), label (1 template), text4vis (1 template)" in out
    assert tree(old_store) == tree(made)


def test_what_a_killed_command_left_is_done_again(old_store: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text_sets, "write_constants", die)
        add_text(old_store, EVERY_STORE)
    with FeatureStore.open(old_store) as opened:
        assert opened.manifest.facts["text"]["templates"] == EVERY_TEMPLATES and not stored_sets(opened.manifest)
    assert add_text(old_store, EVERY_STORE)["added"] == list(EVERY_STORE) and tree(old_store) == tree(made)


def test_a_grown_store_keeps_its_text(
    config: MakeConfig, video_folder: Path, worded_clip: Path, tmp_path: Path, loads: list[str]
) -> None:
    videos = Path(shutil.copytree(video_folder, tmp_path / "videos"))
    request = config(dataset=str(videos), model=f"local-dir:{worded_clip}", layers="-1", cross_frame="none")
    run_extraction(request)
    shutil.copy(videos / "train/wave/w1.mp4", videos / "train/wave/new.mp4")
    assert run_extraction(request).added == {"train": 1}
    assert len(loads) == 1


def test_parts_write_the_text_once(config: MakeConfig, worded_clip: Path, tmp_path: Path, loads: list[str]) -> None:
    words = {"model": f"local-dir:{worded_clip}", "layers": "-1", "cross_frame": "none"}
    whole = Path(run_extraction(config(**words)).store)
    for number in (2, 1):
        run_extraction(config(**words, part=(number, 2), store=tmp_path / "parts.zarr"))
    assert len(loads) == 2 and tree(tmp_path / "parts.zarr" / CONSTANTS) == tree(whole / CONSTANTS)


def test_a_model_without_text_is_extracted_with_a_sentence(config: MakeConfig, vcache: Vcache, tiny_clip: Path) -> None:
    summary = run_extraction(config())
    assert summary.text_note is not None
    assert summary.text_note.startswith("no text embeddings of the class names: ViT-8-32px-")
    assert "its text tower knows 64 tokens, and CLIP's vocabulary has 49408" in summary.text_note
    status, _, err = vcache(f"text {summary.store}")
    assert status == 1 and "its text tower knows 64 tokens" in err
    assert "text embeddings" not in vcache(f"info {summary.store}")[1]


def test_long_names_are_counted(
    config: MakeConfig, write_video: Callable[..., Path], worded_clip: Path, tmp_path: Path
) -> None:
    for name in ("a", "a very long name of a class"):
        write_video(tmp_path / "v" / name / "x.mp4", num_frames=6)
    summary = run_extraction(
        config(dataset=str(tmp_path / "v"), val_fraction=0.0, model=f"local-dir:{worded_clip}", layers="-1")
    )
    # Of 36 not "a", as a label and as a template, "A video of a" and "The man is a".
    assert summary.text_note == "32 texts of the class names cut to the 11 tokens that the text tower reads"


def test_the_plan_counts_the_bytes_of_the_text(
    config: MakeConfig, worded_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned() -> int:
        return plan_extraction(config(model=f"local-dir:{worded_clip}"), seconds=None).asked.missing_bytes

    with_text = planned()
    monkeypatch.setattr("vcache.pipelines.extending.text_bytes", lambda *args: 0)
    assert with_text - planned() == 4 * (3 * 18 * 20 + 1)
    monkeypatch.undo()
    run_extraction(config(model=f"local-dir:{worded_clip}"))
    assert planned() == 0


def test_sets_are_added_beside_each_other_and_never_changed(store: Path, prompts: Path, vcache: Vcache) -> None:
    label = chunk(store, "label").read_bytes()
    told = json.loads(vcache(f"text {store} --templates label --templates {prompts} --json")[1])
    assert (told["added"], told["sets"]) == (["prompts"], {**EVERY_TEMPLATES, "prompts": ["a {}", "{}!"]})
    after = tree(store)
    assert chunk(store, "label").read_bytes() == label
    assert "nothing to add" in vcache(f"text {store} --templates {prompts}")[1] and tree(store) == after
    prompts.write_text("the {}\n")
    status, _, err = vcache(f"text {store} --templates {prompts}")
    assert status == 1 and "has other templates under the name 'prompts' (2 templates, the first is 'a {}')" in err
    assert tree(store) == after
    with FeatureStore.open(store) as opened:
        tower = load_text_tower(opened.manifest.facts["request"]["model"], None)
        stored = opened.constant("text/prompts")
    expected = tower.encode(["a clap hands", "clap hands!", "a jump", "jump!", "a wave", "wave!"])
    np.testing.assert_allclose(stored, expected.numpy().reshape(3, 2, 20), rtol=1e-5, atol=1e-6)
    info = vcache(f"info {store}")[1]
    assert (
        "text embeddings of the class names: actionclip (16 templates), label (1 template), prompts (2 templates), text4vis (1"
        in info
    )
    assert json.loads(vcache(f"info {store} --json")[1])["text"]["prompts"] == ["a {}", "{}!"]


def test_a_set_of_the_users_own_is_added_as_the_refusal_says(
    store: Path, vcache: Vcache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = HeadRequirements(embed=True, text="mine")
    with FeatureStore.open(store) as opened, pytest.raises(HeadStoreMismatch) as refused:
        match("some", asked, opened, ["train"])
    said, command = str(refused.value).split("with:  vcache ")
    assert "It holds actionclip, label, text4vis: choose with --set templates=NAME. Or write templates of" in said
    assert "your own into a file mine.txt" in said
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("a clip of {}")
    assert vcache(command)[0] == 0
    with FeatureStore.open(store) as opened:
        assert match("some", asked, opened, ["train"]).text == "mine"


def test_two_files_of_one_name_are_refused(store: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "prompts.txt"
    other.write_text("the {}")
    with pytest.raises(TextMismatch, match="two sets of templates are called 'prompts'"):
        add_text(store, [str(prompts), str(other)])


@pytest.mark.parametrize("with_text", [True, False])
def test_another_checkpoint_is_refused_with_both_named(
    store: Path, prompts: Path, worded_clip: Path, tmp_path: Path, with_text: bool, forget_text: Callable[[Path], None]
) -> None:
    """By the text tower that made the store's texts; where it has none, by the image tower."""
    other = Path(shutil.copytree(worded_clip, tmp_path / "other"))
    state = {name: x.clone() for name, x in load_file(other / "open_clip_model.safetensors").items()}
    of_text, of_images = ({name: state[name] + 1} for name in ("ln_final.bias", "visual.proj"))
    with FeatureStore.open(store) as opened:
        facts, sha = opened.manifest.facts, opened.manifest.spec["weights_sha256"][:16]
    if with_text:
        sha = facts["text"]["weights_sha256"][:16]
        words = rf"was made with a text tower of weights {sha}, and local-dir:\S+ has one of (?!{sha})"
    else:
        forget_text(store)
        tower = r"the image tower ViT-\S+ of weights"
        words = rf"was made with {tower} {sha}, and local-dir:\S+ has {tower} (?!{sha})"
    before = tree(store)
    save_file(state | (of_text if with_text else of_images), other / "open_clip_model.safetensors")
    with pytest.raises(TextMismatch, match=words + r".*--templates \S+prompts.txt --model local-dir:FOLDER"):
        add_text(store, [str(prompts)], model=f"local-dir:{other}")
    assert tree(store) == before
    # What says nothing of the texts may differ.
    save_file(state | (of_images if with_text else of_text), other / "open_clip_model.safetensors")
    assert add_text(store, [str(prompts)], model=f"local-dir:{other}")["added"] == ["prompts"]


def test_a_bucket_gets_the_same_text(
    store: Path, prompts: Path, bucket: str, s3: Any, vcache: Vcache, tmp_path: Path
) -> None:
    url, line = f"s3://{bucket}/s.zarr", extract_line(store)
    assert vcache(line.replace(str(store), url))[0] == 0
    for place in (url, str(store)):
        status, _, err = vcache(f"text {place} --templates {prompts}")
        assert status == 0, err
    listed = s3.list_objects_v2(Bucket=bucket, Prefix="s.zarr/constants/text/")["Contents"]
    stored = {entry["Key"]: s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read() for entry in listed}
    local = tree(store / CONSTANTS / "text")
    assert stored == {f"s.zarr/constants/text/{name}": content for name, content in local.items()}
    assert f"{url} is whole" in vcache(f"verify {url}")[1]


def test_text_waits_for_no_extraction(store: Path, prompts: Path) -> None:
    with sole_writer(store), pytest.raises(StoreBusy):
        add_text(store, [str(prompts)])


@pytest.mark.parametrize("name", ["label", "logit_scale"])
def test_every_kind_of_damage_is_found_and_mended_bit_for_bit(
    name: str, store: Path, made: Path, vcache: Vcache
) -> None:
    for damage in (lambda path: flip(path, 0), lambda path: flip(path, -1), Path.unlink):
        damage(chunk(store, name))
        status, out, _ = vcache(f"verify {store}")
        assert status == 1 and f"text/{name} is damaged" in " ".join(out.split())
        assert vcache(f"repair {store} --device cpu")[0] == 0
        assert tree(store) == tree(made)


def test_a_repair_on_another_machine_takes_its_last_bits(
    store: Path, prompts: Path, vcache: Vcache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one set and of the next: the manifest has to know both."""
    add_text(store, [str(prompts)])
    with FeatureStore.open(store) as opened:
        stored = {name: opened.constant(f"text/{name}") for name in ("label", "prompts")}
    encode = FrozenTextTower.encode
    monkeypatch.setattr(FrozenTextTower, "encode", lambda tower, texts: encode(tower, texts) * (1 + 2e-7))
    for name in stored:
        flip(chunk(store, name), 3)
    status, out, _ = vcache(f"repair {store} --device cpu")
    assert status == 0 and out.count("last bits differ on this machine, and the manifest has them now") == 2
    with FeatureStore.open(store) as opened:
        for name, before in stored.items():
            made = opened.constant(f"text/{name}")
            np.testing.assert_allclose(made, before, rtol=1e-6)
            assert not np.array_equal(made, before)
    assert vcache(f"verify {store}")[0] == 0


def test_a_repair_with_another_text_tower_leaves_the_damage(
    store: Path, worded_clip: Path, vcache: Vcache, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(worded_clip, tmp_path / "other"))
    with FeatureStore.open(store) as opened:
        manifest = opened.manifest
    request = {**manifest.facts["request"], "model": f"local-dir:{other}"}
    write_manifest(store, replace(manifest, facts={**manifest.facts, "request": request}))
    state = {name: x.clone() for name, x in load_file(other / "open_clip_model.safetensors").items()}
    save_file(state | {"ln_final.bias": state["ln_final.bias"] + 1}, other / "open_clip_model.safetensors")
    flip(chunk(store, "label"), 3)
    status, out, _ = vcache(f"repair {store} --device cpu")
    assert status == 1 and "now, and text/label was made with" in out
    shutil.rmtree(other)
    status, out, _ = vcache(f"repair {store} --device cpu")
    assert status == 1 and "the text tower that text/label was made with cannot be loaded" in out
