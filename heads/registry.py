"""Finds the heads of this folder by name. A new head is one new file; nothing else changes.

A head is an `nn.Module` with
    Config       a nested frozen, keyword-only dataclass. Fields named as in matching.STORE_FACTS (num_classes,
                 num_frames, width, grid, ...) are filled from the store; every other field has the paper's value as its default
    requires     a static method, Config -> HeadRequirements: what it reads
    recipe       a Recipe: how its paper trains it
    summary      one line for `vcache heads`
    __init__     takes the Config and keeps it as `self.config`
    forward      ClipFeatures -> logits (B, K); never writes to the features
and may have
    set_text     ClassText -> None: where `requires` names `text`, whoever makes a head gives it the text before the first forward
    set_training_text
                 ClassText -> None: where `requires` names `training_text`, it is given before the first step of a training
    fit          batches of (ClipFeatures, classes (B,)) -> None: where `requires` says `fitted_on`, it is called once before the
                 first step, with view 0 of so many clips of each class; what it makes of them belongs to the state dict
    set_tail     FrozenTail -> None: where `requires` names `tail`, whoever makes a head gives it the top blocks of the backbone
                 before the first forward, and before `load_state_dict`; `tail` is then what was given (tail_head.py has both)
    set_prompts  ClassPrompts -> None: likewise where `requires` has `prompts`, after the head is on its device
    attention    ClipFeatures -> [(layer as asked, (B, H, T, N)), ...]: what a query for the whole clip gives each token of the
                 layers that it reads one after the other, per attention head, summing to 1 over T*N; `vcache explain` draws it
    inner_features
                 ClipFeatures -> [InnerFeatures, ...]: what it makes of the patches of each layer that it reads, first to last,
                 without gradients; `vcache explain` draws its size where there is no `attention`, `vcache cka` compares it
    training_loss  (ClipFeatures, targets, gather) -> (loss, logits (B, K)): its own loss in place of cross-entropy, per clip (B,)
                 or summed over the clips. targets are Int (B,), or Float (B, K) where a clip may have several classes.
                 gather: Tensor (B, ...) -> the rows of all processes, differentiable, the tensor itself in one process; a
                 contrastive loss compares with those. With several processes B may be 0, and gather is to be called all the same
    embed, classify_embedding
                 ClipFeatures -> (B, E) and (B, E) -> logits, which one after the other are `forward` in evaluation mode: what
                 `vcache eval --average embeddings` averages over the views of a video before it is classified
    one_class    True where it can be trained on videos of one class each alone
    any_text_width
                 True where `set_text` takes embeddings of another text encoder than the backbone's, of whatever width
    class_embeddings
                 () -> (K, E): the rows that its classifier compares a video with; `vcache correlation` shows them
    view_average "softmax", "logits" or "embeddings": how its paper averages the views of a video; "softmax" if not set
It is registered with `@register_head("name")`. linear.py is the shortest example.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_HEADS: dict[str, Any] = {}
_Head = TypeVar("_Head", bound=type)


class UnknownHead(LookupError):
    """No head is registered under this name."""


def register_head(name: str) -> Callable[[_Head], _Head]:
    """Class decorator: make the head available as `name`.

    Raises:
        TypeError: the class lacks a part of the contract above.
        ValueError: the name is taken by another class.
    """

    def register(head: _Head) -> _Head:
        missing = [part for part in ("Config", "requires", "recipe", "summary", "forward") if not hasattr(head, part)]
        if missing:
            raise TypeError(f"head {name!r} ({head.__qualname__}) must have {', '.join(missing)}")
        if name in _HEADS and _HEADS[name].__qualname__ != head.__qualname__:
            raise ValueError(f"head name {name!r} must be unique; {_HEADS[name].__qualname__} has it already")
        _HEADS[name] = head
        return head

    return register


def get_head(name: str) -> Any:
    """The class registered under `name`: call it with one of its `Config`s.

    Raises:
        UnknownHead: names the nearest head and lists all.
    """
    heads = list_heads()
    if name not in heads:
        near = difflib.get_close_matches(name, heads, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UnknownHead(f"unknown head {name!r}. {hint}There are: {', '.join(heads)}.")
    return heads[name]


def list_heads() -> dict[str, Any]:
    """All heads, name -> class, in the order of their names."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_HEADS.items()))
