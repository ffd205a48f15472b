"""The top blocks of a store's backbone for heads that run them: loaded from the store's checkpoint, checked and shared.

Heads that are trained side by side share one tail for each dtype, with as many blocks as any of them runs. The checkpoint is read
once for all, on the CPU, and let go. A run keeps its blocks (tail_file.py), and goes on with these where the checkpoint is gone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vcache.heads.requirements import HeadRequirements
from vcache.heads.tail import FrozenTail, TailShape
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_stem import StemShape
from vcache.pipelines.console import count
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.tail_file import TAIL, TailFileError, TailKey, read_tail, unlike
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

if TYPE_CHECKING:  # imported late: open_clip takes seconds
    from vcache.extract.backbone import FrozenBackbone


def tail_of_store(
    store: FeatureStore, num_blocks: int, frozen_dtype: str, device: torch.device, *, stem: bool = False
) -> FrozenTail:
    """The top blocks of the backbone that made the store; with `stem`, which all blocks have, its patch embedding, too.

    Raises:
        HeadStoreMismatch: the checkpoint is not there, or is another one now.
    """
    key, tails = _key(store.manifest, num_blocks, frozen_dtype, stem), SharedTails()
    tails.load(store, device, [key])
    return tails.of(key, device)


def tail_key(requirements: HeadRequirements, config: Any, manifest: Manifest) -> TailKey | None:
    """Which blocks a head runs on this store; None of a head that runs none."""
    if not requirements.tail:
        return None
    return _key(manifest, requirements.tail, config.frozen_dtype, requirements.tail_stem)


def _key(manifest: Manifest, num_blocks: int, frozen_dtype: str, stem: bool) -> TailKey:
    digest, dtype = manifest.spec["weights_sha256"], kept_dtype(frozen_dtype, manifest)
    return TailKey(num_blocks=num_blocks, dtype=dtype, weights_sha256=digest, stem=stem)


def kept_dtype(frozen_dtype: str, manifest: Manifest) -> str:
    """What the frozen weights are kept in: "auto" is what the backbone ran in when the store was made."""
    # Stores of before there was a choice do not say it.
    return str(manifest.spec.get("precision", "float32")) if frozen_dtype == "auto" else frozen_dtype


class SharedTails:
    """The tails of the heads of one group after another: whoever runs the same blocks runs the same tensors."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str, torch.device], FrozenTail] = {}
        """By digest of the weights, dtype and device."""

    def load(
        self, store: FeatureStore, device: torch.device, keys: Iterable[TailKey], runs: Sequence[Path] = ()
    ) -> None:
        """Have what heads with these keys run, where it is not there already. Tails of other backbones are let go.

        Args:
            runs: folders of runs that may hold their blocks, which are then taken in place of the checkpoint's.

        Raises:
            HeadStoreMismatch: the checkpoint is not there, or is another one now.
        """
        largest: dict[str, TailKey] = {}
        for key in sorted(keys, key=lambda key: (key.num_blocks, key.stem)):
            largest[key.dtype] = key
        digests = {key.weights_sha256 for key in largest.values()}
        self._loaded = {place: tail for place, tail in self._loaded.items() if place[0] in digests}
        missing = [key for key in largest.values() if not self._has(key, device)]
        found, problems = _of_runs(missing, runs)
        if left := [key for key in missing if key not in found]:
            found |= _of_checkpoint(store, left, problems)
        for key, tail in found.items():
            self._loaded[_place(key, device)] = tail.to(device)

    def of(self, key: TailKey, device: torch.device) -> FrozenTail:
        """That of a head; `load` was told of it."""
        return self._loaded[_place(key, device)]

    def _has(self, key: TailKey, device: torch.device) -> bool:
        tail = self._loaded.get(_place(key, device))
        return tail is not None and not unlike(tail, key)


def _place(key: TailKey, device: torch.device) -> tuple[str, str, torch.device]:
    return key.weights_sha256, key.dtype, device


def _of_runs(keys: Sequence[TailKey], runs: Sequence[Path]) -> tuple[dict[TailKey, FrozenTail], list[str]]:
    """What run folders hold of them, and what is wrong with files that are there."""
    found: dict[TailKey, FrozenTail] = {}
    problems: list[str] = []
    for key in keys:
        for file in (run / TAIL for run in runs if (run / TAIL).is_file()):
            try:
                found[key] = read_tail(file, key)
                break
            except TailFileError as error:
                problems.append(str(error))
    return found, problems


def _of_checkpoint(store: FeatureStore, keys: Sequence[TailKey], problems: Sequence[str]) -> dict[TailKey, FrozenTail]:
    """All of them of one pass over the file. What is left of the backbone is free again when this returns: tails are copies."""
    num_blocks = max(key.num_blocks for key in keys)
    backbone = _backbone(store, num_blocks, problems)
    tails = {}
    for key in keys:
        weights = backbone.tail_weights(key.num_blocks, stem=key.stem)
        tails[key] = FrozenTail.of(_shape(backbone, key, weights), weights, getattr(torch, key.dtype))
        tails[key].weights_sha256 = backbone.weights_sha256
    return tails


def _backbone(store: FeatureStore, num_blocks: int, problems: Sequence[str]) -> "FrozenBackbone":
    """The image tower that made the store, on the CPU."""
    from vcache.extract.backbone import load_backbone
    from vcache.extract.weights import BackboneError

    request, spec = store.manifest.facts["request"], store.manifest.spec
    model, pretrained = request["model"], request["pretrained"]
    named = f"{model} ({pretrained})" if pretrained else model
    blocks = f"the top {count(num_blocks, 'block')}" if num_blocks > 1 else "the top block"
    try:
        backbone = load_backbone(model, pretrained, random_weights=request["random_weights"])
    except (BackboneError, OSError) as error:
        damaged = "".join(f" {problem}" for problem in problems)
        raise HeadStoreMismatch(
            f"the head runs {blocks} of {named}, which made {store.path}, and they cannot be loaded: {str(error).rstrip('.')}. "
            f"Put the checkpoint back where it was.{damaged}"
        ) from error
    if backbone.weights_sha256 != spec["weights_sha256"]:
        raise HeadStoreMismatch(
            f"{store.path} was made with weights {spec['weights_sha256'][:16]} of {named}, which now has "
            f"{backbone.weights_sha256[:16]}: its tokens enter the blocks of its own checkpoint. Put that back."
        )
    # Of a folder the name has a digest of its configuration: the same weights with another GELU are another tower.
    if backbone.facts.model != spec["model"]:
        raise HeadStoreMismatch(
            f"{store.path} was made with {spec['model']} of {named}, which now is {backbone.facts.model}: its configuration is "
            "another one, and the same weights would be computed otherwise. Put that back."
        )
    return backbone


def _shape(backbone: "FrozenBackbone", key: TailKey, weights: Mapping[str, Tensor]) -> TailShape:
    facts = backbone.tail_facts()
    of_block = {field.name for field in fields(BlockShape)}
    stem = None
    if key.stem:
        patches, ln_pre = backbone.facts, "stem.ln_pre.weight" in weights
        stem = StemShape(patch_size=patches.patch_size, grid=patches.grid, ln_pre=ln_pre)
    return TailShape(
        num_blocks=key.num_blocks,
        stem=stem,
        block=BlockShape(**{name: value for name, value in facts.items() if name in of_block}),
        **{name: value for name, value in facts.items() if name not in of_block},
    )
