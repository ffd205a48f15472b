"""Every door through which a file of somebody else comes in: a payload in it is refused in words, and does not run."""

import gzip
import io
import json
import pickle
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vcache.extract.backbone import load_backbone
from vcache.extract.datasets.base import DatasetError
from vcache.extract.datasets.registry import load_dataset
from vcache.extract.text import load_text_tower
from vcache.extract.torchscript import read_torchscript
from vcache.extract.tower_weights import read_checkpoint
from vcache.extract.weights import BackboneError, NoTextTower, RandomWeightsRefused
from vcache.pipelines.checkpoint_file import CheckpointError
from vcache.pipelines.class_file import ClassFileError, read_class_names
from vcache.pipelines.evaluation.predictions import Predictions, PredictionsError
from vcache.pipelines.importing import IMPORTERS, ImportConfig, import_head
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.templates import TemplateError, template_set
from vcache.store.errors import CorruptStore, StoreError
from vcache.store.reader import FeatureStore


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "written-by-the-payload"


WEIGHTS = {"visual.proj": torch.arange(6.0).view(2, 3)}


def write_zip(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": WEIGHTS, "args": payload}, path)


def write_poisoned_zip(path: Path, payload: Payload) -> None:
    """What torch.save wrote, with another data.pkl in its place."""
    torch.save({"state_dict": WEIGHTS}, path)
    replace_in_zip(path, "/data.pkl", pickle.dumps(payload, protocol=2))


def write_legacy(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": WEIGHTS, "args": payload}, path, _use_new_zipfile_serialization=False)


def write_tar(path: Path, payload: Payload) -> None:
    """As torch wrote before its legacy format: its parts are pickles, read in this order."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(payload, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_raw(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=2))


def replace_in_zip(path: Path, ending: str, content: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, content if name.endswith(ending) else part)


Vcache = Callable[..., tuple[int, str, str]]
Write = Callable[[Path, Payload], None]
CHECKPOINTS: list[Write] = [write_zip, write_poisoned_zip, write_legacy, write_tar, write_raw]


def unpickle(path: Path) -> None:
    """As a program does that trusts the file."""
    if path.suffix in (".npz", ".npy"):
        loaded = np.load(path, allow_pickle=True)
        _ = loaded if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            pickle.load(archive.extractfile("pickle"))  # type: ignore[arg-type]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(path, weights_only=False)


@pytest.mark.parametrize("write", CHECKPOINTS)
def test_the_payload_fires_where_it_is_unpickled(write: Write, marker: Path, tmp_path: Path) -> None:
    """Without this the tests below could not fail."""
    write(tmp_path / "a.pth", Payload(marker))
    try:
        unpickle(tmp_path / "a.pth")
    except RuntimeError as error:  # a bare payload is no checkpoint, which torch finds after it has run
        assert "magic number" in str(error)
    assert marker.exists()


# Checkpoints: of a head, and of a backbone by file, by folder and by download.


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".npz"])
@pytest.mark.parametrize("write", CHECKPOINTS)
@pytest.mark.parametrize("head", IMPORTERS)
def test_import_head(head: str, write: Write, suffix: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, Payload(marker))
    with pytest.raises(
        CheckpointError, match=r"a\.\w+ (holds \S+, which only running code .*|is a \.tar.*) vcache runs none"
    ):
        import_head(ImportConfig(head=head, file=path, out=tmp_path / "run"))
    assert not marker.exists() and not (tmp_path / "run").exists()


REFUSED = (
    r"cannot be read as a checkpoint: (it holds \S+, which .* vcache runs none|Cannot use .* legacy \.tar format)\.$"
)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", ".npz"])
@pytest.mark.parametrize("write", CHECKPOINTS)
def test_extract_pretrained_file(write: Write, suffix: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, Payload(marker))
    words = REFUSED if suffix != ".safetensors" else "cannot be read as a checkpoint: "
    with pytest.raises(RandomWeightsRefused, match=words):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "epoch_1.pt"])
def test_extract_model_in_a_folder(
    name: str, tiny_clip: Path, video_folder: Path, marker: Path, tmp_path: Path, vcache: Vcache
) -> None:
    folder, store = tmp_path / "clip", tmp_path / "s.zarr"
    shutil.copytree(tiny_clip, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_zip(folder / name, Payload(marker))
    status, _, err = vcache(f"extract {video_folder} --model local-dir:{folder} --store {store} --device cpu")
    assert status == 1 and f"{name} cannot be read as a checkpoint" in err
    assert not marker.exists() and not store.exists()


def test_extract_downloaded_weights(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(tmp_path / "open_clip_pytorch_model.bin", Payload(marker))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(tmp_path / "open_clip_pytorch_model.bin"))
    with pytest.raises(RandomWeightsRefused, match=REFUSED):
        load_backbone("ViT-B-16-quickgelu", "openai")
    assert not marker.exists()


def test_extract_configuration_of_a_folder(marker: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / "open_clip_config.json", Payload(marker))
    with pytest.raises(BackboneError, match="is not a configuration of open_clip"):
        load_backbone(f"local-dir:{tmp_path}", None)
    assert not marker.exists()


@pytest.mark.parametrize("write", CHECKPOINTS)
def test_text_tower_in_a_file(write: Write, marker: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.pt", Payload(marker))
    with pytest.raises(RandomWeightsRefused, match=REFUSED):
        read_checkpoint(tmp_path / "a.pt", "text")
    assert not marker.exists()


@pytest.mark.parametrize("compress", [False, True])
def test_vocabulary_in_a_folder(compress: bool, worded_clip: Path, marker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(worded_clip, tmp_path / "clip"))
    vocabulary = folder / "bpe_tiny.txt.gz"
    write_raw(vocabulary, Payload(marker))
    if compress:
        vocabulary.write_bytes(gzip.compress(vocabulary.read_bytes()))
    with pytest.raises(NoTextTower, match=r"bpe_tiny\.txt\.gz (cannot be read as a vocabulary|has 514)"):
        load_text_tower(f"local-dir:{folder}", None)
    assert not marker.exists()


def test_a_vocabulary_that_unpacks_to_more_than_the_memory_holds(worded_clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(worded_clip, tmp_path / "clip"))
    (folder / "bpe_tiny.txt.gz").write_bytes(gzip.compress(bytes(2**25)))
    with pytest.raises(NoTextTower, match="unpacks to more than 32 MB: it is no vocabulary"):
        load_text_tower(f"local-dir:{folder}", None)


# TorchScript: code beside weights, which torch.jit.load runs.


class Writes(nn.Module):
    """A module of TorchScript that writes a file as it is loaded."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.weight = torch.zeros(2)
        self.marker = str(marker)

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.weight, self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight = torch.from_file(state[1], True, 10)  # creates it
        self.marker = state[1]
        self.training = state[2]


@pytest.fixture
def scripted(marker: Path, tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Writes(marker)).save(str(tmp_path / "scripted.pt"))
    assert not marker.exists()
    return tmp_path / "scripted.pt"


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_the_code_of_an_archive_runs_where_torch_loads_it(scripted: Path, marker: Path) -> None:
    torch.jit.load(scripted)
    assert marker.exists()


def test_the_code_of_an_archive_is_not_run(scripted: Path, marker: Path) -> None:
    with pytest.raises(
        RandomWeightsRefused, match="a module of it is restored by code of its own, and vcache runs none"
    ):
        read_checkpoint(scripted)
    assert not marker.exists()


class Tower(nn.Module):
    """What an archive of CLIP holds, without a class that restores itself."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Tower(), torch.zeros(1, 2)).save(str(tmp_path / "traced.pt"))
    return tmp_path / "traced.pt"


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_the_weights_of_an_archive_are_those_that_torch_loads(traced: Path) -> None:
    expected = dict(torch.jit.load(traced).state_dict())
    read, class_names = read_torchscript(traced)
    torch.testing.assert_close(read, expected, rtol=0, atol=0)
    assert class_names == {"Tower", "Linear"} and read_torchscript(traced, "visual.w")[0].keys() == {"visual.weight"}


def test_a_pickle_in_an_archive_finds_no_class_of_pythons(traced: Path, marker: Path) -> None:
    replace_in_zip(traced, "/data.pkl", pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(
        RandomWeightsRefused, match=r"it holds \w+\.getattr, which only running code .* vcache runs none"
    ):
        read_checkpoint(traced)
    assert not marker.exists()


def test_a_pickle_in_an_archive_that_is_not_needed_is_not_opened(traced: Path, marker: Path) -> None:
    replace_in_zip(traced, "/constants.pkl", pickle.dumps(Payload(marker), protocol=2))
    assert read_checkpoint(traced).weights.keys() == {"weight", "bias"}
    assert not marker.exists()


@pytest.mark.parametrize("ending", ["/data/0", "/data.pkl"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02)."])
def test_an_archive_that_is_damaged_is_refused(ending: str, content: bytes, traced: Path) -> None:
    replace_in_zip(traced, ending, content)
    with pytest.raises(RandomWeightsRefused, match="traced.pt cannot be read as a checkpoint: ."):
        read_checkpoint(traced)


def test_a_tensor_of_an_archive_that_claims_more_than_it_holds_is_refused(traced: Path) -> None:
    """The bias of 3 as 2,147,483,647 times its first value."""
    with zipfile.ZipFile(traced) as archive:
        told = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    shape, stride = b"(K\x03t", b"(K\x01t"
    assert told.count(shape) == told.count(stride) == 1
    claimed = told.replace(shape, b"(J\xff\xff\xff\x7ft").replace(stride, b"(K\x00t")
    replace_in_zip(traced, "/data.pkl", claimed)
    with pytest.raises(RandomWeightsRefused, match=r"a tensor of shape \(2147483647,\) in it has 3 values"):
        read_checkpoint(traced)
    replace_in_zip(traced, "/data.pkl", told.replace(stride, b"(K\x02t"))
    with pytest.raises(RandomWeightsRefused, match="out of bounds for storage"):
        read_checkpoint(traced)


# Runs, predictions, names of classes.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = Run.create(tmp_path / "run", {"head": "linear", "store": None, "head_config": {"num_classes": 3}}, None)
    made.save_head({"a": torch.zeros(2)})
    return made.path


@pytest.mark.parametrize("write", CHECKPOINTS)
def test_the_weights_of_a_run(write: Write, run: Path, marker: Path) -> None:
    write(run / "head.safetensors", Payload(marker))
    with pytest.raises(RunError, match=r"head.safetensors holds no weights in the format of safetensors, the only one"):
        Run.open(run).load_head()
    assert not marker.exists()


def test_the_settings_of_a_run(run: Path, marker: Path) -> None:
    write_raw(run / "config.json", Payload(marker))
    with pytest.raises(RunError, match=r"config.json is damaged: .*Restore it from a copy"):
        Run.open(run)
    assert not marker.exists()


def write_npz(path: Path, payload: Payload) -> None:
    np.savez(path, scores=np.array([[payload, payload]], dtype=object))


def write_npz_ids(path: Path, payload: Payload) -> None:
    np.savez(path, scores=np.zeros((2, 3), np.float32), video_ids=np.array([payload, payload], dtype=object))


def write_npy(path: Path, payload: Payload) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([[payload]], dtype=object))


def write_npy_in_npz(path: Path, payload: Payload) -> None:
    """A pickle where NumPy expects an array."""
    np.savez(path, scores=np.zeros((2, 3), np.float32))
    replace_in_zip(path, "scores.npy", pickle.dumps(payload, protocol=2))


@pytest.mark.parametrize("write", [write_npz, write_npz_ids, write_npy])
def test_the_payload_fires_where_numpy_unpickles_it(write: Write, marker: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.npz", Payload(marker))
    unpickle(tmp_path / "a.npz")
    assert marker.exists()


@pytest.mark.parametrize(
    "write", [write_npz, write_npz_ids, write_npy, write_npy_in_npz, write_zip, write_tar, write_raw]
)
def test_predictions(write: Write, marker: Path, tmp_path: Path, vcache: Vcache) -> None:
    path = tmp_path / "scores.npz"
    write(path, Payload(marker))
    with pytest.raises(PredictionsError, match=r"scores\.npz") as raised:
        Predictions.load(path)
    assert "allow_pickle" not in str(raised.value)
    np.savez(tmp_path / "other.npz", scores=np.zeros((2, 3), np.float32), targets=np.array([0, 2]))
    status, _, err = vcache(f"ensemble {tmp_path / 'other.npz'} {path}")
    assert status == 1 and "scores.npz" in err and "not an error vcache foresaw" not in err
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt"])
def test_names_of_classes(suffix: str, marker: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / f"names{suffix}", Payload(marker))
    with pytest.raises(ClassFileError, match="gives no class names"):
        read_class_names(tmp_path / f"names{suffix}", 3)
    assert not marker.exists()


@pytest.mark.parametrize("write", CHECKPOINTS)
def test_templates(write: Write, marker: Path, tmp_path: Path) -> None:
    write(tmp_path / "prompts.txt", Payload(marker))
    with pytest.raises(TemplateError, match="gives no templates: it is not UTF-8|a template has {}"):
        template_set(str(tmp_path / "prompts.txt"))
    assert not marker.exists()


def test_a_template_formats_nothing(tmp_path: Path) -> None:
    """str.format would reach into the objects that it is given."""
    (tmp_path / "prompts.txt").write_text("{} {0.__class__.__init__.__globals__}\n")
    (text,) = template_set(str(tmp_path / "prompts.txt")).fill("jump")
    assert text == "jump {0.__class__.__init__.__globals__}"


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_a_list_of_videos(suffix: str, marker: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / f"videos{suffix}", Payload(marker))
    with pytest.raises(DatasetError):
        load_dataset(str(tmp_path / f"videos{suffix}"))
    assert not marker.exists()


# Stores: arrays whose metadata asks for a codec that unpickles, and metadata that is a pickle itself.


@pytest.fixture
def store(float32_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float32_store, tmp_path / "store.zarr"))


def use_pickle_codec(folder: Path, codec: str, payload: Payload) -> None:
    metadata = json.loads((folder / "zarr.json").read_text())
    metadata["codecs"] = [{"name": codec, "configuration": {"id": "pickle", "protocol": 2}}]
    (folder / "zarr.json").write_text(json.dumps(metadata))
    for chunk in (folder / "c").rglob("*"):
        if chunk.is_file():
            write_raw(chunk, payload)


@pytest.mark.parametrize("codec", ["pickle", "numcodecs.pickle"])
@pytest.mark.parametrize("name", ["video_id", "label"])
def test_an_array_of_a_store_with_a_codec_that_unpickles(name: str, codec: str, store: Path, marker: Path) -> None:
    use_pickle_codec(store / "val" / name, codec, Payload(marker))
    with pytest.raises(CorruptStore, match="the video table .* is damaged"), FeatureStore.open(store) as opened:
        opened.videos("val")
    assert not marker.exists()


def test_an_array_of_zarrs_second_format_with_pickled_objects(store: Path, marker: Path) -> None:
    """Zarr 2 had arrays of Python objects, and a filter that unpickles them."""
    folder = store / "val" / "video_id"
    num_rows = json.loads((folder / "zarr.json").read_text())["shape"][0]
    shutil.rmtree(folder)
    folder.mkdir()
    described = {
        "zarr_format": 2, "shape": [num_rows], "chunks": [num_rows], "dtype": "|O", "compressor": None,
        "fill_value": None, "order": "C", "filters": [{"id": "pickle", "protocol": 2}],
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(described))
    write_raw(folder / "0", Payload(marker))
    with pytest.raises(StoreError), FeatureStore.open(store) as opened:
        opened.videos("val")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["zarr.json", "val/view-0/tokens/2/zarr.json", "_commit/*/*.json"])
def test_metadata_of_a_store(name: str, store: Path, marker: Path) -> None:
    for path in list(store.glob(name)):
        write_raw(path, Payload(marker))
    with pytest.raises(StoreError), FeatureStore.open(store) as opened:
        opened.read("val", "tokens/2", [0])
    assert not marker.exists()


def test_features_of_a_store(store: Path, marker: Path) -> None:
    for path in (store / "val" / "view-0" / "tokens" / "2" / "c").rglob("*"):
        if path.is_file():
            write_raw(path, Payload(marker))
    with pytest.raises(CorruptStore), FeatureStore.open(store) as opened:
        opened.read("val", "tokens/2", [0])
    assert not marker.exists()


def test_sound_files_pass_the_same_doors(tmp_path: Path) -> None:
    """What is refused above is refused for the payload."""
    torch.save({"state_dict": WEIGHTS}, tmp_path / "a.pt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pt").weights, {"proj": WEIGHTS["visual.proj"]})
    np.savez(tmp_path / "a.npz", scores=np.zeros((2, 3), np.float32), video_ids=np.array(["a", "b"]))
    assert Predictions.load(tmp_path / "a.npz").video_ids == ("a", "b")
    run = Run.create(tmp_path / "run", {"head": "linear", "store": None}, None)
    run.save_head(WEIGHTS)
    torch.testing.assert_close(load_file(run.path / "head.safetensors"), WEIGHTS)
