"""Which classes a head is evaluated on: those it was trained on, those it never saw (zero-shot), or all of a store.

A head that classifies by text is given the names to tell apart; any other knows those it was trained on and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vcache.heads.registry import list_heads
from vcache.pipelines.class_text import class_text, give_text
from vcache.pipelines.imported_runs import class_order
from vcache.pipelines.runs import Run, RunError
from vcache.store.reader import FeatureStore

TRAINED, LEFT_OUT, ALL = CLASSES = ("trained", "left-out", "all")
"""What `vcache eval --classes` takes."""
NAMED = "named"
"""Those that `vcache zero-shot --classes FILE` names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassChoice:
    """K classes of a store, in its order."""

    which: str
    """One of CLASSES, or NAMED."""
    places: tuple[int, ...] | None = None
    """Where they are among those of the store; None: they are all of them."""
    names: tuple[str, ...]
    trained_on: np.ndarray | None = None
    """bool (K,): the classes that the head was trained on; None: an imported run does not say it, or nothing was trained."""
    templates: str | None
    """Of the text that the head is to be given of them; None: it has outputs for them, or is given prompts."""
    dataset: str = ""
    """Of the store, where it has other classes than the run was trained beside; else empty."""
    outputs: tuple[int, ...] | None = None
    """Where they are among the outputs of the head; None: there, in this order."""
    others: Float[Tensor, "other M E"] | None = None
    """Text embeddings of the last of the names, which are no classes of the store."""

    @property
    def any_class(self) -> bool:
        """Of videos with several classes, whether those that have any of these are taken; else those that have no other."""
        return self.which in (LEFT_OUT, NAMED)

    def give(self, head: Any, store: FeatureStore) -> None:
        """Have the head tell these classes apart, if it does not yet; a trained logit scale stays."""
        if self.others is None or self.templates is None:
            give_text(head, self.templates, store, self.places)
            return
        own = class_text(store, self.templates, self.places)
        head.set_text(replace(own, embeddings=torch.cat([own.embeddings, self.others])))

    def part(self, columns: Sequence[int]) -> "ClassChoice":
        """Those of the classes alone, by their places among the names in ascending order."""
        assert self.others is None
        return replace(
            self,
            places=tuple(columns if self.places is None else (self.places[k] for k in columns)),
            names=tuple(self.names[k] for k in columns),
            trained_on=None if self.trained_on is None else self.trained_on[list(columns)],
        )


def choose_classes(run: Run, store: FeatureStore, which: str = TRAINED) -> ClassChoice:
    """The classes of a store that a run is evaluated on; `check_classes` has let it pass."""
    names, own = store.manifest.class_names, _trained_on(run)
    trained = None if own is None else np.array([name in own for name in names])
    chosen = np.ones(len(names), dtype=np.bool_)
    if which != ALL and trained is not None:
        chosen = trained if which == TRAINED else ~trained
    # What came without text, as official checkpoints do, is given that of its classes too.
    templates = run.requirements().text if which != TRAINED or run.imported else None
    outputs = class_order(run, store).tolist() if run.imported and templates is None else None
    elsewhere = which != TRAINED and own is not None and set(names) != own | set(run.left_out)
    return ClassChoice(
        which=which,
        places=None if chosen.all() else tuple(np.flatnonzero(chosen).tolist()),
        names=tuple(name for name, taken in zip(names, chosen, strict=True) if taken),
        trained_on=None if trained is None else trained[chosen],
        templates=templates,
        dataset=store.manifest.dataset if elsewhere else "",
        outputs=None if outputs is None else tuple(outputs),
    )


def check_asked(run: Run, which: str) -> None:
    """
    Raises:
        RunError: there is no such choice, or the head can be asked for no classes but its own.
    """
    if which not in CLASSES:
        raise RunError(f"--classes {which!r} is none of {', '.join(CLASSES)}.")
    if which != TRAINED and not run.requirements().by_name:
        raise RunError(
            f"--classes {which}: head {run.head!r} of {run.path} has outputs for the classes that it was trained on, and for no "
            f"others. {_by_text(run.head)}"
        )
    if which == LEFT_OUT and _trained_on(run) is None:
        raise RunError(
            f"{run.path} was imported without class names, so nobody knows which classes it was not trained on. Import it again "
            "with the names of its classes, or say --classes all."
        )


def _by_text(head: str) -> str:
    """Who can be asked for other classes."""
    heads = {name: made for name, made in list_heads().items() if hasattr(made, "set_text")}
    if head in heads:
        return f"A run of {head} that classifies by text alone can be asked for any:  --set classifier=text"
    of_itself = [name for name, made in heads.items() if made.requires(made.Config(num_classes=2)).by_name]
    others = [name for name in heads if name not in of_itself]
    told = f", and with --set classifier=text: {', '.join(others)}" if others else ""
    return f"Heads that classify by text can be asked for any: {', '.join(of_itself)}{told}."


def check_classes(run: Run, store: FeatureStore, which: str) -> None:
    """
    Raises:
        RunError: the store does not have the classes that the run is to be evaluated on, or others beside them.
    """
    names, own = store.manifest.class_names, _trained_on(run)
    if which == LEFT_OUT and own is not None and own.issuperset(names):
        raise RunError(
            f"{run.path} was trained on all {len(names)} classes of {store.path}: none was left out. Train with --leave-out, or "
            "name another store with --store."
        )
    if which != TRAINED or run.imported or _without(run.left_out, names) == run.class_names():
        return
    message = (
        f"{run.path} was trained on the {len(run.class_names())} classes of {run.config['dataset']}; {store.path} holds "
        f"{store.manifest.dataset} with {len(names)} classes that are not the same. Name a store with the classes of the run"
    )
    by_text = run.requirements().by_name
    raise RunError(
        f"{message}, or ask for all classes of this one, by their text, with --classes all."
        if by_text
        else f"{message}."
    )


def is_of_run(run: Run, store: FeatureStore) -> bool:
    """Whether the store has the classes that the run was trained on and beside, in their order."""
    return _without(run.left_out, store.manifest.class_names) == run.class_names()


def _trained_on(run: Run) -> set[str] | None:
    return set(run.class_names()) if run.has_class_names else None


def _without(left_out: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)
