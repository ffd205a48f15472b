"""Several processes compute what one does: real ones, started with torchrun, that talk through gloo on a CPU."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import world_processes
from safetensors.torch import load_file
from torch import Tensor
from world_processes import NUM_CLIPS, SHARES, TwoTowers, make_batch, share_of

from vcache.pipelines.training import world as world_module
from vcache.pipelines.training.world import ALONE, World, WorldError, joined_world, state_digest

NUM_PROCESSES = 3
CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # sums of float32 in another order
GOLDENS = Path(__file__).parents[2] / "goldens"


def torchrun(num_processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """world_processes.py; the port is one that is free."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return subprocess.run(
        [sys.executable, *launcher, world_processes.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start for all that three processes do together."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(NUM_PROCESSES, "together", folder)
    assert done.returncode == 0, done.stderr
    return folder


def of_all(results: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(results / f"{name}-{rank}") for rank in range(NUM_PROCESSES)]


def alone(loss: Callable[[TwoTowers], Tensor]) -> dict[str, Tensor]:
    """Gradients of one process that has the whole batch."""
    model = TwoTowers()
    loss(model).backward()
    return world_processes.gradients(model)


@pytest.mark.parametrize("name", SHARES)
def test_gradients_are_those_of_one_process_and_equal_in_every_bit_of_all(results: Path, name: str) -> None:
    x, _, labels = make_batch()
    expected = alone(lambda model: model.classification_loss(x, labels) + model.of_one_process.sum())
    for found in of_all(results, f"classify-{name}"):
        assert "unused" not in found  # no gradient anywhere: None, as alone
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(found, of_all(results, f"classify-{name}")[0], rtol=0, atol=0)


def symmetric_kl(model: TwoTowers) -> Tensor:
    """ActionCLIP's loss of a whole batch, written without knowledge of the processes."""
    x, words, labels = make_batch()
    video, text = model.features(x, words)
    logits = model.scale.exp() * video @ text.T
    return (kl(logits, labels) + kl(logits.T, labels)) / 2


def kl(logits: Tensor, labels: Tensor) -> Tensor:
    truth = (10.0 * (labels[:, None] == labels)).softmax(dim=1)
    return torch.nn.functional.kl_div(logits.log_softmax(dim=1), truth, reduction="batchmean")


def test_the_loss_alone_is_the_official_one() -> None:
    golden = np.load(GOLDENS / "kl_losses.npz")
    labels = torch.tensor([0, 1, 0, 2])
    assert np.array_equal(golden["in/gt"], (labels[:, None] == labels).float())
    assert kl(torch.from_numpy(golden["in/pred"]), labels).item() == pytest.approx(float(golden["out/kl"]), rel=1e-5)


@pytest.mark.parametrize("name", SHARES)
def test_a_contrastive_loss_over_all_processes_has_the_gradients_of_one_process(results: Path, name: str) -> None:
    expected = alone(symmetric_kl)
    assert expected.keys() == {"video", "text", "scale"}
    for found in of_all(results, f"contrast-{name}"):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", SHARES)
def test_rows_are_gathered_rank_by_rank_in_every_dtype(results: Path, name: str) -> None:
    x, _, labels = make_batch()
    expected = {"gathered": x, "half": x.half(), "bool": x > 0, "labels": labels, "scalars": x[:, 0].double()}
    for found in of_all(results, f"rows-{name}"):
        for kind, value in expected.items():
            torch.testing.assert_close(found[kind], value.contiguous(), rtol=0, atol=0)


@pytest.mark.parametrize("name", SHARES)
def test_the_gradient_of_a_row_is_the_sum_of_what_all_processes_say_of_it(results: Path, name: str) -> None:
    x = make_batch()[0]
    for rank, found in enumerate(of_all(results, f"rows-{name}")):
        expected = (1 + 2 + 3) * 3 * x[share_of(rank, SHARES[name])] ** 2
        torch.testing.assert_close(found["gradient"], expected, **CLOSE)
    assert sum(len(found["gradient"]) for found in of_all(results, f"rows-{name}")) == NUM_CLIPS


def test_small_things_are_known_to_all_processes_alike(results: Path) -> None:
    said = [json.loads((results / f"said-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]
    assert [s.pop("place") for s in said] == [[0, 3, True, "cpu"], [1, 3, False, "cpu"], [2, 3, False, "cpu"]]
    refused = [s.pop("refused") for s in said]
    assert said[1:] == said[:1] * 2
    assert said[0]["sum"] == [pytest.approx(0.3), 3 * (2**24 + 1), 1.0]
    assert said[0]["nothing"] == []
    assert said[0]["any"] == [False, True, True]
    assert said[0]["json"] == [
        {"rows": [], "name": ""},
        {"rows": [0], "name": "é"},
        {"rows": [0, 1], "name": "éé"},
    ]
    assert said[0]["broadcast"] == "run of rank 0"
    for rank, messages in enumerate(refused):
        assert messages.keys() == {"shape", "dtype", "digest"}
        assert f"rank {rank} has rows of [{3 + (rank == 1)}] torch.float32" in messages["shape"]
        assert "the weights of the head differ between processes: rank 2 has other ones" in messages["digest"]


def test_an_error_in_one_process_ends_all_with_its_message_last() -> None:
    began = time.perf_counter()
    done = torchrun(2, 1, "unused")
    assert time.perf_counter() - began < 60  # seconds after the error; the limit leaves room for a busy machine
    assert done.returncode != 0
    own, _, of_torchrun = done.stderr.partition("Root Cause")
    assert f"error: {world_processes.FAILURE}" in own
    assert f"traceback : ValueError: {world_processes.FAILURE}" in of_torchrun
    assert (
        "lost the other processes" not in done.stderr
    )  # what the error did to others is not what the reader looks for


def test_alone_nothing_is_exchanged() -> None:
    model = TwoTowers()
    x, _, labels = make_batch()
    model.classification_loss(x, labels).backward()
    before = {name: gradient.clone() for name, gradient in world_processes.gradients(model).items()}
    ALONE.sum_gradients(list(model.parameters()))
    torch.testing.assert_close(world_processes.gradients(model), before, rtol=0, atol=0)
    assert ALONE.gather_batch(x) is x
    assert torch.equal(ALONE.gather_rows(x.requires_grad_()), x.detach())
    assert ALONE.sum([0.1, 2]) == [0.1, 2.0]
    assert [ALONE.any(False), ALONE.any(True)] == [False, True]
    assert ALONE.gather_json(("a", 1)) == [["a", 1]]
    assert ALONE.broadcast_json(None) is None
    ALONE.check_same("digest", "the weights")
    ALONE.barrier()


def test_a_digest_sees_names_dtypes_shapes_and_every_bit() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "c": torch.ones(4)},
        {"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.ones(4)},
        {"a": -torch.zeros(2, 3), "b": torch.ones(4)},
    ]
    assert len({state_digest(s) for s in [state, *others]}) == 5
    assert state_digest(dict(reversed(state.items()))) == state_digest(state)
    assert state_digest({"a": torch.zeros(3, 2).T, "b": torch.ones(8)[::2]}) == state_digest(state)


def test_large_gradients_travel_in_bounded_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "BUCKET_BYTES", 40)
    sizes = {torch.float32: (3, 4, 50, 2, 2, 2), torch.float64: (1, 1)}
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for dtype in sizes for n in sizes[dtype]]
    buckets = list(world_module._buckets(parameters))
    assert [p for bucket in buckets for p in bucket] == parameters
    assert all(len({p.dtype for p in bucket}) == 1 for bucket in buckets)
    assert all(sum(p.nbytes for p in bucket[:-1]) < 40 for bucket in buckets)
    assert [len(bucket) for bucket in buckets] == [3, 2, 1, 2]


def in_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


OF_ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_without_torchrun_and_with_one_process_of_it_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in ({}, OF_ONE):
        in_environment(monkeypatch, **variables)
        with joined_world(CPU) as world:
            assert world == ALONE


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"LOCAL_RANK": None}, "has RANK, WORLD_SIZE but not LOCAL_RANK.*`unset RANK WORLD_SIZE` before"),
        ({"MASTER_PORT": None}, "but not MASTER_PORT.*torchrun --nproc-per-node N --no-python vcache"),
        ({"RANK": "first"}, "RANK=first, .*not all of them are numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2.*no such process"),
    ],
)
def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], message: str
) -> None:
    in_environment(monkeypatch, **{name: value for name, value in {**OF_ONE, **changed}.items() if value is not None})
    with pytest.raises(WorldError, match=message), joined_world(CPU):
        pass


def test_each_process_has_a_gpu_of_its_own_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to ask which would be taken."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    in_environment(monkeypatch, **{**OF_ONE, "LOCAL_RANK": "1"})
    with joined_world(torch.device("cuda")) as world:
        assert world == World(device=torch.device("cuda", 1))
    assert chosen == [torch.device("cuda", 1)]
    with (
        pytest.raises(WorldError, match="cuda:1 is one GPU for all processes. Use --device cuda"),
        joined_world(torch.device("cuda:1")),
    ):
        pass
    in_environment(monkeypatch, **{**OF_ONE, "LOCAL_RANK": "2"})
    with (
        pytest.raises(WorldError, match="process 2 .* has none: there are 2.*--nproc-per-node 2"),
        joined_world(torch.device("cuda")),
    ):
        pass
