"""`vcache correlation`: how alike the embeddings of the classes are to each other, of text and of trained classifiers.

Wu et al. 2023 (Text4Vis), figures 1 and A.5: text embeddings of class names correlate where names have words in common, and the
rows of a classifier that was trained from random ones come to, too. What the paper calls correlation is the cosine here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vcache.heads.registry import get_head, list_heads
from vcache.heads.text import mean_of_templates
from vcache.pipelines.class_file import ClassFileError, read_class_names
from vcache.pipelines.class_text import class_text, how_to_add, stored_sets
from vcache.pipelines.rank_correlation import rank_correlation
from vcache.pipelines.runs import Run
from vcache.store.object_path import store_path
from vcache.store.reader import FeatureStore

NUM_CLASSES = 20
"""As many as the paper shows."""
LEAST_CLASSES = 2
DEFAULT_TEMPLATES = "label"


class CorrelationError(ValueError):
    """Maps that cannot be made as asked: sources without embeddings or names, or of other classes."""


@dataclass(frozen=True, kw_only=True)
class ClassEmbeddings:
    """What one source compares videos with."""

    source: str
    what: str
    """In words: "text embeddings, label", or "classifier of linear"."""
    class_names: tuple[str, ...]
    rows: Float[Tensor, "K E"]
    is_text: bool
    """Of a store; else of a trained head."""


@dataclass(frozen=True, kw_only=True)
class CorrelationMap:
    """Of one source, over the classes that are shown."""

    source: str
    what: str
    cosines: Float[np.ndarray, "n n"]
    rank_correlation: float | None = None
    """Spearman's, with the first map, over the pairs of different classes; None where one of both is the same everywhere."""

    @property
    def of_pairs(self) -> Float[np.ndarray, " pairs"]:
        """Of two different classes, each pair once."""
        return self.cosines[np.triu_indices(len(self.cosines), 1)]

    @property
    def mean(self) -> float:
        """Of the cosines of two different classes."""
        return float(self.of_pairs.mean())


@dataclass(frozen=True, kw_only=True)
class ClassCorrelation:
    """Maps of the same classes in the same order."""

    class_names: tuple[str, ...]
    num_classes: int
    """Of which these were chosen."""
    maps: tuple[CorrelationMap, ...]


def class_correlation(
    sources: Sequence[str], *, classes: str | None = None, templates: str | None = None
) -> ClassCorrelation:
    """Cosines between the classes of each source: a store, of which it is the text, or a run, of which it is the classifier.

    Args:
        classes: how many, at even distances in the order of the first source; or a file of names. None: 20, or all of fewer.
        templates: the set of a store; None: "label".

    Raises:
        CorrelationError: a source has no embeddings of its classes, or other classes than the first; fewer than two classes.
        RunError, StoreError: a source is not there, not whole, or has no class names.
    """
    found = [_embeddings(source, templates or DEFAULT_TEMPLATES) for source in sources]
    if templates and not any(one.is_text for one in found):
        raise CorrelationError(
            f"--templates {templates} chooses the text of a store, and only runs are named. Leave it out."
        )
    names = _chosen(found[0], classes)
    named = classes is not None and not classes.isdecimal()
    maps = [_map(one, _rows(one, names, found[0], named=named)) for one in found]
    return ClassCorrelation(
        class_names=names,
        num_classes=len(found[0].class_names),
        maps=tuple(replace(one, rank_correlation=rank_correlation(maps[0].of_pairs, one.of_pairs)) for one in maps),
    )


def spread_classes(names: Sequence[str], num: int) -> tuple[str, ...]:
    """So many of the names, at even distances from the first on."""
    return tuple(names[place * len(names) // num] for place in range(num))


def _embeddings(source: str, templates: str) -> ClassEmbeddings:
    path = store_path(source)
    if isinstance(path, Path) and path.is_dir() and not (path / "zarr.json").is_file():
        return _of_run(Run.open(path), source)
    with FeatureStore.open(path) as store:
        return _of_store(store, source, templates)


def _of_run(run: Run, source: str) -> ClassEmbeddings:
    if not hasattr(get_head(run.head), "class_embeddings"):
        can = ", ".join(name for name, head in list_heads().items() if hasattr(head, "class_embeddings"))
        raise CorrelationError(
            f"head {run.head!r} of {source} has no embeddings of its classes. Runs of these heads have: {can}."
        )
    names = run.class_names()
    rows = run.load_head().class_embeddings().detach()  # type: ignore[operator]
    if len(rows) != len(names) or not rows.isfinite().all():
        raise CorrelationError(
            f"{source} was imported without the text that it compares videos with. Name a store in its place, which has it."
        )
    what = f"classifier of {run.head}"
    return ClassEmbeddings(source=source, what=what, class_names=names, rows=rows, is_text=False)


def _of_store(store: FeatureStore, source: str, templates: str) -> ClassEmbeddings:
    if templates not in stored_sets(store.manifest):
        raise CorrelationError(
            f"{source} holds no text embeddings of the templates {templates!r}.\n{how_to_add(store, templates)}"
        )
    names, rows = store.manifest.class_names, mean_of_templates(class_text(store, templates).embeddings)
    what = f"text embeddings, {templates}"
    return ClassEmbeddings(source=source, what=what, class_names=names, rows=rows, is_text=True)


def _chosen(first: ClassEmbeddings, classes: str | None) -> tuple[str, ...]:
    """Names of classes of the first source."""
    if classes is not None and not classes.isdecimal():
        asked = read_class_names(Path(classes))
    else:
        asked = spread_classes(first.class_names, _number(first, classes))
    if len(asked) < LEAST_CLASSES:
        raise CorrelationError("one class alone has nothing to be compared with. Choose two or more with --classes.")
    return asked


def _number(first: ClassEmbeddings, classes: str | None) -> int:
    there = len(first.class_names)
    number = min(NUM_CLASSES, there) if classes is None else int(classes)
    if number > there:
        raise CorrelationError(f"--classes {number}: {first.source} has {there} classes. Ask for at most so many.")
    return number


def _rows(one: ClassEmbeddings, names: Sequence[str], first: ClassEmbeddings, *, named: bool) -> Float[Tensor, "n E"]:
    """Those of the classes, in their order."""
    if not named and set(one.class_names) != set(first.class_names):
        shared = len(set(one.class_names) & set(first.class_names))
        raise CorrelationError(
            f"{one.source} has {len(one.class_names)} classes and {first.source} {len(first.class_names)}, {shared} of them the "
            "same. Name classes that both have in a file:  --classes FILE"
        )
    places = {name: place for place, name in enumerate(one.class_names)}
    if unknown := [name for name in names if name not in places]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ClassFileError(f"{unknown[0]!r}{more} of --classes is no class of {one.source}.")
    return one.rows[[places[name] for name in names]]


def _map(one: ClassEmbeddings, rows: Float[Tensor, "n E"]) -> CorrelationMap:
    unit = normalize(rows.to(torch.float64), dim=1)
    return CorrelationMap(source=one.source, what=one.what, cosines=(unit @ unit.T).numpy())
