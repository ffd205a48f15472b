"""`vcache import-head`: official files become runs with the official logits; anything else is refused and leaves nothing."""

import json
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.evl import EVL
from vcache.heads.registry import UnknownHead
from vcache.heads.requirements import ClipFeatures
from vcache.pipelines.checkpoint_file import CheckpointError
from vcache.pipelines.import_evl import extract_line
from vcache.pipelines.importing import ImportConfig, import_head
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.settings import SettingError

GOLDENS = Path(__file__).parents[1] / "goldens"
CONFIG = EVL.Config(num_classes=3, num_frames=4, width=12, num_heads=2, grid=(3, 3), layers=(-2, -1))
HEADS = {"num_heads": "2"}


def save_official(path: Path, state: dict[str, Tensor]) -> Path:
    """As the official training script saves after a step: DDP's prefix, optimizer, schedule and scaler beside the model."""
    module = nn.Module()
    module.module = nn.ParameterList([nn.Parameter(x.clone()) for x in state.values()])
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-4, weight_decay=0.05)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50_000)
    optimizer.step()
    schedule.step()
    checkpoint = {
        "model": {f"module.{name}": x for name, x in state.items()},
        "optimizer": optimizer.state_dict(),
        "lr_sched": schedule.state_dict(),
        "loss_scaler": torch.amp.GradScaler("cpu", init_scale=8.0).state_dict(),
        "next_step": 50_000,
    }
    torch.save(checkpoint, path)
    return path


def state_of(config: EVL.Config = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(x.shape, generator=generator) for name, x in EVL(config).state_dict().items()}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return save_official(tmp_path / "checkpoint-50000.pth", state_of())


@pytest.mark.parametrize(
    ("name", "untold"),
    [
        ("evl_decoder_full", {"grid": "4,2", "num_heads": "6"}),
        ("evl_decoder_conv_pe", {"grid": "4,2", "num_heads": "6"}),
        ("evl_decoder_plain", {"grid": "4,2", "num_heads": "6", "num_frames": "5"}),
    ],
)
def test_an_imported_head_gives_the_official_logits(name: str, untold: dict[str, str], tmp_path: Path) -> None:
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    path = save_official(tmp_path / "file.pth", {key[2:]: x for key, x in arrays.items() if key.startswith("w/")})
    summary = import_head(ImportConfig(head="evl", file=path, settings=untold, out=tmp_path / "run"))
    head = Run.open(Path(summary.run)).load_head()
    facts = json.loads((GOLDENS / f"{name}.json").read_text())
    assert summary.head_config["temporal_conv"] is facts["temporal_conv"]
    assert summary.head_config["qkv_dim"] == facts["qkv_dim"]
    tokens, maps = {}, {}
    for i, layer in enumerate(range(-facts["layers"], 0)):
        q, k = (arrays[f"in/layer{i}/{part}"].transpose(2, 3) for part in "qk")
        tokens[layer], maps[layer] = arrays[f"in/layer{i}/out"], cross_frame_maps(q, k)
    with torch.inference_mode():
        logits = head(ClipFeatures(tokens=tokens, maps=maps if facts["temporal_cross_attention"] else {}))
    torch.testing.assert_close(logits, arrays["out/logits"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "form", ["official", "state dict", "legacy torch", "safetensors", "safetensors by another name"]
)
def test_the_weights_of_a_run_are_those_of_the_file_whatever_its_form(form: str, tmp_path: Path) -> None:
    state = state_of()
    path = tmp_path / ("file.safetensors" if form == "safetensors" else "file.pth")
    if form == "official":
        save_official(path, state)
    elif form.startswith("safetensors"):
        save_file({f"module.{name}": x for name, x in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "state dict")
    import_head(ImportConfig(head="evl", file=path, settings=HEADS, out=tmp_path / "run"))
    run = Run.open(tmp_path / "run")
    torch.testing.assert_close(dict(run.load_head().state_dict()), state, rtol=0, atol=0)
    assert (run.imported, run.has_class_names, run.metrics()) == (True, False, [])
    assert run.config["imported"]["settings"] == HEADS
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "head.safetensors"]


class Writes:
    """Unpickled, it writes a file; a checkpoint with it in is an attack."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "legacy torch", "pickle", "safetensors by name"])
def test_code_in_a_checkpoint_is_not_run(form: str, tmp_path: Path) -> None:
    written, path = tmp_path / "written", tmp_path / ("a.safetensors" if form == "safetensors by name" else "a.pth")
    content = {"model": {f"module.{name}": x for name, x in state_of().items()}, "args": Writes(written)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["args"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(CheckpointError, match=r"a\.\w+ holds \S+, which only running code .* vcache runs none"):
        import_head(ImportConfig(head="evl", file=path, settings=HEADS, out=tmp_path / "run"))
    assert not written.exists() and not (tmp_path / "run").exists()
    if form == "pickle":  # the attack is a real one
        pickle.loads(path.read_bytes())
        assert written.exists()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), form=st.sampled_from(["torch", "legacy torch", "safetensors"]))
def test_a_file_that_is_cut_off_anywhere_is_refused_and_leaves_nothing(
    data: st.DataObject, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = folder / "whole"
    if form == "safetensors":
        save_file(state_of(), whole)
    else:
        torch.save({"model": state_of()}, whole, _use_new_zipfile_serialization=form == "torch")
    content = whole.read_bytes()
    cut = folder / "cut.pth"
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match=r"cut\.pth is (empty|cut off, damaged or no checkpoint)"):
        import_head(ImportConfig(head="evl", file=cut, settings=HEADS, out=folder / "runs" / "run"))
    assert sorted(path.name for path in folder.iterdir()) == ["cut.pth", "whole"]


def test_a_flipped_bit_among_the_weights_is_refused(official: Path, tmp_path: Path) -> None:
    content = bytearray(official.read_bytes())
    place = bytes(content).index(state_of()["proj.2.weight"].numpy().tobytes())
    content[place + 9] ^= 1
    official.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: the checksum of .* does not fit. Download it again"):
        import_head(ImportConfig(head="evl", file=official, settings=HEADS, out=tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty. Download it again"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "is a web page .* Google Drive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS .* git lfs pull"),
        (b"path label\n", "is cut off, damaged or no checkpoint"),
        (b"junk\n", "is cut off, damaged or no checkpoint: it holds no pickle of weights. Download it again"),
    ],
)
def test_a_file_that_is_something_else_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        import_head(ImportConfig(head="evl", file=path, out=tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_an_archive_of_clip_itself_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 3), torch.zeros(1, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript archive, as OpenAI publishes CLIP: a backbone"):
        import_head(ImportConfig(head="evl", file=tmp_path / "ViT-B-16.pt", out=tmp_path / "run"))


def without(name: str) -> dict[str, Tensor]:
    return {key: x for key, x in state_of().items() if key != name}


@pytest.mark.parametrize(
    ("state", "given_settings", "words"),
    [
        (state_of(), {}, "does not tell num_heads: of width 12 .* Say it as in  --set num_heads=12"),
        (without("decoder.temporal_conv.1.bias"), HEADS, "the checkpoint lacks decoder.temporal_conv.1.bias"),
        (without("decoder.decoder_layers.0.norm1.bias"), HEADS, "lacks decoder.decoder_layers.0.norm1.bias"),
        (state_of() | {"extra": torch.zeros(1)}, HEADS, "the head has no extra"),
        (state_of() | {"decoder.temporal_pos_embed.1": torch.zeros(5, 12)}, HEADS, "embed.1 is .5, 12., the head's is .4, 12."),
        (state_of(), HEADS | {"num_frames": "8"}, "num_frames is set to 8, and its weights say 4"),
        (state_of(), HEADS | {"grid": "4,4"}, "grid is set to 4x4, and its T-CA fits 1x13, 3x3, 13x1"),
        ({"classify.weight": torch.zeros(3, 4)}, HEADS, "is not an EVL checkpoint that fits: it holds no EVL decoder"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_with_the_reason(
    state: dict[str, Tensor], given_settings: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = save_official(tmp_path / "file.pth", state)
    with pytest.raises(CheckpointError, match=words):
        import_head(ImportConfig(head="evl", file=path, settings=given_settings, out=tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_the_request_itself_is_checked_first(official: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "a file").touch()
    for config, error, words in (
        (ImportConfig(head="linear", file=official), CheckpointError, "'linear' has no official checkpoints"),
        (ImportConfig(head="evil", file=official), UnknownHead, "Did you mean 'evl'"),
        (ImportConfig(head="evl", file=official, settings={"num_head": "2"}), SettingError, "Did you mean 'num_heads'"),
        (
            ImportConfig(head="evl", file=official, settings={"num_heads": "5"}),
            SettingError,
            "a positive multiple of num_heads",
        ),
        (ImportConfig(head="evl", file=official, settings=HEADS, out=taken), RunError, "is not empty"),
        (ImportConfig(head="evl", file=tmp_path / "none.pth"), CheckpointError, "none.pth is not there. Give the "),
        (ImportConfig(head="evl", file=tmp_path), CheckpointError, "is a folder. Give the checkpoint's file"),
    ):
        with pytest.raises(error, match=words):
            import_head(config)


def test_a_run_that_cannot_be_written_leaves_nothing(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Run, state: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Run, "save_head", fail)
    with pytest.raises(OSError, match="no space"):
        import_head(ImportConfig(head="evl", file=official, settings=HEADS, out=tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == [official.name]


B16 = {"num_classes": 400, "width": 768, "num_heads": 12, "layers": (-4, -3, -2, -1)}


@pytest.mark.parametrize(
    ("config", "name", "line"),
    [
        (
            EVL.Config(**B16, num_frames=32),
            "k400_vitb16_32f_dec4x768.pth",
            "k400 --split val --model ViT-B-16-quickgelu --layers -4: --frames 32 --stride 8 --eval-views 1x3",
        ),
        (
            EVL.Config(**B16, num_frames=16),
            "k400_vitb16_16f_dec4x768.pth",
            "k400 --split val --model ViT-B-16-quickgelu --layers -4: --frames 16 --stride 16 --eval-views 1x3",
        ),
        (
            EVL.Config(**{**B16, "width": 1024, "num_heads": 16}, grid=(16, 16), num_frames=8),
            "k400_vitl14_8f_dec4x1024.pth",
            "k400 --split val --model ViT-L-14-quickgelu --layers -4: --frames 8 --stride 16 --eval-views 3x1",
        ),
        (
            EVL.Config(**B16, num_frames=8, temporal_cross_attention=False),
            "checkpoint-50000.pth",
            "DATASET --split val --model ViT-B-16-quickgelu --layers -4: --frames 8 --stride STRIDE --cross-frame none",
        ),
        (
            EVL.Config(**{**B16, "width": 1280, "num_heads": 20}, num_frames=16),
            "k400_vitb16_8f_dec4x768.pth",  # it is not what its name says
            "DATASET --split val --model MODEL --layers -4: --frames 16 --stride STRIDE",
        ),
    ],
)
def test_what_to_extract_is_told_as_a_command(config: EVL.Config, name: str, line: str) -> None:
    assert extract_line(config, name) == f"vcache extract {line}"


def test_the_command_line_says_what_it_read_and_what_to_do_next(
    official: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    classes, out = tmp_path / "classes.txt", tmp_path / "run"
    classes.write_text("a\nb\nc\n")
    official = official.rename(tmp_path / "k400_vitb16_8f_dec4x768.pth")
    status, screen, _ = vcache(f"import-head evl {official} --classes {classes} --set num_heads=2 --out {out}")
    assert status == 0
    num_parameters = sum(x.numel() for x in state_of().values())
    for words in (
        f"{num_parameters:,} parameters, 3 classes\n",
        "reads 2 layers (-2, -1) of 4 frames, 3x3 patches of width 12; 2 heads",
        "the name of the file says 8 frames, 4 layers and width 768, its weights say 4, 2 and 12",
        "extract with:   vcache extract DATASET --split val --model MODEL --layers -2: --frames 4 --stride STRIDE",
        f"evaluate with:  vcache eval {out} --store STORE",
    ):
        assert words in screen
    assert Run.open(out).class_names() == ("a", "b", "c")
    line = f"import-head evl {official} --set num_heads=2 --out {tmp_path / 'second'} --json"
    printed = json.loads(vcache(line)[1])
    assert (printed["num_parameters"], printed["class_names"]) == (num_parameters, False)
    assert shlex.split(printed["extract"])[:2] == ["vcache", "extract"]
    status, _, err = vcache(f"import-head evl {classes}")
    assert (status, "is cut off, damaged or no checkpoint" in err) == (1, True)
