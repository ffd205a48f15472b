"""What a head is given before its first step: text of the class names, and clips that it is fitted on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vcache.pipelines.class_text import class_text, give_text
from vcache.pipelines.loading.loader import ClipLoader
from vcache.pipelines.loading.subsets import Subset
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.preparation import PreparedHead
from vcache.pipelines.training.world import World
from vcache.store.reader import FeatureStore


def give_texts(head: Any, prepared: PreparedHead, store: FeatureStore) -> None:
    """The embeddings that classify, and those that training draws from, of the classes that are trained on."""
    give_text(head, prepared.plan.text, store, prepared.classes)
    if (templates := prepared.requirements.training_text) is not None:
        head.set_training_text(class_text(store, templates, prepared.classes))


def open_fitting(prepared: PreparedHead, store: FeatureStore, train: ClipLoader) -> ClipLoader:
    """View 0 of some of the clips that are trained on, so many of each class, drawn as few shots are; the same everywhere."""
    loader = ClipLoader(
        store,
        train.split,
        prepared.plan,
        batch_size=train.batch_size,
        device=train.device,
        allow_incomplete=prepared.config.allow_incomplete,
        classes=prepared.classes,
    )
    subset = Subset(shots=prepared.requirements.fitted_on, seed=prepared.config.data_seed)
    rows = np.intersect1d(loader.rows, train.rows)
    loader.rows = subset.rows(store.videos(train.split).ids, loader.targets.numpy(), rows)
    return loader


def fit_head(head: Any, prepared: PreparedHead, loader: ClipLoader, world: World) -> None:
    """Fit the head on the clips of the loader; of several processes, all have what the first makes of them, to the bit.

    Raises:
        SettingError: the clips are too few for it.
    """
    head.eval()
    try:
        with torch.no_grad():
            head.fit((batch.features(prepared.plan), batch.targets) for batch in loader.in_order())
    except ValueError as error:
        raise SettingError(f"head {prepared.config.head!r} cannot be fitted on these videos: {error}.") from error
    if world.size > 1:
        head.load_state_dict(_of_first(head, world))


def _of_first(head: nn.Module, world: World) -> dict[str, Tensor]:
    """The state of the first process's head, on the CPU of all."""
    return {
        name: world.gather_rows(x[None] if world.is_first else x[None][:0])[0] for name, x in head.state_dict().items()
    }
