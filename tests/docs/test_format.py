"""docs/format.md is enough to read and to write a store: by a reader and a writer that were written from it alone."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import format_reader
import format_writer
import numpy as np
import pytest
import zarr
from crc32c import crc32c as crc32c_of_others
from format_reader import NotAsSpecified, Store, crc32c

from vcache.extract.video import DecodedVideo, DecodeRequest
from vcache.pipelines import decoding
from vcache.pipelines.extraction import run_extraction
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.train_head import train_head
from vcache.store.layout import widened_bfloat16
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.quantise import dequantise_tokens
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store
from vcache.store.writer import add_videos, create_store

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "format.md").read_text()
GOLDEN = REPO / "tests" / "store" / "golden_v1"


class DecodesHere:
    """In place of `DecodePool`: the same decoder in the calling thread."""

    def __init__(self, num_workers: int, *, decoder: str = "pyav") -> None:
        pass

    def decode(self, request: DecodeRequest) -> DecodedVideo:
        return decoding.decode_video(request)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def extract(worded_clip: Path) -> Any:
    """extract(store, **options): the tiny videos, one of which is not a video, into a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "DecodePool", DecodesHere)

        def run(store: Path, videos: Path, **options: object) -> Path:
            defaults: dict[str, object] = {"layers": "2", "frames": 4, "stride": 3, "device": "cpu"}
            model = f"local-dir:{worded_clip}"
            run_extraction(
                ExtractionConfig(  # type: ignore[arg-type]
                    **{
                        "dataset": str(videos),
                        "model": model,
                        "pretrained": None,
                        "store": store,
                        **defaults,
                        **options,
                    }
                )
            )
            return store

        yield run


@pytest.fixture(scope="module")
def stores(
    extract: Callable[..., Path], video_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Stores that have between them every dtype, way to cross-frame attention and kind of array."""
    root = tmp_path_factory.mktemp("stores")
    videos = root / "videos"
    for name in ("train/jump/j0", "train/jump/j1", "train/wave/w0", "val/jump/j0", "val/wave/w1"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video_folder / f"{name}.mp4", videos / f"{name}.mp4")
    (videos / "train" / "wave" / "broken.mp4").write_text("<html>not found</html>")
    several = {"layers": "2", "views": 2, "augment": "evl", "pixels": 4}
    made = {
        "float32": extract(root / "float32.zarr", videos, dtype="float32", cross_frame="qk", **several),
        "bfloat16": extract(root / "bfloat16.zarr", videos, dtype="bfloat16", cross_frame="maps", layers="2"),
        "int8": extract(root / "int8.zarr", videos, dtype="int8", cross_frame="derive", layers="0,2", max_error=1.0),
    }
    shutil.copy(videos / "train" / "jump" / "j0.mp4", videos / "train" / "jump" / "new.mp4")
    extract(made["float32"], videos, dtype="float32", cross_frame="qk", **several)  # grows by a part
    return made


def compare_with_vcache(path: Path) -> set[str]:
    """Every stored row of every array by the page's reader, FeatureStore and zarr-python; the names of the arrays."""
    ours, group, names = Store(path), zarr.open_group(str(path), mode="r"), set()
    with FeatureStore.open(path) as store:
        assert ours.parts == store.manifest.splits
        for part in ours.parts:
            for view in store.part_views(part):
                for name in store.view(part, view).specs:
                    compare_array(ours, store, group, part, view, name)
                    names.add(name)
        for name in store.manifest.constants:
            np.testing.assert_array_equal(ours.constant(name), store.constant(name))
            np.testing.assert_array_equal(ours.constant(name), group[f"constants/{name}"][...])
    return names


def compare_array(ours: Store, store: FeatureStore, group: zarr.Group, part: str, view: int, name: str) -> None:
    rows, split = ours.read(part, view, name), part.partition("+")[0]
    places = {place: row for row, place in enumerate(ours.rows_of_split(split))}
    wanted = [places[part, row] for row in rows]
    theirs = store.read(split, name, wanted, view=view)
    by_zarr = group[f"{part}/view-{view}/{name}"][...]
    committed = store.committed_rows(split, [name], view)
    assert set(rows) == {row for (p, row), place in places.items() if p == part and committed[place]}
    bfloat16 = store.arrays(split, view)[name].dtype == "bfloat16"
    for (row, values), value in zip(rows.items(), theirs, strict=True):
        np.testing.assert_array_equal(values, widened_bfloat16(value) if bfloat16 else value)
        zarrs = widened_bfloat16(by_zarr[row]) if bfloat16 else by_zarr[row]
        np.testing.assert_array_equal(values, zarrs)


def test_the_reader_of_the_page_imports_neither_vcache_nor_zarr() -> None:
    for module in (format_reader, format_writer):
        imported = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            )
        }
        own = {
            "format_reader",
            "collections",
            "fcntl",
            "hashlib",
            "json",
            "numpy",
            "os",
            "pathlib",
            "secrets",
            "struct",
            "typing",
        }
        assert imported <= own, imported - own


def test_its_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    data = bytes(range(256)) * 3
    assert crc32c(data) == crc32c_of_others(data) == crc32c(data[100:], crc32c(data[:100]))


def test_every_array_of_real_stores_is_read_equal(stores: dict[str, Path]) -> None:
    names = set().union(*(compare_with_vcache(path) for path in stores.values()))
    kinds = {name.split("/")[0] for name in names}
    everything = {"frame_index", "crop", "flip", "embed", "tokens", "block_input", "cls", "q", "k", "maps", "pixels"}
    assert kinds >= everything | {"pixel_index", "tokens_scale", "block_input_scale"}


def test_every_kind_of_array_and_constant_is_on_the_page(stores: dict[str, Path]) -> None:
    scales = {"tokens_scale", "block_input_scale", "q_scale", "k_scale"}
    for path in stores.values():
        with FeatureStore.open(path) as store:
            arrays = {name for part in store.manifest.splits for view in store.part_views(part)
                      for name in store.view(part, view).specs}  # fmt: skip
            for name in sorted(arrays):
                kind, slash, _ = name.partition("/")
                assert kind in scales or f"`{kind}{slash}" in PAGE, name
            for name in store.manifest.constants:
                kind, _, rest = name.partition("/")
                last = rest.rpartition("/")[2]
                assert f"`{kind}/" in PAGE and (not last.endswith(("weight", "bias")) or f"{last}`" in PAGE), name
            assert all(f"`{field}`" in PAGE for field in store.manifest.facts), store.manifest.facts.keys()
            told = {field for name in ("backbone",) for field in store.manifest.facts[name]} - {"model"}
            assert all(f"`{field}`" in PAGE for field in told), told


def test_a_grown_store_has_a_part_and_a_failure(stores: dict[str, Path]) -> None:
    store = Store(stores["float32"])
    assert list(store.parts) == ["train", "val", "train+1"]
    (failure,) = [failure for record in store.records("train", 0) for failure in record["failures"]]
    assert failure["video_id"].endswith("broken.mp4") and failure["row"] not in store.read("train", 0, "embed")


def test_tables_are_read_equal(stores: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "multi_hot": rng.integers(0, 2, (3, 4), dtype=np.uint8),
        "start_seconds": np.array([0.5, np.nan, 2.0]),
        "actions": np.array(["0 1.5 2.0", "", "é"], dtype=np.dtypes.StringDType()),
        "verb": np.arange(3),
    }
    table = VideoTable(("a", "é", "c"), ("a.mp4", "é/b.mp4", "c"), np.array([2, 0, 1]), columns)
    with FeatureStore.open(stores["float32"]) as store:
        manifest = store.manifest
    fields = {"key": manifest.key, "spec": manifest.spec, "facts": manifest.facts, "rows_per_shard": 2}
    create_store(
        tmp_path / "s", Manifest(**fields, dataset="d", class_names=(*"abcd",), splits={"train": 3}), {"train": table}
    )
    with FeatureStore.open(tmp_path / "s") as store:
        more = {name: values[:1] for name, values in columns.items()}
        add_videos(store, "train", VideoTable(("new",), ("new.mp4",), np.array([3]), more))
        ours = Store(tmp_path / "s")
        for part in ("train", "train+1"):
            read, theirs = ours.table(part), store.part_videos(part)
            assert (tuple(read["video_id"]), tuple(read["path"])) == (theirs.ids, theirs.paths)
            for name, values in {"label": theirs.labels, **theirs.columns}.items():
                np.testing.assert_array_equal(read[name], values)


def test_int8_is_undone_as_the_page_says(stores: dict[str, Path]) -> None:
    store = Store(stores["int8"])
    q, scale = store.read("val", 0, "tokens/2"), store.read("val", 0, "tokens_scale/2")
    mean, std = store.constant("tokens_mean/2"), store.constant("tokens_std/2")
    for row, stored in q.items():
        by_hand = stored * scale[row].astype(np.float32)[..., None] * std + mean
        np.testing.assert_array_equal(by_hand, dequantise_tokens(stored, scale[row], mean, std))
        cls = store.read("val", 0, "cls/2")[row].astype(np.float32)
        assert np.linalg.norm(by_hand[:, 0] - cls) < 0.02 * np.linalg.norm(cls)


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_bit_of_any_file_is_found(stores: dict[str, Path], tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / "s.zarr"
    shutil.copytree(stores["float32"], path)
    kinds = [
        "_commit/*/*.json",
        "*/view-*/tokens/2/c/*/0/0/0",
        "*/view-*/frame_index/c/*/0",
        "*/path/c/0",
        "constants/text/*/c/**/0",
    ]
    for pattern in kinds:
        file = rng.choice([file for file in sorted(path.glob(pattern)) if file.is_file()])
        sound = file.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.integers(len(sound))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with pytest.raises((NotAsSpecified, ValueError, KeyError)):
            read_everything(path)
        file.write_bytes(sound)
    read_everything(path)


def read_everything(path: Path) -> None:
    store = Store(path)
    for name in store.manifest["constants"]:
        store.constant(name)
    for part in store.parts:
        store.table(part)
        for view in (0, 1):
            for name in ("tokens/2", "frame_index"):
                store.read(part, view, name)


def test_a_shard_file_put_in_the_place_of_another_is_found(stores: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(stores["float32"], path)
    one, other = (path / part / "view-0/tokens/2/c/0/0/0/0" for part in ("train", "val"))
    two = path / "train/view-1/tokens/2/c/0/0/0/0"
    assert one.stat().st_size == two.stat().st_size != other.stat().st_size
    shutil.copy(two, one)
    with pytest.raises(NotAsSpecified, match="holds what was committed"):
        read_everything(path)


def test_bytes_on_the_page_are_those_of_the_golden_store() -> None:
    blocks = re.findall(r"```hex (\S+)\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 2
    for name, text in blocks:
        lines = (re.split(r"  +", line.strip())[0] for line in text.strip().splitlines())
        assert bytes.fromhex("".join(lines)) == (GOLDEN / name).read_bytes(), name


def test_the_key_and_the_record_on_the_page_are_right() -> None:
    spec, digest = re.search(r"```\n(\{.*\})\n([0-9a-f]{64})  ->  key ([0-9a-f]{16})\n```", PAGE).group(1, 2)  # type: ignore[union-attr]
    golden = Store(GOLDEN)
    assert format_reader.canonical(golden.manifest["spec"]).decode() == spec
    assert format_reader.hashlib.sha256(spec.encode()).hexdigest() == digest and digest[:16] == golden.manifest["key"]
    flags = next(r["arrays"]["flip"] for r in golden.records("train", 0) if r["shard"] == 1 and "flip" in r["arrays"])
    shown = PAGE.split("The record of the flags above:")[1].split("```")[1].replace("\n", "")
    assert f'"flip":{format_reader.canonical(flags).decode()}' in shown
    compare_with_vcache(GOLDEN)


def test_floats_of_canonical_json_look_as_the_page_says() -> None:
    assert format_reader.canonical([0.5, 100.0, 1e-5, 1e16, 1, "é\n"]) == b'[0.5,100.0,1e-05,1e+16,1,"\\u00e9\\n"]'


@pytest.fixture
def written(stores: dict[str, Path], tmp_path: Path) -> Path:
    """A store of the page's writer: 3 classes, whose CLS tokens point in three directions; one video of each split failed."""
    with FeatureStore.open(stores["float32"]) as store:
        spec = {**store.manifest.spec, "model": "written by hand", "ünknown": [1, 1.0, 1e-7]}
        facts = {"backbone": store.manifest.facts["backbone"]}
        facts["request"] = {
            word: store.manifest.facts["request"][word] for word in ("frames", "stride", "tsn", "dtype")
        }
    rng, path = np.random.default_rng(5), tmp_path / "written.zarr"
    T, D, labels = 4, facts["backbone"]["width"], {"train": np.arange(11) % 3, "val": np.arange(7) % 3}
    tables = {
        split: {"video_id": [f"{split}-{row}" for row in range(len(y))], "path": [f"{split}-{row}.mp4" for row in range(len(y))],
                "label": y} for split, y in labels.items()
    }  # fmt: skip
    manifest = {"spec": spec, "dataset": "by hand", "class_names": ["a", "b", "ç"], "rows_per_shard": 4, "facts": facts}
    format_writer.create(path, {**manifest, "versions": {}, "created": "2026-01-01T00:00:00+00:00"}, tables)
    directions = np.eye(3, D, dtype=np.float32) * 5
    for split, y in labels.items():
        rows = [(directions[k] + rng.standard_normal((T, D)) / 4).astype(np.float32) for k in y]
        index = [np.arange(T, dtype=np.int32) + row for row in range(len(y))]
        rows[1] = index[1] = None  # type: ignore[call-overload]
        arrays = {"cls/2": (("frame", "channel"), rows), "frame_index": (("frame",), index)}
        format_writer.write_view(path, split, 0, arrays)
    return path


def test_vcache_reads_and_verifies_what_the_writer_of_the_page_wrote(written: Path) -> None:
    names = compare_with_vcache(written)
    assert names == {"cls/2", "frame_index"}
    with FeatureStore.open(written) as store:
        verification = verify_store(store)
        assert [finding.message for finding in verification.findings] == []
        assert [failure.row for failure in store.failures("val")] == [1]
        assert store.manifest.key == Store(written).manifest["key"]


def test_a_head_is_trained_from_a_store_that_vcache_never_wrote(written: Path, tmp_path: Path) -> None:
    settings = {"epochs": 8, "batch_size": 5, "lr": 0.05}
    config = TrainingConfig(head="linear", store=written, out=tmp_path / "run", device="cpu", settings=settings)
    train_head(config)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_top1"] == 1.0, last
