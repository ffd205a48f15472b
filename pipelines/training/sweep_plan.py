"""A sweep on its stores, before anything is trained: which members can be, what each reads, who is trained with whom."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from textwrap import indent
from typing import Any

import torch

from vcache.extract.layers import LayerError
from vcache.heads.registry import get_head
from vcache.heads.tail_block import BlockShape
from vcache.heads.tail_memory import activation_bytes
from vcache.pipelines.derivation import STEM_ARRAY
from vcache.pipelines.device import select_device
from vcache.pipelines.extract_commands import bytes_per_clip
from vcache.pipelines.fitting_store import NoFittingStore
from vcache.pipelines.frozen_tail import tail_key
from vcache.pipelines.head_presets import UnknownPreset
from vcache.pipelines.loading.readable import IncompleteSplit
from vcache.pipelines.matching import HeadStoreMismatch
from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.config import TrainingConfig
from vcache.pipelines.training.mixed_precision import PrecisionError
from vcache.pipelines.training.preparation import (
    STREAM_FIELDS,
    PreparedHead,
    open_training_store,
    prepare_head,
    readable_digest,
    resolve,
)
from vcache.pipelines.training.step import check_recipe
from vcache.pipelines.training.sweep_groups import HeadDemand, describe_groups, free_memory, plan_groups
from vcache.pipelines.training.sweep_spec import SweepMember
from vcache.pipelines.training.torchrun import num_processes_here
from vcache.pipelines.training.world import World, joined_world
from vcache.store.manifest import Manifest
from vcache.store.reader import FeatureStore

REFUSALS = (SettingError, HeadStoreMismatch, NoFittingStore, IncompleteSplit, LayerError, UnknownPreset, PrecisionError)
"""What is wrong with one member and leaves the others alone."""


class InvalidMembers(ValueError):
    """Some members of a sweep cannot be trained; nothing was."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What is about to run."""

    members: tuple[SweepMember, ...]
    """In the order of the sweep; they name their stores."""
    groups: tuple[tuple[str, ...], ...]
    """Names of members: each group is trained side by side, one after the other."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of members that cannot be trained."""
    lines: tuple[str, ...]
    """The groups in words."""
    num_processes: int = 1
    """That train together; each holds all heads of a group."""

    def to_json(self) -> dict[str, Any]:
        """For sweep.json; `from_json` gives it back, so that a sweep goes on in the groups in which it was begun."""
        return {**vars(self), "members": [member.to_json() for member in self.members]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SweepPlan":
        return cls(
            members=tuple(map(SweepMember.from_json, values["members"])),
            groups=tuple(map(tuple, values["groups"])),
            skipped=tuple((name, reason) for name, reason in values["skipped"]),
            lines=tuple(values["lines"]),
            num_processes=values.get("num_processes", 1),
        )


def plan_sweep(members: Sequence[SweepMember], *, together: int | None = None, skip_invalid: bool = False) -> SweepPlan:
    """Hold every member against its store; `together` is how many heads a group has at most, in place of free memory.

    Of several processes the first plans for all.

    Raises:
        InvalidMembers: names all that cannot be trained, each with the reason, unless `skip_invalid`; or none can.
        DeviceError, StoreError: what no member could be trained with.
    """
    with joined_world(select_device(members[0].config.device)) as world:
        plan = _plan(members, world, together, skip_invalid).to_json() if world.is_first else None
        return SweepPlan.from_json(world.broadcast_json(plan))


def _plan(members: Sequence[SweepMember], world: World, together: int | None, skip_invalid: bool) -> SweepPlan:
    ready: list[SweepMember] = []
    demands: list[HeadDemand] = []
    refused: list[tuple[str, str]] = []
    with _Stores() as stores:
        for member in members:
            try:
                store = stores.open(member.config)
                prepared = prepare_head(member.config, store, world.device)
                config = replace(prepared.config, store=store.path.resolve())
                prepared = replace(prepared, config=config)
                demand = demand_of(member.name, prepared, store.manifest, world.size)
                # Alone, each would be trained on what it finds: who finds other videos cannot share its batches.
                demand = replace(demand, stream={**demand.stream, "readable videos": stores.readable(prepared, store)})
            except REFUSALS as error:
                refused.append((member.name, str(error)))
                continue
            ready.append(replace(member, config=config, parameters=demand.num_parameters))
            demands.append(demand)
    if refused and not (skip_invalid and ready):
        raise InvalidMembers(_refusal(refused, len(members)))
    free = free_memory(world.device)
    if world.device.type == "cpu":  # processes of one machine share it; of GPUs each has its own
        free //= num_processes_here(world.size)
    groups = plan_groups(demands, free, together)
    in_each = [f"  in each of {world.size} processes"] if world.size > 1 else []
    return SweepPlan(
        members=tuple(ready),
        groups=tuple(tuple(demand.name for demand in group.demands) for group in groups),
        skipped=tuple(refused),
        lines=(*describe_groups(groups, free, together), *in_each),
        num_processes=world.size,
    )


class _Stores(ExitStack):
    """Stores of members: those that read the same share what is open, as looking for a store opens all there are."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[str, FeatureStore] = {}
        self._readable: dict[Any, str] = {}

    def open(self, config: TrainingConfig) -> FeatureStore:
        settings = sorted((name, str(value)) for name, value in resolve(config).head.items())
        key = repr((replace(config, seed=0, settings={}), settings))
        if key not in self._opened:
            self._opened[key] = self.enter_context(open_training_store(config))
        return self._opened[key]

    def readable(self, head: PreparedHead, store: FeatureStore) -> str:
        """A digest of what the head can read, each asked once.

        Raises:
            IncompleteSplit: some of it is not extracted yet.
        """
        config = head.config
        key = (store.path, config.train_split, head.views, config.allow_incomplete, *sorted(head.plan.arrays))
        if key not in self._readable:
            self._readable[key] = readable_digest(head, store)
        return self._readable[key]


def demand_of(name: str, prepared: PreparedHead, manifest: Manifest, num_processes: int = 1) -> HeadDemand:
    """What a head asks of the memory of each process, which holds the whole head and its share of a batch.

    Raises:
        SettingError: it cannot be trained by its recipe.
    """
    with torch.device("meta"):  # takes no memory
        head = get_head(prepared.config.head)(prepared.head_config)
    check_recipe(head, prepared.recipe)
    clips, plan = -(-prepared.recipe.batch_size // num_processes), prepared.plan
    # Streamed tokens are in memory one layer at a time.
    tokens = dict(list(plan.tokens.items())[:1]) if plan.streamed else plan.tokens
    kinds = {"tokens": tokens, "cls": plan.cls, "maps": plan.maps}
    features = [f"{kind}/{layer}" for kind, layers in kinds.items() for layer in layers.values()]
    features += [STEM_ARRAY] if plan.stem else []
    features += ["embed"] if plan.embed else []

    def num_bytes(array: str, dtype: str | None = None) -> int:
        """Of so many of the frames, one is read."""
        pixels = manifest.facts["request"]["frames"] * plan.pixels
        return clips * bytes_per_clip([array], manifest, dtype, num_pixel_frames=pixels) // plan.frame_step

    return HeadDemand(
        name=name,
        stream=dict(zip((*STREAM_FIELDS, "batch_size"), prepared.stream(), strict=True)),
        num_parameters=sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad),
        averaged=prepared.recipe.ema_decay is not None,
        arrays={array: num_bytes(array) for array in plan.arrays},
        features={feature: num_bytes(feature, "float32") for feature in features},
        frozen=_frozen_bytes(prepared, manifest),
        kept=_kept_bytes(prepared, manifest, clips),
    )


def _frozen_bytes(prepared: PreparedHead, manifest: Manifest) -> dict[str, int]:
    """Of the blocks of the backbone that the head runs, without reading them: 12 width^2 weights each, and the projection."""
    key = tail_key(prepared.requirements, prepared.head_config, manifest)
    if key is None:
        return {}
    width, embed_dim = (int(manifest.facts["backbone"][name]) for name in ("width", "embed_dim"))
    num_weights = key.num_blocks * 12 * width**2 + width * embed_dim
    dtype: torch.dtype = getattr(torch, key.dtype)
    return {key.dtype: num_weights * dtype.itemsize}


def _kept_bytes(prepared: PreparedHead, manifest: Manifest, clips: int) -> int:
    """What the blocks that the head runs keep for the backward pass of so many clips."""
    if not prepared.requirements.tail:
        return 0
    facts = manifest.facts["backbone"]
    block = BlockShape(width=facts["width"], num_heads=facts["num_heads"], mlp_dim=4 * facts["width"])
    return activation_bytes(prepared.head_config, block, clips, prepared.precision.item_bytes)


def _refusal(refused: Sequence[tuple[str, str]], num_members: int) -> str:
    """Members with the same reason are named together."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refused:
        reasons.setdefault(reason, []).append(name)
    if num_members == 1:
        return refused[0][1]
    parts = [
        f"{', '.join(names[:3])}{_more(len(names) - 3)}:\n{indent(reason, '    ')}" for reason, names in reasons.items()
    ]
    hint = "" if len(refused) == num_members else "\nLeave these out, or train the others with --skip-invalid."
    return "\n  ".join([f"{len(refused)} of {num_members} heads cannot be trained:", *parts]) + hint


def _more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""
