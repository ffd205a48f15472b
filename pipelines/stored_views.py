"""What the numbers of a store's views mean, by `facts["views"]` of its manifest: entry v defines view v, in all splits.

    {"kind": "evaluation", "temporal": [1, 3], "spatial": [0, 1]}              view 1 of 3 along the video, crop 0 of 1
    {"kind": "training", "seed": 0, "view": 2, "augmentation": {...}}          random frames and crop, by seed, video and view

View 0 is the evaluation view 1x1: the middle of the video, the centre of the picture. Entries are only ever appended;
extract/views.py makes them. Splits to evaluate on have no training views, and the others no evaluation views but view 0.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from vcache.extract.views import EVALUATION_SPLITS
from vcache.pipelines.presets import recipe_name
from vcache.store.commits import RowFailure
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

ViewGrid = tuple[int, int]
"""(T, S): the evaluation views that cover a video with T clips, and each of their frames with S crops."""

ONE_VIEW: ViewGrid = (1, 1)
_FIRST_VIEW = {"kind": "evaluation", "temporal": [0, 1], "spatial": [0, 1]}


class ViewsError(ValueError):
    """Views that no store can have: words that say no number of them, or training views of a split to evaluate on."""


def view_definitions(manifest: Manifest) -> tuple[Mapping[str, Any], ...]:
    """The definition of each view, by number; a store that says nothing has view 0 alone."""
    return tuple(manifest.facts.get("views") or (_FIRST_VIEW,))


def training_views(manifest: Manifest, split: str, num_views: int | None = None) -> tuple[int, ...]:
    """View 0 and the split's training views, in the order of their numbers; the first `num_views` of these, or all.

    Where the store defines fewer, the numbers go on with those that it would give to the next.

    Raises:
        ViewsError: more than one is asked for of a split that has no training views.
    """
    if split in EVALUATION_SPLITS:
        if (num_views or 1) > 1:
            raise ViewsError(
                f"--views {num_views}: {split!r} is a split to evaluate on, of which `vcache extract` makes no training views. "
                "Leave --views out."
            )
        return (0,)
    definitions = view_definitions(manifest)
    numbers = [0, *(view for view, definition in enumerate(definitions) if definition["kind"] == "training")]
    if num_views is None:
        return tuple(numbers)
    numbers += range(len(definitions), len(definitions) + num_views - len(numbers))
    return tuple(numbers[:num_views])


def evaluation_grids(manifest: Manifest) -> dict[ViewGrid, tuple[int, ...]]:
    """The grids of which every view is defined, the smallest first, with the numbers of their T*S views."""
    places: dict[ViewGrid, dict[tuple[int, int], int]] = {}
    for view, definition in enumerate(view_definitions(manifest)):
        if definition["kind"] == "evaluation":
            (t, num_temporal), (s, num_spatial) = definition["temporal"], definition["spatial"]
            places.setdefault((num_temporal, num_spatial), {}).setdefault((t, s), view)
    whole = {grid: found for grid, found in places.items() if len(found) == grid[0] * grid[1]}
    return {grid: tuple(view for _, view in sorted(whole[grid].items())) for grid in sorted(whole, key=_size)}


def extraction_words(manifest: Manifest, views: Iterable[int]) -> dict[str, Any]:
    """The options of `vcache extract` that make these views, as a request records them; none of view 0, which is always made."""
    definitions = view_definitions(manifest)
    wanted = sorted({*views} - {0})
    known = [definitions[view] for view in wanted if view < len(definitions)]
    words: dict[str, Any] = {}
    if num_views := max((_number_of_views(manifest, view) for view in wanted), default=0):
        words["views"] = num_views
        words |= _recipe_words(manifest, known)
    if grids := {_grid(definition) for definition in known if definition["kind"] == "evaluation"}:
        words["eval_views"] = grid_word(max(grids, key=_size))
    return words


def stored_pixel_frames(store: FeatureStore) -> int:
    """Frames of a clip whose pixels a store keeps, the same number in every split and view that has pixels; 0 for none."""
    places = [(split, view) for split in store.splits for view in {0, *store.views(split)}]
    specs = (store.arrays(split, view).get("pixels") for split, view in places)
    return next((spec.shape[0] for spec in specs if spec is not None), 0)


def _number_of_views(manifest: Manifest, view: int) -> int:
    """How many views to ask for to have this training view; 0 of another. One that is not defined continues the last ones.

    Views of another seed or recipe are counted apart, as `vcache extract` does.
    """
    definitions = view_definitions(manifest)
    training = [definition for definition in definitions if definition["kind"] == "training"]
    if view < len(definitions) and definitions[view]["kind"] != "training":
        return 0
    own = definitions[view] if view < len(definitions) else (training or [{}])[-1]
    before = [other for other in definitions[: view + 1] if _recipe(other) == _recipe(own)]
    return 1 + len(before) + max(0, view + 1 - len(definitions))


def _recipe_words(manifest: Manifest, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recipe and seed of the last training view that is wanted, or else defined; none where no recipe of ours makes it."""
    both = (view_definitions(manifest), wanted)
    last = [definition for definitions in both for definition in definitions if definition["kind"] == "training"][-1:]
    name = recipe_name(last[0].get("augmentation", {}), manifest.dataset) if last else None
    return {"augment": name, "view_seed": last[0]["seed"]} if name else {}


def _recipe(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The definition, but for which of the recipe's views it is."""
    return {name: value for name, value in definition.items() if name != "view"}


def _grid(definition: Mapping[str, Any]) -> ViewGrid:
    return definition["temporal"][1], definition["spatial"][1]


def changed_views(manifest: Manifest, definitions: Mapping[str, Any]) -> list[int]:
    """Which of these views, definitions by number, the store defines in another way; not those that it does not define."""
    there = view_definitions(manifest)
    numbers = sorted(int(view) for view in definitions)
    return [view for view in numbers if view < len(there) and there[view] != definitions[str(view)]]


def parse_grid(word: str) -> ViewGrid:
    """ "3x1" -> (3, 1).

    Raises:
        ViewsError: it is not of that form, or a number is 0.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word)
    if not found:
        raise ViewsError(
            f"--views {word!r}: say TxS, T views along the video times S crops of each, as 1x1, 3x1, 1x3, 4x3 or 10x3."
        )
    return int(found[1]), int(found[2])


def grid_word(grid: ViewGrid) -> str:
    """(3, 1) -> "3x1"."""
    return f"{grid[0]}x{grid[1]}"


def describe_grid(word: str) -> str:
    """What `vcache eval` says of the views that it averaged."""
    return "1 view" if word == grid_word(ONE_VIEW) else f"mean of {word} views"


def failed_in_any(store: FeatureStore, split: str) -> tuple[RowFailure, ...]:
    """One failure of each video of the split that failed in some view, by row: a file may break before views are added."""
    return _first_of_each_row(store, split, FeatureStore.failures)


def partial_in_any(store: FeatureStore, split: str) -> tuple[RowFailure, ...]:
    """The same of the rows that are stored although their video is damaged."""
    return _first_of_each_row(store, split, FeatureStore.partial)


def _first_of_each_row(
    store: FeatureStore, split: str, entries: Callable[[FeatureStore, str, int], Iterable[RowFailure]]
) -> tuple[RowFailure, ...]:
    found: dict[int, RowFailure] = {}
    for view in store.views(split):
        for entry in entries(store, split, view):
            found.setdefault(entry.row, entry)
    return tuple(found[row] for row in sorted(found))


def describe_view(definition: Mapping[str, Any], dataset: str) -> str:
    """What `vcache info` says of a view: "evaluation, 3x1", "training, evl, seed 0"."""
    if definition["kind"] == "evaluation":
        return f"evaluation, {grid_word(_grid(definition))}"
    name = recipe_name(definition.get("augmentation", {}), dataset) or "a recipe of another version"
    return f"training, {name}, seed {definition['seed']}"


def largest_first(grids: Collection[ViewGrid]) -> list[ViewGrid]:
    """By the number of views; of as many, the one that sees more of the video first."""
    return sorted(grids, key=_size, reverse=True)


def _size(grid: ViewGrid) -> tuple[int, int]:
    return grid[0] * grid[1], grid[0]
