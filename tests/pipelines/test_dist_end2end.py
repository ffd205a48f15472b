"""DiST through the command line: pixels and text in the store, training, evaluation, and each refusal mended as it says."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Vcache = Callable[..., tuple[int, str, str]]
SMALL = (
    "--set integration_dim=16 --set temporal_dim=6 --set adaptive_pooling_layers=1 --set lr=0.003 --set warmup_epochs=0 "
    "--set mixup=0 --set cutmix=0"
)


@pytest.fixture
def extract(video_folder: Path, worded_clip: Path, tmp_path: Path) -> str:
    return (
        f"extract {video_folder} --layers all --frames 3 --tsn --cross-frame none --device cpu "
        f"--model local-dir:{worded_clip} --store {tmp_path / 's.zarr'}"
    )


def train(store: Path, run: Path) -> str:
    return f"train-head dist --epochs 2 --batch-size 4 {SMALL} --store {store} --out {run}"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_extract_train_and_eval_need_no_other_step(dtype: str, extract: str, vcache: Vcache, tmp_path: Path) -> None:
    store, run = tmp_path / "s.zarr", tmp_path / "run"
    for line in (f"{extract} --pixels 6 --dtype {dtype} --max-error 1", train(store, run)):
        status, _, err = vcache(line)
        assert status == 0, err
    metrics = json.loads(vcache(f"eval {run} --json")[1])
    assert metrics["num_videos"] == 6 and 0 < metrics["loss"] < 10


def test_each_refusal_is_mended_by_its_command(
    extract: str, vcache: Vcache, tmp_path: Path, forget_text: Callable[[Path], None]
) -> None:
    store, run = tmp_path / "s.zarr", tmp_path / "run"
    assert vcache(extract)[0] == 0
    pixels = refusal(vcache, train(store, run))
    assert (
        "head 'dist' reads tokens of layers 0-2, pixels; split 'train' of s.zarr holds tokens of layers 0-2" in pixels
    )
    assert vcache(mending_command(pixels))[0] == 0
    forget_text(store)
    text = refusal(vcache, train(store, run))
    assert (
        "head 'dist' classifies by text embeddings of the class names, and s.zarr holds none of the templates 'label'.\n"
        f"Add them with:  vcache text {store} --templates label"
    ) in text
    assert vcache(mending_command(text))[0] == 0
    templates = refusal(vcache, f"{train(store, run)} --set templates={tmp_path.name}_prompts")
    assert "It holds label: choose with --set templates=NAME. Or write templates of your own" in templates
    assert mending_command(templates).endswith(f"--templates {tmp_path.name}_prompts.txt")
    assert vcache(train(store, run))[0] == 0
    assert json.loads(vcache(f"eval {run} --json")[1])["num_videos"] == 6


def refusal(vcache: Vcache, line: str) -> str:
    status, _, err = vcache(line)
    assert status == 1
    return err


def mending_command(error: str) -> str:
    """The command that the error ends in, without the program."""
    (command,) = re.findall(r"with:  vcache (.*)$", error, flags=re.MULTILINE)
    return str(command)
