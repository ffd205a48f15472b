"""Which parameters are decayed, and with which rate each of them moves."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vcache.heads.requirements import Recipe
from vcache.pipelines.settings import SettingError


def parameter_groups(head: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trainable parameters as groups for AdamW, each with its `weight_decay` and `lr_multiplier`.

    Raises:
        SettingError: there is no trainable parameter, or a pattern fits none: a typing error. Patterns of the head's own recipe
            may, as a setting of the head can take away what they name.
    """
    parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
    if not parameters:
        raise SettingError(
            f"{type(head).__name__} with these settings has no parameter to train. Choose settings that give it one."
        )
    own = getattr(type(head), "recipe", None)
    _refuse_unmatched("no_decay", recipe.no_decay, own.no_decay if own else (), parameters)
    multiplied, own_multiplied = _patterns(recipe), _patterns(own) if own else ()
    _refuse_unmatched("lr_multipliers", multiplied, own_multiplied, parameters)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault((_weight_decay(name, p, recipe), _lr_multiplier(name, recipe)), []).append(p)
    return [
        {"params": params, "weight_decay": decay, "lr_multiplier": multiplier}
        for (decay, multiplier), params in groups.items()
    ]


def _weight_decay(name: str, parameter: nn.Parameter, recipe: Recipe) -> float:
    is_small = parameter.ndim < 2 or name.endswith("bias")
    exempt = (recipe.no_decay_1d and is_small) or any(fnmatchcase(name, pattern) for pattern in recipe.no_decay)
    return 0.0 if exempt else recipe.weight_decay


def _lr_multiplier(name: str, recipe: Recipe) -> float:
    return next((factor for pattern, factor in recipe.lr_multipliers if fnmatchcase(name, pattern)), 1.0)


def _patterns(recipe: Recipe) -> tuple[str, ...]:
    return tuple(pattern for pattern, _ in recipe.lr_multipliers)


def _refuse_unmatched(field: str, patterns: Iterable[str], own: Iterable[str], names: Iterable[str]) -> None:
    for pattern in patterns:
        if pattern not in own and not any(fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern, _shortened(names), n=3, cutoff=0.0)
            raise SettingError(
                f"{pattern!r} in {field} fits no trainable parameter. The nearest are {', '.join(nearest)}."
            )


def _shortened(names: Iterable[str]) -> list[str]:
    """Layers of the same kind once, their numbers as *: EVL has over a hundred parameters."""
    return list(
        dict.fromkeys(".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names)
    )
