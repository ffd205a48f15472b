"""Training without some classes: which are left out, by name or in files of names, and which of the store's stay.

Left out are classes for a head to be tried on that never saw one of their videos (`vcache eval --classes left-out`).
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from vcache.pipelines.class_file import ClassFileError, read_names
from vcache.pipelines.settings import SettingError
from vcache.store.manifest import Manifest

LEAST_CLASSES = 2
"""That must stay: with one there is nothing to tell apart."""


def left_out_names(words: Sequence[str], manifest: Manifest) -> tuple[str, ...]:
    """The classes that the words name, in the order of the store; ("none",) names none.

    A word is the name of a class, or a file of names (class_file.py). Where a name has commas, its parts may come as words of
    their own: that is how lists of `--set` and `--grid` are read.

    Raises:
        SettingError: a word is neither (with the nearest name), or fewer than two classes would stay.
    """
    names = manifest.class_names
    if tuple(words) == ("none",) and "none" not in names:
        return ()
    found = set(_named(words, names))
    if len(names) - len(found) < LEAST_CLASSES and found:
        raise SettingError(
            f"--leave-out leaves {len(names) - len(found)} of the {len(names)} classes of {manifest.dataset} to train on. "
            f"Leave out at most {max(0, len(names) - LEAST_CLASSES)}."
        )
    return tuple(name for name in names if name in found)


def kept_classes(left_out: Sequence[str], manifest: Manifest) -> tuple[int, ...] | None:
    """The classes of the store that are trained on, in its order; None: all."""
    if not left_out:
        return None
    return tuple(k for k, name in enumerate(manifest.class_names) if name not in left_out)


def _named(words: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    known = {_plain(name): name for name in names}
    most_parts = 1 + max(name.count(",") for name in names)
    place = 0
    while place < len(words):
        ends = range(min(len(words), place + most_parts), place, -1)
        end = next((end for end in ends if _plain(",".join(words[place:end])) in known), None)
        if end is None:
            yield from _of_file(words[place], known)
            place += 1
        else:
            yield known[_plain(",".join(words[place:end]))]
            place = end


def _of_file(word: str, known: dict[str, str]) -> Iterator[str]:
    path = Path(word)
    if not path.is_file():
        raise SettingError(_unknown(word, known, f"--leave-out {word!r} is no class of the store, and no file"))
    try:
        named = read_names(path, "--leave-out")
    except ClassFileError as error:
        raise SettingError(str(error)) from error
    for name in named:
        if _plain(name) not in known:
            raise SettingError(_unknown(name, known, f"--leave-out {word}: {name!r} in it is no class of the store"))
        yield known[_plain(name)]


def _unknown(name: str, known: dict[str, str], what: str) -> str:
    near = difflib.get_close_matches(name, known.values(), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(list(known.values())[:5])}, ..."
    return f"{what}. {hint}"


def _plain(name: str) -> str:
    """Without the spaces that are lost where a list is read."""
    return ",".join(part.strip() for part in name.split(","))
