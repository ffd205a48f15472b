"""What test_world.py starts with torchrun: `world_processes.py TASK FOLDER`; what each process finds goes to FOLDER.

The batches are functions of nothing, so that the test has them too and computes alone what the processes computed together.
"""

import json
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from jaxtyping import install_import_hook
from safetensors.torch import save_file
from torch import Tensor, nn

with install_import_hook("vcache.pipelines", "beartype.beartype"):
    from vcache.pipelines.training import torchrun
    from vcache.pipelines.training import world as world_module
    from vcache.pipelines.training.world import World, WorldError, joined_world, state_digest

NUM_CLIPS, D, E, K = 6, 5, 4, 3  # small, and all different
SHARES = {"equal": (2, 2, 2), "unequal": (3, 1, 2), "empty": (4, 0, 2), "the first has none": (0, 1, 5)}
"""Clips of each of three processes."""
FAILURE = "the loss is nan at step 7: the head is lost."


class TwoTowers(nn.Module):
    """A contrastive head and a classifier in one, in two dtypes, with a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.video, self.text, self.scale = draw(D, E), draw(D, E), nn.Parameter(torch.tensor(0.7))
        self.classify = nn.Parameter(draw(K, D).double().T)  # (D, K), not in C order
        self.unused = draw(7)
        self.of_one_process = draw(2)

    def features(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.normalize(x @ self.video, dim=1), nn.functional.normalize(words @ self.text, dim=1)

    def classification_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Summed over the clips."""
        return nn.functional.cross_entropy(x.double() @ self.classify, labels, reduction="sum")


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Clips (6, D), words of their classes (6, D), classes (6,)."""
    generator = torch.Generator().manual_seed(8)
    x, words = torch.randn(2, NUM_CLIPS, D, generator=generator)
    return x, words, torch.tensor([0, 2, 0, 1, 2, 0])


def share_of(rank: int, share: tuple[int, ...]) -> slice:
    start = sum(share[:rank])
    return slice(start, start + share[rank])


def contrastive_loss(model: TwoTowers, rows: slice, world: World) -> Tensor:
    """ActionCLIP's symmetric KL loss of these rows, against the words and clips of all processes; the sum over the rows."""
    x, words, labels = make_batch()
    video, text = model.features(x[rows], words[rows])
    all_video, all_text, all_labels = (world.gather_batch(part) for part in (video, text, labels[rows]))
    truth = (10.0 * (labels[rows, None] == all_labels)).softmax(dim=1)
    total = torch.zeros(())
    for logits in (video @ all_text.T, text @ all_video.T):
        log_p = (model.scale.exp() * logits).log_softmax(dim=1)
        total = total + nn.functional.kl_div(log_p, truth, reduction="sum")
    return total / 2


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.contiguous() for name, p in model.named_parameters() if p.grad is not None}


def train_together(world: World, folder: Path) -> None:
    """Everything that must be equal to one process, each result a file of its own."""
    x, _, labels = make_batch()
    for name, share in SHARES.items():
        rows = share_of(world.rank, share)
        model = TwoTowers()
        if share[world.rank]:  # without clips there is no backward pass at all
            loss = model.classification_loss(x[rows], labels[rows])
            if world.rank == 2:
                loss = loss + model.of_one_process.sum()
            loss.backward()
        world.sum_gradients(list(model.parameters()))
        save_file(gradients(model), folder / f"classify-{name}-{world.rank}")

        model = TwoTowers()
        (contrastive_loss(model, rows, world) / NUM_CLIPS).backward()
        world.sum_gradients([p for p in model.parameters() if p.requires_grad])
        save_file(gradients(model), folder / f"contrast-{name}-{world.rank}")

        own = x[rows].clone().requires_grad_()
        gathered = world.gather_batch(own)
        (gathered**3 * (world.rank + 1)).sum().backward()  # each process says something else of every row
        assert own.grad is not None
        kinds = {"half": x[rows].half(), "bool": x[rows] > 0, "labels": labels[rows], "scalars": x[rows, 0].double()}
        rest = {kind: world.gather_rows(part) for kind, part in kinds.items()}
        save_file({"gathered": gathered.detach(), "gradient": own.grad, **rest}, folder / f"rows-{name}-{world.rank}")


def say(world: World, folder: Path) -> None:
    """Small things, and what is refused."""
    refused = {}
    shape = torch.zeros(1, 3 + (world.rank == 1))
    dtype = torch.zeros(1, dtype=torch.float64 if world.rank == 1 else torch.float32)
    for name, rows in {"shape": shape, "dtype": dtype}.items():
        try:
            world.gather_rows(rows)
        except WorldError as error:
            refused[name] = str(error)
    weights = {"weight": torch.full((3,), 1.0 + (world.rank == 2))}
    for name, state in {"same": {"weight": torch.ones(3)}, "digest": weights}.items():
        try:
            world.check_same(state_digest(state), "the weights of the head")
        except WorldError as error:
            refused[name] = str(error)
    world.barrier()
    said = {
        "place": [world.rank, world.size, world.is_first, str(world.device)],
        "sum": world.sum([0.1 * world.rank, 2.0**24 + 1, float(world.rank == 1)]),
        "nothing": world.sum([]),
        "any": [world.any(False), world.any(world.rank == 1), world.any(True)],
        "json": world.gather_json({"rows": list(range(world.rank)), "name": "é" * world.rank}),
        "broadcast": world.broadcast_json(f"run of rank {world.rank}"),
        "refused": refused,
    }
    (folder / f"said-{world.rank}.json").write_text(json.dumps(said))


def fail(world: World, failing: int) -> None:
    """One process ends with an error while the others wait for it, to which a SIGTERM is but a wish to stop."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    torchrun.GRACE_SECONDS = 50.0  # a busy machine may take longer than the usual to end the one that failed
    assert world.sum([1.0]) == [world.size]
    if world.rank == failing:
        time.sleep(0.3)
        raise ValueError(FAILURE)
    world.barrier()


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    world_module.BUCKET_BYTES = 64  # so that there are several
    tasks = [partial(train_together, folder=folder), partial(say, folder=folder)]
    for run in tasks if task == "together" else [partial(fail, failing=int(task))]:
        with joined_world(torch.device("cpu")) as world:  # once again after the first, as the groups of a sweep do
            run(world)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sys.exit(f"error: {error}")
