"""vcache correlation: cosines of the right rows in one order of the classes, drawn and told, and refusals in a sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from named import E, named_store
from PIL import Image
from scipy.stats import spearmanr

from vcache.heads.text import ClassText
from vcache.pipelines.class_correlation import (
    ClassCorrelation,
    CorrelationError,
    CorrelationMap,
    class_correlation,
    spread_classes,
)
from vcache.pipelines.class_file import ClassFileError
from vcache.pipelines.correlation_maps import default_range, draw_maps, write_correlation
from vcache.pipelines.runs import Run, RunError
from vcache.store.errors import StoreNotFound

Vcache = Callable[..., tuple[int, str, str]]
NAMES = ("jump", "run", "clap", "wave", "spin")


def drawn(num: int, templates: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, templates, E), dtype=np.float32)


def store_of(path: Path, names: tuple[str, ...], text: np.ndarray) -> Path:
    return named_store(path, names, {"train": [("v-0", names[0])]}, text=text)


def run_of(path: Path, names: tuple[str, ...] | None, rows: torch.Tensor, head: str = "linear") -> Path:
    """A finished run of a linear head with these rows."""
    config = {"head": head, "head_config": {"num_classes": len(rows), "width": rows.shape[1]}, "store": None}
    run = Run.create(path, config, names)
    run.save_head(
        {
            "classify.weight": rows,
            "classify.bias": torch.zeros(len(rows)),
            "norm.weight": torch.ones(rows.shape[1]),
            "norm.bias": torch.zeros(rows.shape[1]),
        }
    )
    return path


@pytest.fixture
def text() -> np.ndarray:
    """Of three templates."""
    return drawn(len(NAMES), 3, seed=1)


@pytest.fixture
def store(tmp_path: Path, text: np.ndarray) -> Path:
    return store_of(tmp_path / "toy.zarr", NAMES, text)


@pytest.fixture
def rows() -> torch.Tensor:
    """Of a classifier of another width, its classes in another order than the store's."""
    return torch.randn(len(NAMES), 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def run(tmp_path: Path, rows: torch.Tensor) -> Path:
    return run_of(tmp_path / "run", NAMES[::-1], rows)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_maps_are_the_cosines_of_each_pair_of_classes_by_name(
    store: Path, run: Path, text: np.ndarray, rows: torch.Tensor
) -> None:
    got = class_correlation([str(store), str(run)])
    assert got.class_names == NAMES and got.num_classes == 5
    of_text, of_run = got.maps
    means = (text / np.linalg.norm(text, axis=2, keepdims=True)).mean(axis=1)
    for i in range(5):
        for j in range(5):
            assert of_text.cosines[i, j] == pytest.approx(cosine(means[i], means[j]), abs=1e-5)
            expected = cosine(rows[4 - i].double().numpy(), rows[4 - j].double().numpy())
            assert of_run.cosines[i, j] == pytest.approx(expected, abs=1e-6)
    pairs = [(i, j) for i in range(5) for j in range(5) if i < j]
    a, b = ([float(one.cosines[pair]) for pair in pairs] for one in got.maps)
    assert of_run.mean == pytest.approx(np.mean(b)) and of_text.of_pairs.tolist() == a
    assert of_run.rank_correlation == pytest.approx(spearmanr(a, b).statistic)
    assert of_text.rank_correlation == pytest.approx(1.0)
    assert (of_text.what, of_run.what) == ("text embeddings, label", "classifier of linear")


def test_of_rows_without_a_mean_it_is_the_correlation_of_numpy(tmp_path: Path, rows: torch.Tensor) -> None:
    centred = rows - rows.mean(dim=1, keepdim=True)
    got = class_correlation([str(run_of(tmp_path / "run", NAMES, centred))])
    np.testing.assert_allclose(got.maps[0].cosines, np.corrcoef(rows.double().numpy()), atol=1e-6)


@given(there=st.integers(2, 90), num=st.integers(2, 90))
def test_classes_are_taken_at_even_distances_in_their_order(there: int, num: int) -> None:
    num = min(num, there)
    places = list(map(int, spread_classes(list(map(str, range(there))), num)))
    assert len(places) == num and places[0] == 0
    gaps = np.diff([*places, there])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_as_many_as_are_asked_for_or_those_of_a_file_in_its_order(store: Path, run: Path, tmp_path: Path) -> None:
    assert class_correlation([str(run), str(store)], classes="2").class_names == ("spin", "clap")
    (tmp_path / "some.txt").write_text("wave\njump\n")
    chosen = class_correlation([str(store), str(run)], classes=str(tmp_path / "some.txt"))
    every = class_correlation([str(store), str(run)])
    assert chosen.class_names == ("wave", "jump") and chosen.num_classes == 5
    for one, whole in zip(chosen.maps, every.maps, strict=True):
        assert one.mean == pytest.approx(whole.cosines[3, 0])


def test_twenty_are_shown_unless_it_is_said(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(41))
    path = store_of(tmp_path / "many.zarr", names, drawn(41, 1, seed=2))
    got = class_correlation([str(path)])
    assert len(got.class_names) == 20 and got.class_names[:3] == ("class 0", "class 2", "class 4")
    assert len(class_correlation([str(path)], classes="41").class_names) == 41


def test_a_head_of_text_is_compared_by_what_it_was_given(tmp_path: Path, store: Path, text: np.ndarray) -> None:
    from vcache.heads.text4vis import Text4Vis

    config = Text4Vis.Config(num_classes=5, embed_dim=E, temporal="tap")
    head = Text4Vis(config)
    head.set_text(ClassText(torch.from_numpy(text), 2.0))
    described = {"num_classes": 5, "embed_dim": E, "temporal": "tap"}
    made = Run.create(tmp_path / "t", {"head": "text4vis", "head_config": described, "store": None}, NAMES)
    made.save_head(head.state_dict())
    of_store, of_run = class_correlation([str(store), str(made.path)]).maps
    np.testing.assert_allclose(of_run.cosines, of_store.cosines, atol=1e-5)
    bare = Run.create(tmp_path / "bare", {**made.config}, NAMES)
    bare.save_head(Text4Vis(config).state_dict())
    with pytest.raises(CorrelationError, match="bare was imported without the text that it compares videos with"):
        class_correlation([str(bare.path)])


def test_what_cannot_be_compared_is_refused_with_what_to_do(
    store: Path, run: Path, rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed = run_of(tmp_path / "unnamed", None, rows)
    with pytest.raises(RunError, match="imported without class names. Import it again with --classes"):
        class_correlation([str(store), str(unnamed)])
    fewer = run_of(tmp_path / "fewer", ("jump", "run", "bow"), rows[:3])
    words = (
        "fewer has 3 classes and .*toy.zarr 5, 2 of them the same. Name classes that both have in a file:  --classes"
    )
    with pytest.raises(CorrelationError, match=words):
        class_correlation([str(store), str(fewer)])
    (tmp_path / "both.txt").write_text("run\njump\n")
    assert len(class_correlation([str(store), str(fewer)], classes=str(tmp_path / "both.txt")).maps) == 2
    (tmp_path / "odd.txt").write_text("run\nclap\n")
    with pytest.raises(ClassFileError, match="'clap' of --classes is no class of .*fewer"):
        class_correlation([str(store), str(fewer)], classes=str(tmp_path / "odd.txt"))
    with pytest.raises(CorrelationError, match="one class alone has nothing to be compared with"):
        class_correlation([str(store)], classes="1")
    with pytest.raises(CorrelationError, match=r"--classes 6: .*toy.zarr has 5 classes. Ask for at most so many"):
        class_correlation([str(store)], classes="6")
    with pytest.raises(CorrelationError, match="no text embeddings of the templates 'text4vis'.\n.*vcache text"):
        class_correlation([str(store)], templates="text4vis")
    with pytest.raises(
        CorrelationError, match="--templates label chooses the text of a store, and only runs are named"
    ):
        class_correlation([str(run)], templates="label")
    with pytest.raises(StoreNotFound):
        class_correlation([str(tmp_path / "nowhere")])
    monkeypatch.delattr("vcache.heads.linear.LinearHead.class_embeddings")
    with pytest.raises(CorrelationError, match=r"head 'linear' of .* Runs of these heads have: actionclip, .*evl"):
        class_correlation([str(run)])


def found(num: int, num_maps: int = 2) -> ClassCorrelation:
    """Names long and short, maps of other means."""
    rng = np.random.default_rng(num)
    maps = []
    for number in range(num_maps):
        rows = rng.standard_normal((num, 9)) + number
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        maps.append(CorrelationMap(source=f"source {number}", what="text", cosines=rows @ rows.T, rank_correlation=0.5))
    names = tuple(f"class {number} {'of a very long name indeed ' * (number % 3)}" for number in range(num))
    return ClassCorrelation(class_names=names, num_classes=num + 3, maps=tuple(maps))


@pytest.mark.parametrize(("num", "cell"), [(2, 200), (7, 57), (40, 20), (41, 19), (400, 2)])
def test_each_cell_has_the_colour_of_its_cosine(num: int, cell: int) -> None:
    correlation = found(num)
    ranges = [default_range(one) for one in correlation.maps]
    image = np.asarray(draw_maps(correlation, ranges)).astype(int)
    side, margin = cell * num, 14
    right = image.shape[1] - margin - 76 - 8 - side  # of the last map, left of its bar
    squares = image[-margin - side : -margin, right : right + side].reshape(num, cell, num, cell, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    colours = squares[:, 0, :, 0]
    assert (colours == colours.transpose(1, 0, 2)).all()
    lightness = colours.sum(axis=2)
    pairs, cosines = np.triu_indices(num, 1), correlation.maps[1].cosines
    order = np.argsort(cosines[pairs])
    assert (np.diff(lightness[pairs][order]) >= -3).all()  # of rounding
    assert (colours[np.arange(num), np.arange(num)] == (252, 253, 191)).all()


def test_names_are_beside_the_rows_where_there_is_room() -> None:
    wide = {num: draw_maps(found(num), [default_range(one) for one in found(num).maps]).width for num in (40, 41)}
    assert wide[40] - wide[41] > 200


def test_a_range_may_be_said_and_is_told(tmp_path: Path) -> None:
    correlation = found(5)
    told = write_correlation(correlation, tmp_path / "new" / "a.png", (-0.5, 2.0))
    assert [one["range"] for one in told["maps"]] == [[-0.5, 2.0]] * 2
    assert told == json.loads((tmp_path / "new" / "a.json").read_text())
    one = correlation.maps[0]
    told = write_correlation(correlation, tmp_path / "b.png")["maps"][0]
    assert (
        told["range"] == [one.of_pairs.min(), one.of_pairs.max()] == [told["least_of_pairs"], told["largest_of_pairs"]]
    )
    np.testing.assert_allclose(told["cosines"], one.cosines, atol=1e-6)
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("new/a.png", "b.png"))
    assert a.shape == b.shape and (a != b).any()


def test_the_command_writes_the_maps_and_prints_the_numbers(
    vcache: Vcache, store: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = vcache(f"correlation {store} {run}")
    assert status == 0, err
    _, of_run = class_correlation([str(store), str(run)]).maps
    assert f"{of_run.mean:.3f}" in out and f"{of_run.rank_correlation:.3f}" in out and "correlation.png" in out
    assert "cosines of the embeddings of 5 classes" in out
    with Image.open(tmp_path / "correlation.png") as image:
        assert image.width > 2 * 400 and len(image.getcolors(1 << 24) or ()) > 20
    status, out, _ = vcache(f"correlation {store} --classes 3 --range 0,1 --out {tmp_path / 'x.png'} --json")
    assert status == 0 and json.loads(out) == json.loads((tmp_path / "x.json").read_text())
    assert json.loads(out)["classes"] == ["jump", "run", "wave"]
    for wrong, words in (
        ("--range 1,0", "1,0 is not two numbers, the lower one first"),
        ("--range 0.5", "0.5 is not two numbers"),
        ("--out x.jpg", "ends in .png"),
    ):
        status, _, err = vcache(f"correlation {store} {wrong}")
        assert status == 2 and words in re.sub(r"\s+", " ", err)
