"""tail.safetensors is read back as it was written, or the run says what is wrong with it and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vcache.heads.registry import get_head
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.pipelines import runs
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.tail_file import TAIL, TailKey, read_tail, tail_bytes

DIGEST = "5a" * 32
WIDTH, EMBED = 12, 5
HEAD = {"num_classes": 3, "num_frames": 4, "width": WIDTH, "num_layers": 6, "embed_dim": EMBED, "grid": [2, 3]}


def make_tail(dtype: str = "float32", num_blocks: int = 3, digest: str = DIGEST, seed: int = 0) -> FrozenTail:
    block = BlockShape(width=WIDTH, num_heads=3, mlp_dim=20, activation="gelu")
    shape = TailShape(num_layers=6, num_blocks=num_blocks, block=block, embed_dim=EMBED)
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(x.shape, generator=generator) for name, x in FrozenTail(shape).state_dict().items()}
    tail = FrozenTail.of(shape, drawn, getattr(torch, dtype))
    tail.weights_sha256 = digest
    return tail


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of an AIM in the top two of six blocks."""
    key = {"num_blocks": 2, "dtype": "float16", "weights_sha256": DIGEST}
    config = {"head": "aim", "store": None, "head_config": {**HEAD, "blocks": 2}, "tail": key}
    made = Run.create(tmp_path / "run", config, ("a", "b", "c"), make_tail("float16"))
    made.save_head(get_head("aim")(made.head_config()).state_dict())
    return made.path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, dtype: str, num_blocks: int) -> None:
    """Of a shared tail, the blocks that are asked for alone."""
    tail = make_tail(dtype)
    (tmp_path / TAIL).write_bytes(tail_bytes(tail, num_blocks))
    key = TailKey(num_blocks=num_blocks, dtype=dtype, weights_sha256=DIGEST)
    read = read_tail(tmp_path / TAIL, key)
    assert read.shape.num_blocks == num_blocks and read.shape.block == tail.shape.block
    assert read.weights_sha256 == DIGEST
    assert [name for name in read.blocks] == [str(i) for i in range(6 - num_blocks, 6)]
    ours, theirs = read.state_dict(), tail.state_dict()
    torch.testing.assert_close(ours, {name: theirs[name] for name in ours}, rtol=0, atol=0)
    assert not any(p.requires_grad for p in read.parameters()) and not read.training


def test_a_run_gives_its_head_the_blocks_that_it_keeps(run: Path) -> None:
    head: Any = Run.open(run).load_head()
    assert head.tail.shape.num_blocks == 2
    torch.testing.assert_close(head.tail.state_dict()["proj"], make_tail("float16").proj, rtol=0, atol=0)


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
    weights = load_file(file)
    change(weights, told)
    save_file(weights, file, told)


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def with_many_blocks(weights: dict[str, Any], told: dict[str, str]) -> None:
    shape = json.loads(told["shape"])
    told["shape"] = json.dumps({**shape, "num_layers": 10**9, "num_blocks": 10**9})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: file.unlink(), "is not there"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-40]), "is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "is damaged"),
    "a pickle": (lambda file: torch.save({"proj": torch.zeros(2)}, file), "is damaged"),
    "one bit": (flipped, "is damaged: its weights are not those that were written"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is damaged"),
    "no metadata": (lambda file: save_file(load_file(file), file), "do not say crc32c, shape, weights_sha256"),
    "no shape": (
        lambda file: rewritten(file, lambda w, told: told.update(shape="{}")),
        "do not fit together ('block')",
    ),
    "no JSON": (lambda file: rewritten(file, lambda w, told: told.update(shape="{")), "do not fit together (Expecting"),
    "many blocks": (lambda file: rewritten(file, with_many_blocks), "it says 1000000000 blocks"),
    "no weights": (lambda file: rewritten(file, lambda w, told: w.clear()), "not those that were written"),
    "another backbone": (
        lambda file: file.write_bytes(tail_bytes(make_tail("float16", digest="c3" * 32), 2)),
        f"of another run: it is of weights {'c3' * 8}, and the head was trained on {'5a' * 8}",
    ),
    "another dtype": (
        lambda file: file.write_bytes(tail_bytes(make_tail("bfloat16"), 2)),
        "its weights are bfloat16, and the head was trained on float16",
    ),
    "fewer blocks": (
        lambda file: file.write_bytes(tail_bytes(make_tail("float16"), 1)),
        "it has 1 block, and the head runs 2",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_without_its_tail_says_which_file_and_what_to_do(run: Path, how: str) -> None:
    damage, words = BROKEN[how]
    damage(run / TAIL)
    with pytest.raises(RunError) as refused:
        Run.open(run).load_head()
    said = str(refused.value)
    assert str(run / TAIL) in said and words in said
    assert said.endswith(
        "Restore tail.safetensors from a copy; that of another run on the same store will do, if its head runs "
        "as many blocks."
    )


def test_the_tail_of_a_run_with_more_blocks_will_do(run: Path) -> None:
    (run / TAIL).write_bytes(tail_bytes(make_tail("float16"), 3))
    head: Any = Run.open(run).load_head()
    assert len(head.tower_blocks()) == 2


def test_an_imported_run_takes_any_whole_tail_but_not_one_of_other_sizes(run: Path) -> None:
    """Its config says nothing of weights; the head knows its own sizes."""
    config = json.loads((run / "config.json").read_text())
    del config["tail"]
    (run / "config.json").write_text(json.dumps(config))
    (run / TAIL).write_bytes(tail_bytes(make_tail("bfloat16", digest=""), 2))
    Run.open(run).load_head()
    config["head_config"]["num_layers"] = 7
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"of a backbone with 6 blocks of width 12 .* the head is for 7, 12"):
        Run.open(run).load_head()


def test_a_run_that_was_not_begun_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are there before config.json says that there is a run."""
    config = {"head": "aim", "store": None, "head_config": {**HEAD, "blocks": 2}}

    def killed(path: Path, text: str) -> None:
        if path.name == "config.json":
            raise KeyboardInterrupt
        write(path, text)

    write = runs.write_text
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "write_text", killed)
        Run.create(tmp_path / "run", config, ("a", "b", "c"), make_tail())
    assert (tmp_path / "run" / TAIL).is_file() and not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "run" / f"{TAIL}.part").write_bytes(b"half")
    Run.forget_unbegun(tmp_path / "run")
    made = Run.create(tmp_path / "run", config, ("a", "b", "c"), make_tail())
    assert sorted(path.name for path in made.path.iterdir()) == ["classes.txt", "config.json", TAIL]


def test_mending_writes_only_what_is_not_whole(run: Path) -> None:
    made, before = Run.unfinished(run), (run / TAIL).stat().st_mtime_ns
    made.mend_tail(make_tail("float16"))
    assert (run / TAIL).stat().st_mtime_ns == before
    flipped(run / TAIL)
    made.mend_tail(make_tail("float16"))
    Run.open(run).load_head()
