"""Which names a video is told apart from where nothing is trained: the classes of its store, some of them, or others beside."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from vcache.pipelines.class_file import ClassFileError, read_class_names
from vcache.pipelines.console import count
from vcache.pipelines.evaluation.class_choice import ALL, NAMED, ClassChoice
from vcache.pipelines.templates import class_words
from vcache.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Classes of a store, in its order, and names beside them that none of its videos has."""

    places: tuple[int, ...] | None = None
    """Where the classes are among those of the store; None: they are all of them."""
    others: tuple[str, ...] = ()

    def choice(self, manifest: Manifest, templates: str, others: Float[Tensor, "other M E"] | None) -> ClassChoice:
        """For the evaluation, by the text of these templates; `others` is that of the others."""
        names = manifest.class_names
        own = names if self.places is None else tuple(names[k] for k in self.places)
        which = ALL if self.places is None and not self.others else NAMED
        return ClassChoice(
            which=which, places=self.places, names=(*own, *self.others), templates=templates, others=others
        )


def read_candidates(file: Path, manifest: Manifest) -> Candidates:
    """Those that a file names (class_file.py). "apply eye makeup" is a name of the class "ApplyEyeMakeup", too.

    Raises:
        ClassFileError: it cannot be read, it names one class or none of the store's (with the nearest name), or one twice.
    """
    names = read_class_names(file)
    places = [_place(name, manifest.class_names) for name in names]
    found = {name: place for name, place in zip(names, places, strict=True) if place is not None}
    if not found:
        near = difflib.get_close_matches(names[0], manifest.class_names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(manifest.class_names[:5])}, ..."
        raise ClassFileError(
            f"--classes {file}: none of its {count(len(names), 'name')} is a class of {manifest.dataset}, the first is "
            f"{names[0]!r}. {hint}"
        )
    if len(names) < 2:
        raise ClassFileError(
            f"--classes {file} names one class, and there is nothing to tell it from. Name two at least."
        )
    _check_once(file, found)
    taken = tuple(sorted(found.values()))
    return Candidates(
        places=None if len(taken) == len(manifest.class_names) else taken,
        others=tuple(name for name in names if name not in found),
    )


def _place(name: str, class_names: Sequence[str]) -> int | None:
    """Of the class of this name; if there is none, of the one class that has the same words."""
    if name in class_names:
        return class_names.index(name)
    words = class_words(name).casefold()
    same = [k for k, known in enumerate(class_names) if class_words(known).casefold() == words]
    return same[0] if len(same) == 1 else None


def _check_once(file: Path, found: dict[str, int]) -> None:
    names: dict[int, str] = {}
    for name, place in found.items():
        if (other := names.setdefault(place, name)) != name:
            raise ClassFileError(
                f"--classes {file}: {other!r} and {name!r} in it are one class of the store. Name it once."
            )
