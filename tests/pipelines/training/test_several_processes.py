"""`torchrun ... vcache train-head` and `sweep`: two real processes train as one, each on its own rows, and go on after a stop."""

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
from safetensors.torch import load_file

NUM_PROCESSES = 2
EPOCHS, BATCH_SIZE, NUM_TRAIN, NUM_VAL = (
    3,
    11,
    12,
    6,
)  # the last batch of an epoch is one clip: nothing for the second process
HEADS = {
    "linear": "train-head linear --lr 0.05",
    "evl": "train-head evl --lr 0.01 --set layers=-2: --set num_heads=4 --set mlp_dropout=0 --set cls_dropout=0",
}
DROPOUT = "train-head evl --lr 0.01 --set layers=-1: --set num_heads=4 --set mlp_dropout=0.5"
SWEEP = "sweep linear --grid lr=0.05,1e30,0.01"
"""The middle one is lost at its second step."""
DIST = (
    "train-head dist --epochs 2 --batch-size 7 --lr 0.003 --device cpu --set integration_dim=64 --set temporal_dim=6 "
    "--set adaptive_pooling_layers=1 --set warmup_epochs=0 --leave-out jump"
)
"""Pixels, streamed tokens and text. 8 videos stay: the last batch of an epoch is one clip here, too."""
ACTIONCLIP = (
    "train-head actionclip --epochs 2 --batch-size 11 --lr 0.003 --device cpu --set templates=label --set prompt=lstm "
    "--set warmup_epochs=0"
)
"""Videos and texts are matched across processes. One template a class: all draw the same."""
AIM = (
    "train-head aim --epochs 2 --batch-size 11 --lr 0.003 --device cpu --set blocks=1 --set warmup_epochs=0 --set dropout=0 "
    "--set drop_path=0"
)
"""Runs blocks of the backbone, which each process reads for itself and the first keeps."""
UNMIXED = "--set mixup=0 --set cutmix=0"


def run_in_processes(folder: Path, lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """done[rank][line]"""
    (folder / "lines.json").write_text(json.dumps(lines))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_PROCESSES)]
    done = subprocess.run(
        [sys.executable, *launcher, training_processes.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    (folder / "stdout").write_text(done.stdout)
    return [json.loads((folder / f"done-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]


@pytest.fixture(scope="module")
def together(float32_store: Path, pixel_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One start for all lines: (folder, done[rank])."""
    folder = tmp_path_factory.mktemp("together")

    def line(words: str, name: str) -> str:
        return f"{words} {common(float32_store)} --out {shlex.quote(str(folder / name))}"

    lines: list[dict[str, Any]] = [{"line": line(words, name)} for name, words in HEADS.items()]
    lines.append({"line": line(DROPOUT, "dropout")})
    lines.append({"line": line(DROPOUT, "stopped"), "stopped_rank": 1, "stopped_after": 3})
    lines.append({"line": f"resume {shlex.quote(str(folder / 'stopped'))}"})
    lines.append({"line": line(HEADS["linear"], "left"), "stopped_rank": 0, "stopped_after": 1})
    lines.append({"line": line(SWEEP, "sweep")})
    lines.append({"line": line(f"{SWEEP} --together 2", "stopped-sweep"), "stopped_rank": 1, "stopped_after": 3})
    lines.append({"line": f"resume {shlex.quote(str(folder / 'stopped-sweep'))}"})
    lines.append({"line": line(SWEEP, "left-sweep"), "stopped_rank": 0, "stopped_after": 1})
    lines.append({"line": line(f"{SWEEP} --together 1", "one-by-one")})
    for name, mixing in (("dist", UNMIXED), ("mixed-dist", "")):
        out = shlex.quote(str(folder / name))
        lines.append({"line": f"{DIST} {mixing} --store {shlex.quote(str(pixel_store))} --out {out}"})
    lines.append(
        {"line": f"{ACTIONCLIP} --store {shlex.quote(str(pixel_store))} --out {shlex.quote(str(folder / 'contrast'))}"}
    )
    lines.append({"line": f"{AIM} --store {shlex.quote(str(float32_store))} --out {shlex.quote(str(folder / 'tail'))}"})
    return folder, run_in_processes(folder, lines)


def common(store: Path) -> str:
    return f"--store {shlex.quote(str(store))} --epochs {EPOCHS} --batch-size {BATCH_SIZE} --device cpu"


def assert_equal_but_for_rounding(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Gradients are sums of float32 in another order. AdamW divides by their size, so where one is nearly 0 a last bit may become
    a step: of a thousand weights one may differ by more (which one depends on the CPU). Without sums all would."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        far = ~torch.isclose(tensor, theirs[name], rtol=1e-4, atol=1e-5)
        assert far.sum() <= max(1, tensor.numel() // 1000), f"{name}: {far.sum()} of {tensor.numel()} differ"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", HEADS)
def test_two_processes_end_with_the_weights_and_metrics_of_one(
    together: Any, name: str, float32_store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    status, _, err = vcache(f"{HEADS[name]} {common(float32_store)} --out {tmp_path / 'alone'}")
    assert status == 0, err
    folder, done = together
    assert [of_rank[list(HEADS).index(name)]["status"] for of_rank in done] == [0, 0]
    for file in ("head.safetensors", "best.safetensors"):
        assert_equal_but_for_rounding(load_file(folder / name / file), load_file(tmp_path / "alone" / file))
    both, alone = metrics(folder / name), metrics(tmp_path / "alone")
    assert len(both) == len(alone) == EPOCHS
    for a, b in zip(both, alone, strict=True):
        for counted in ("step", "lr", "train_top1", "val_top1", "val_top5", "val_mean_class_accuracy", "best"):
            assert a[counted] == b[counted], counted
        assert [a["train_loss"], a["val_loss"]] == pytest.approx([b["train_loss"], b["val_loss"]], rel=1e-4)


def test_two_processes_train_a_head_of_pixels_and_text_as_one_does(
    together: Any, pixel_store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    folder, done = together
    assert [[line["status"] for line in of_rank[11:]] for of_rank in done] == [[0, 0, 0, 0]] * NUM_PROCESSES
    assert [[len(batch) for batch in of_rank[11]["rows"]["train epoch 0"]] for of_rank in done] == [[4, 1], [3, 0]]
    status, _, err = vcache(f"{DIST} {UNMIXED} --store {pixel_store} --out {tmp_path / 'alone'}")
    assert status == 0, err
    ours, theirs = (load_file(out / "head.safetensors") for out in (folder / "dist", tmp_path / "alone"))
    for name in ours:
        if name.endswith("attn.in_proj_bias"):  # the bias of the keys cancels in the softmax: AdamW follows rounding
            ours[name], theirs[name] = (torch.cat(x[name].chunk(3)[::2]) for x in (ours, theirs))
    assert_equal_but_for_rounding(ours, theirs)
    (text,) = (name for name in ours if name.endswith("text.embeddings"))
    assert torch.equal(ours[text], theirs[text]) and len(ours[text]) == 2
    both, alone = metrics(folder / "dist"), metrics(tmp_path / "alone")
    for a, b in zip(both, alone, strict=True):
        assert [a["step"], a["val_top1"]] == [b["step"], b["val_top1"]]
        assert [a["train_loss"], a["val_loss"]] == pytest.approx([b["train_loss"], b["val_loss"]], rel=1e-4)


def test_videos_and_texts_of_all_processes_are_matched_as_those_of_one(
    together: Any, pixel_store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    folder, _ = together
    status, _, err = vcache(f"{ACTIONCLIP} --store {pixel_store} --out {tmp_path / 'alone'}")
    assert status == 0, err
    ours, theirs = (load_file(out / "head.safetensors") for out in (folder / "contrast", tmp_path / "alone"))
    assert_equal_but_for_rounding(ours, theirs)
    losses = [[line["train_loss"] for line in metrics(out)] for out in (folder / "contrast", tmp_path / "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_train_in_the_blocks_of_the_backbone_as_one_does(
    together: Any, float32_store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    folder, _ = together
    status, _, err = vcache(f"{AIM} --store {float32_store} --out {tmp_path / 'alone'}")
    assert status == 0, err
    for file in ("head.safetensors", "tail.safetensors"):
        assert_equal_but_for_rounding(load_file(folder / "tail" / file), load_file(tmp_path / "alone" / file))


def test_a_process_without_clips_mixes_nothing(together: Any) -> None:
    folder, _ = together
    losses = [line["train_loss"] for line in metrics(folder / "mixed-dist")]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert all(x.isfinite().all() for x in load_file(folder / "mixed-dist" / "head.safetensors").values())


def test_every_row_is_trained_on_once_per_epoch_and_validated_on_once(together: Any) -> None:
    """By one of the processes; of 12 videos in batches of 11, the last batch has nothing for the second."""
    _, done = together
    seen = [of_rank[0]["rows"] for of_rank in done]
    assert seen[0].keys() == seen[1].keys() == {"val in_order", *(f"train epoch {n}" for n in range(EPOCHS))}
    for epoch in range(EPOCHS):
        shares = [rows[f"train epoch {epoch}"] for rows in seen]
        assert [[len(batch) for batch in share] for share in shares] == [[6, 1], [5, 0]]
        assert sorted(row for share in shares for batch in share for row in batch) == list(range(NUM_TRAIN))
    validated = [row for rows in seen for batch in rows["val in_order"] for row in batch]
    assert sorted(validated) == sorted([*range(NUM_VAL)] * EPOCHS)


def test_training_does_without_open_clip(together: Any) -> None:
    """It loads transformers and more, for as long as torch itself. A head that runs the backbone's blocks needs it."""
    _, done = together
    assert not any(line["open_clip"] for of_rank in done for line in of_rank[:-1])
    assert all(of_rank[-1]["open_clip"] for of_rank in done)


def test_a_stop_asked_of_one_process_stops_all_and_they_go_on_bit_for_bit(together: Any) -> None:
    """With dropout, whose masks each process draws for itself."""
    folder, done = together
    assert [[line["status"] for line in of_rank[2:6]] for of_rank in done] == [[0, 130, 0, 130]] * NUM_PROCESSES
    stopped, whole = (load_file(folder / name / "head.safetensors") for name in ("stopped", "dropout"))
    torch.testing.assert_close(stopped, whole, rtol=0, atol=0)
    seen = [of_rank[3]["rows"]["train epoch 1"] + of_rank[4]["rows"]["train epoch 1"] for of_rank in done]
    assert sorted(row for share in seen for batch in share for row in batch) == list(range(NUM_TRAIN))
    assert not (folder / "stopped" / "checkpoint").exists()


def test_the_first_process_alone_speaks(together: Any) -> None:
    folder, _ = together
    said = (folder / "stdout").read_text() + (folder / "stderr").read_text()
    assert said.count(f"vcache eval {folder / 'linear'}") == 1
    assert said.count("12 videos to train on, 6 to validate on") == 8 + 8  # of the sweeps, some have several groups
    assert said.count("3 heads in 1 group") == 2 and said.count("\n  in each of 2 processes\n") == 4
    command = f"torchrun --nproc-per-node 2 --no-python vcache resume {folder / 'stopped'}\n"
    assert said.count(f"stopped after 3 steps, all of them kept. Go on with:  {command}") == 1


def test_a_sweep_of_two_processes_is_that_of_one_and_loses_the_same_head(
    together: Any, float32_store: Path, tmp_path: Path, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    folder, done = together
    assert [of_rank[6]["status"] for of_rank in done] == [1, 1]
    status, _, err = vcache(f"{SWEEP} {common(float32_store)} --out {tmp_path / 'alone'}")
    assert status == 1, err
    ours, theirs = results(folder / "sweep"), results(tmp_path / "alone")
    assert [row["status"] for row in ours] == ["finished", "failed", "finished"]
    assert "the loss is nan" in ours[1]["error"]
    for a, b in zip(ours, theirs, strict=True):
        for same in ("lr", "status", "top1", "top5", "best_epoch", "epochs", "parameters", "error"):
            assert a[same] == b[same], same
    for run in ("linear-lr0.05", "linear-lr0.01"):
        ours, theirs = (load_file(out / run / "head.safetensors") for out in (folder / "sweep", tmp_path / "alone"))
        assert_equal_but_for_rounding(ours, theirs)


def test_the_batches_of_a_sweep_are_shared_and_read_once_for_all_heads(together: Any) -> None:
    _, done = together
    shares = [of_rank[6]["rows"]["train epoch 1"] for of_rank in done]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(NUM_TRAIN))


def test_a_sweep_that_is_stopped_in_one_process_stops_in_all_and_goes_on_bit_for_bit(together: Any) -> None:
    """Group after group; the head that was lost before the stop is not tried again."""
    folder, done = together
    assert [[line["status"] for line in of_rank[7:9]] for of_rank in done] == [[130, 1]] * NUM_PROCESSES
    said = (folder / "stderr").read_text()
    assert said.count(f"--no-python vcache resume {folder / 'stopped-sweep'}\n") == 1
    stopped, whole = results(folder / "stopped-sweep"), results(folder / "sweep")
    for a, b in zip(stopped, whole, strict=True):
        assert {**a, "seconds": "", "run": ""} == {**b, "seconds": "", "run": ""}
    for run in ("linear-lr0.05", "linear-lr0.01"):
        ours, theirs = (load_file(folder / out / run / "head.safetensors") for out in ("stopped-sweep", "sweep"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_head_that_is_lost_in_a_group_of_its_own_leaves_the_next_groups_alone(together: Any) -> None:
    folder, done = together
    assert [of_rank[10]["status"] for of_rank in done] == [1, 1]
    alone, beside = results(folder / "one-by-one"), results(folder / "sweep")
    for a, b in zip(alone, beside, strict=True):
        assert {**a, "seconds": "", "run": ""} == {**b, "seconds": "", "run": ""}


def results(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["left", "left-sweep"])
def test_another_number_of_processes_cannot_go_on_with_a_run_or_a_sweep(
    together: Any, name: str, vcache: Callable[[str], tuple[int, str, str]]
) -> None:
    run = together[0] / name
    status, _, err = vcache(f"resume {run}")
    assert status == 1
    assert f"{run} was begun with 2 processes, and now there is 1." in err
    assert f"Go on with:  torchrun --nproc-per-node 2 --no-python vcache resume {run}\n" in err
