"""Real videos with several labels each: their annotation is extracted with them, grows with the list, and is repaired."""

from collections.abc import Callable
from pathlib import Path

import pytest
import zarr
from store_files import tree

from vcache.extract.datasets.registry import load_dataset
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.growth import DatasetChanged, videos_of
from vcache.pipelines.repairing import repair
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.verification import verify
from vcache.store.reader import FeatureStore

MakeConfig = Callable[..., ExtractionConfig]

ROWS = {"YSKX3": "c002 1.50 2.00;c000 0.00 1.25", "46GP8": "", "0A8CF": "c001 0.00 0.50"}


def write_list(root: Path, rows: dict[str, str]) -> None:
    lines = ["id,actions,length", *(f"{name},{actions},2.0" for name, actions in rows.items())]
    (root / "Charades_v1_train.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def charades(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    root = tmp_path / "charades"
    for seed, name in enumerate([*ROWS, "LATE1"]):
        write_video(root / "Charades_v1_480" / f"{name}.mp4", seed=seed)
    names = ("Holding clothes", "Putting clothes", "Taking clothes")
    (root / "Charades_v1_classes.txt").write_text("".join(f"c{i:03d} {name}\n" for i, name in enumerate(names)))
    write_list(root, ROWS)
    return root


@pytest.fixture
def made(charades: Path, config: MakeConfig) -> ExtractionConfig:
    return config(dataset="charades", root=charades, layers="-1", cross_frame="none")


def test_a_store_keeps_all_classes_of_a_video_and_grows_with_the_list(made: ExtractionConfig, charades: Path) -> None:
    run_extraction(made)
    write_list(charades, ROWS | {"LATE1": "c001 0.25 0.75;c002 0.00 2.00"})
    assert run_extraction(made).added == {"train": 1}
    dataset = load_dataset("charades", root=charades)
    with FeatureStore.open(made.store) as store:
        assert store.manifest.facts["multi_label"] is True
        assert store.read("train", "tokens/2", [0, 3]).shape[0] == 2
        stored = videos_of(store.videos("train"), "train")
    assert [video.video_id for video in stored] == ["0A8CF", "46GP8", "YSKX3", "LATE1"]
    assert set(stored) == set(dataset.videos)
    group = zarr.open_group(str(made.store), mode="r")
    assert group["train/multi_hot"][:].tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert group["train+1/multi_hot"][:].tolist() == [[0, 1, 1]]


def test_changed_actions_of_a_stored_video_are_refused(made: ExtractionConfig, charades: Path) -> None:
    run_extraction(made)
    before = tree(made.store)
    write_list(charades, ROWS | {"46GP8": "c001 0.00 1.00"})
    with pytest.raises(
        DatasetChanged, match="charades/train gives 1 videos .* another label: '46GP8' was no class, is P"
    ):
        run_extraction(made)
    write_list(charades, ROWS | {"YSKX3": "c002 1.50 2.00;c001 0.00 1.25"})
    with pytest.raises(DatasetChanged, match="another actions: 'YSKX3' was .*1.25, is 2 1.5 2.0;1 0.0 1.25. Restore"):
        run_extraction(made)
    write_list(charades, ROWS | {"YSKX3": "c002 1.50 2.25;c000 0.00 1.25"})
    with pytest.raises(DatasetChanged, match="another actions: 'YSKX3' was 2 1.5 2.0;0 0.0 1.25, is 2 1.5 2.25;"):
        run_extraction(made)
    assert tree(made.store) == before


def test_a_damaged_column_is_mended_from_the_annotation(made: ExtractionConfig, charades: Path) -> None:
    run_extraction(made)
    write_list(charades, {"LATE1": "c001 0.25 0.75", **ROWS})
    run_extraction(made)
    before = tree(made.store)
    (made.store / "train" / "multi_hot" / "c" / "0" / "0").unlink()
    chunk = made.store / "train+1" / "actions" / "c" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert not verify(made.store)["ok"]
    result = repair(made.store)
    assert (result["ok"], len(result["mended"])) == (True, 2)
    assert tree(made.store) == before
    deep = verify(made.store, deep=100)
    assert (deep["ok"], deep["deep"]["rows"], deep["deep"]["equal_rows"]) == (True, 4, 4)
