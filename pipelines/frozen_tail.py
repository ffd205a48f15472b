"""The top blocks of a store's backbone for heads that run them: loaded from the store's checkpoint, checked, kept with the run.

RUN/tail.safetensors holds the weights that the head was trained on, so that the run is evaluated without the checkpoint. Its
metadata say the shape, the model and the digest of the image tower that they are of.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from safetensors.torch import save

from vcache.extract.weights import LOCAL_DIR, BackboneError
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_stem import StemShape
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

TAIL = "tail.safetensors"
"""In a run folder."""

_IN_USE: WeakValueDictionary[tuple[Any, ...], FrozenTail] = WeakValueDictionary()
"""By checkpoint, dtype, device, number of blocks, with the stem or not. Heads that are trained side by side share one, which
goes with the last."""


def give_tail(head: Any, store: FeatureStore, device: torch.device) -> None:
    """Give a head that runs top blocks those of the store's backbone, on the device.

    Raises:
        HeadStoreMismatch: the checkpoint is not there, or is another one now.
    """
    asked = head.requires(head.config)
    if asked.tail:
        head.set_tail(tail_of_store(store, asked.tail, head.config.frozen_dtype, device, stem=asked.tail_stem))


def tail_of_store(
    store: FeatureStore, num_blocks: int, frozen_dtype: str, device: torch.device, *, stem: bool = False
) -> FrozenTail:
    """The top blocks of the backbone that made the store; with `stem`, which all blocks have, its patch embedding, too.

    Raises:
        HeadStoreMismatch: the checkpoint is not there, or is another one now.
    """
    from vcache.extract.backbone import load_backbone  # open_clip takes seconds

    manifest, request = store.manifest, store.manifest.facts["request"]
    name = kept_dtype(frozen_dtype, manifest)
    key = (manifest.spec["weights_sha256"], name, str(device), num_blocks, stem)
    if (tail := _IN_USE.get(key)) is not None:
        return tail
    pretrained = None if request["model"].startswith(LOCAL_DIR) else request["pretrained"]
    try:
        backbone = load_backbone(request["model"], pretrained, random_weights=request["random_weights"])
    except (BackboneError, OSError) as error:
        raise HeadStoreMismatch(
            f"the head runs the top {num_blocks} blocks of {request['model']}, and there are none: {error}"
        ) from error
    if backbone.weights_sha256 != manifest.spec["weights_sha256"]:
        raise HeadStoreMismatch(
            f"{store.path} was made with weights {manifest.spec['weights_sha256'][:16]} of {request['model']}, which now has "
            f"{backbone.weights_sha256[:16]}: the cached tokens enter the blocks of the store's own checkpoint. Put that back."
        )
    weights = backbone.tail_weights(num_blocks, stem=stem)
    shape = _shape(backbone.tail_facts(), num_blocks)
    if stem:
        facts, ln_pre = backbone.facts, "stem.ln_pre.weight" in weights
        shape = replace(shape, stem=StemShape(patch_size=facts.patch_size, grid=facts.grid, ln_pre=ln_pre))
    tail = FrozenTail.of(shape, weights, getattr(torch, name)).to(device)
    _IN_USE[key] = tail
    return tail


def kept_dtype(frozen_dtype: str, manifest: Manifest) -> str:
    """What the frozen weights are kept in: "auto" is what the backbone ran in when the store was made."""
    return str(manifest.spec.get("precision", "float32")) if frozen_dtype == "auto" else frozen_dtype


def _shape(facts: dict[str, Any], num_blocks: int) -> TailShape:
    of_block = {name: value for name, value in facts.items() if name not in ("num_layers", "embed_dim")}
    return TailShape(
        num_layers=facts["num_layers"],
        num_blocks=num_blocks,
        block=BlockShape(**of_block),
        embed_dim=facts["embed_dim"],
    )


def tail_bytes(tail: FrozenTail) -> bytes:
    """A safetensors file."""
    weights = {name: x.detach().cpu().contiguous() for name, x in tail.state_dict().items()}
    return save(weights, {"shape": json.dumps(asdict(tail.shape))})


def read_tail(path: Path) -> FrozenTail:
    """On the CPU."""
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["shape"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    if stem := told.get("stem"):
        stem = StemShape(**{**stem, "grid": tuple(stem["grid"])})
    shape = TailShape(**{**told, "block": BlockShape(**told["block"]), "stem": stem})
    return FrozenTail.of(shape, weights, dtype=None)
