"""The one store under `$VCACHE_HOME` that a head can be trained from, where none is named."""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from vcache.extract.layers import NO_LAYERS, STEM, LayerError
from vcache.heads.registry import get_head
from vcache.pipelines.matching import HeadStoreMismatch, build_head_config, match
from vcache.pipelines.stored_views import training_views
from vcache.pipelines.stores import open_stores, vcache_home
from vcache.pipelines.trainable import check_trainable
from vcache.store.errors import StoreError
from vcache.store.reader import FeatureStore


class NoFittingStore(LookupError):
    """No store under `$VCACHE_HOME` fits the head, or several do."""


def find_store(
    head: str,
    settings: Mapping[str, Any],
    train_split: str,
    *,
    num_views: int | None = None,
    frame_step: int = 1,
    check: Callable[[FeatureStore], None] = lambda store: None,
    extract_line: str | None = None,
) -> FeatureStore:
    """The one store under `$VCACHE_HOME` that has the split to train on, in its views, and fits the head with these settings.

    `check` may refuse more stores with a HeadStoreMismatch; `extract_line` is what to run where there is no store at all,
    unless it is what the head reads by default.

    Raises:
        NoFittingStore: none is there, none fits (with the mending command of the nearest), or several do (with their paths).
    """
    fitting: list[FeatureStore] = []
    reasons: list[str] = []
    for path, store in open_stores(vcache_home()):
        if isinstance(store, StoreError):
            reasons.append(f"{path.name}: {store}")
            continue
        try:
            if train_split not in store.splits:
                raise HeadStoreMismatch(f"{path.name} has no split {train_split!r}.")
            check(store)
            config = build_head_config(head, settings, store.manifest, frame_step=frame_step)
            views = {train_split: training_views(store.manifest, train_split, num_views)}
            requirements = get_head(head).requires(config)
            match(head, requirements, store, store.splits, views=views, frame_step=frame_step)
            check_trainable(head, requirements, store)
            fitting.append(store)
        except HeadStoreMismatch as error:
            reasons.append(str(error))
        except (LayerError, StoreError) as error:  # one backbone that is too small must not hide the store that fits
            reasons.append(f"{path.name}: {error}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        paths = "\n".join(f"  --store {shlex.quote(str(store.path))}" for store in fitting)
        raise NoFittingStore(f"{len(fitting)} stores under {vcache_home()} fit head {head!r}. Say which:\n{paths}")
    if reasons:
        raise NoFittingStore(f"no store under {vcache_home()} fits head {head!r}:\n" + "\n".join(reasons))
    line = extract_line or _default_line(head)
    raise NoFittingStore(
        f"there is no store under {vcache_home()} yet. Make one with:  {line}   or name one with --store PATH."
    )


def _default_line(head: str) -> str:
    """What `vcache extract` is told for a head with its defaults: no layers where it reads none."""
    made = get_head(head)
    asked = made.requires(made.Config(num_classes=2))
    words = [STEM] if asked.stem else []
    if layers := {*asked.tokens, *asked.cls, *asked.maps}:
        # Of a tower that is not known, a layer counted from the end is the right one.
        below = sorted(layer for layer in layers if layer < -4)
        words += [*map(str, below), *(["-4:"] if len(below) < len(layers) else [])]
    return f"vcache extract DATASET --layers {','.join(words) or NO_LAYERS}"
