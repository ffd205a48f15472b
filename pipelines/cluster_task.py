"""A task as it travels. A scheduler reads its tasks, too: this module loads nothing, so that it need not load torch for that."""

import pickle


def run_packed(packed: bytes) -> object:
    """Call what `pack` has packed."""
    function, arguments = pickle.loads(packed)
    return function(*arguments)


def pack(function: object, *arguments: object) -> bytes:
    """A call of a function of a module."""
    return pickle.dumps((function, arguments))
