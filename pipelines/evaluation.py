"""Top-1, top-5 and mean class accuracy of a head on a split of a store."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vcache.heads.registry import get_head
from vcache.pipelines.device import select_device
from vcache.pipelines.loading import Batch, ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.runs import Run, RunError
from vcache.pipelines.stores import vcache_home
from vcache.store.object_path import StorePath, store_path
from vcache.store.reader import FeatureStore

# What datasets call their validation split, in the order of preference.
VALIDATION_SPLITS = ("val", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Accuracies in 0..1. `mean_class_accuracy` is the mean over the classes that occur of their own top-1."""

    num_videos: int
    top1: float
    top5: float
    mean_class_accuracy: float
    loss: float


def compute_metrics(logits: Float[Tensor, "M K"], labels: Int[Tensor, " M"]) -> Metrics:
    """Metrics of M clips; with fewer than five classes, top-5 is top-K."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    top1 = hits[:, 0].double()
    per_class = [top1[labels == label].mean() for label in labels.unique()]
    return Metrics(
        num_videos=len(labels),
        top1=top1.mean().item(),
        top5=hits.any(dim=1).double().mean().item(),
        mean_class_accuracy=torch.stack(per_class).mean().item(),
        loss=nn.functional.cross_entropy(logits, labels).item(),
    )


def predict_logits(head: nn.Module, batches: Iterable[Batch]) -> tuple[Float[Tensor, "M K"], Int[Tensor, " M"]]:
    """Logits and labels of all batches, on the CPU; the head's training mode is given back as it was."""
    was_training = head.training
    head.eval()
    with torch.inference_mode():
        pairs = [(head(batch.features).float().cpu(), batch.labels.cpu()) for batch in batches]
    head.train(was_training)
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def validation_split(splits: Iterable[str]) -> str | None:
    """The split to validate on: `val`, else `validation`, else `test`, else None."""
    names = set(splits)
    return next((name for name in VALIDATION_SPLITS if name in names), None)


def open_run_store(run: Run, store: StorePath | None = None) -> FeatureStore:
    """The store that the run was trained on, checked by its key; `store` says where it lies now, if it was moved."""
    path = store or store_path(run.config["store"])
    if not path.exists():
        raise RunError(
            f"the store of {run.path}, {path}, is not there. Name it with --store PATH if it was moved, or list what is "
            f"under {vcache_home()} with:  vcache ls"
        )
    opened = FeatureStore.open(path)
    opened.check_key(run.config["store_key"], run.config["store_spec"])
    # The key says how features were made, not of which dataset.
    if opened.manifest.class_names != run.class_names():
        raise RunError(
            f"{run.path} was trained on the {len(run.class_names())} classes of {run.config['dataset']}; {path} holds "
            f"{opened.manifest.dataset} with {len(opened.manifest.class_names)} classes that are not the same. Name a store "
            "with the classes of the run."
        )
    return opened


def evaluate_run(
    path: Path,
    *,
    store: StorePath | None = None,
    split: str | None = None,
    device: str = "auto",
    batch_size: int = 32,
    allow_incomplete: bool = False,
) -> Metrics:
    """Metrics of a finished run on a split of the store it was trained on (default: the split it was validated on).

    Raises:
        RunError: the run is not complete, its store is not there or has other classes, or there is no such split.
        IncompleteSplit: the split is not extracted to its end, unless `allow_incomplete`.
        StoreKeyMismatch: the store holds features made in another way than those the head was trained on.
    """
    run, on = Run.open(path), select_device(device)
    head = run.load_head().to(on)
    with open_run_store(run, store) as opened:
        trained_on = run.config["train_split"]
        chosen = split or validation_split(name for name in opened.splits if name != trained_on)
        if chosen not in opened.splits:
            there = ", ".join(opened.splits)
            asked = (
                f"split {split!r}"
                if split
                else f"split to validate on ({', '.join(VALIDATION_SPLITS)}) besides {trained_on!r}"
            )
            raise RunError(f"{opened.path.name} has no {asked}; it has: {there}. Choose one with --split.")
        plan = match(run.head, get_head(run.head).requires(head.config), opened, [chosen])
        loader = ClipLoader(opened, chosen, plan, batch_size=batch_size, device=on, allow_incomplete=allow_incomplete)
        if not len(loader):
            raise RunError(f"split {chosen!r} of {opened.path.name} has no readable video.")
        return compute_metrics(*predict_logits(head, loader.in_order()))
