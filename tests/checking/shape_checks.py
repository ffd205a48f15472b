"""What jaxtyping's import hook puts on every function: the same checks as its own decorator, at a fraction of the cost.

`jaxtyping.jaxtyped` binds the arguments of each call to the signature and lets beartype check them twice. Most functions state
no shape: for them beartype alone checks the same. For the others an empty scope of axes is opened, in which beartype
compares the arguments and the result. It was a fifth of the time of the tests of training.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import jaxtyping
from jaxtyping import AbstractArray

_jaxtyped = jaxtyping.jaxtyped  # its own, for what is left to it


def install() -> None:
    """Have the import hook use `checked`; before the package is imported."""
    jaxtyping.jaxtyped = _stand_in


def _stand_in(*args: Any, **options: Any) -> Any:
    """`jaxtyped(typechecker=...)`, as the hook writes it, and any other use of it as it is."""
    return _jaxtyped(*args, **options) if args else functools.partial(checked, typechecker=options["typechecker"])


def checked(decorated: Any, typechecker: Callable[[Any], Any]) -> Any:
    """The function whose arguments and result are checked, or the dataclass whose fields are."""
    if inspect.isclass(decorated):
        if is_dataclass(decorated) and inspect.isfunction(vars(decorated).get("__init__")):
            decorated.__init__ = checked(decorated.__init__, typechecker)
        return decorated
    try:
        shapes = [shape for hint in get_type_hints(decorated).values() for shape in _shapes_in(hint)]
    except (NameError, TypeError):  # names that are imported for type checkers alone, descriptors
        return _jaxtyped(decorated, typechecker=typechecker)
    # beartype checks the arguments of a generator when it is iterated; "{size}" is computed from bound arguments.
    if inspect.isgeneratorfunction(decorated) or any("{" in shape.dim_str for shape in shapes):
        return _jaxtyped(decorated, typechecker=typechecker)
    return _in_scope(typechecker(decorated)) if shapes else typechecker(decorated)


def _shapes_in(hint: Any) -> list[type[AbstractArray]]:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return [hint]
    parts = hint if isinstance(hint, list) else get_args(hint)  # a list: the parameters of a Callable
    return [shape for part in parts for shape in _shapes_in(part)]


def _in_scope(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with _jaxtyped("context"):
            return function(*args, **options)

    return call
