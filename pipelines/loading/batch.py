"""One batch on the device: what each plan asked for is made of the arrays that were read, once however many plans ask."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vcache.heads.cross_frame import cross_frame_maps
from vcache.heads.query_key import QueryKeyProjection
from vcache.heads.requirements import ClipFeatures, OnDemand
from vcache.pipelines.derivation import STEM_ARRAY, input_array, load_projection
from vcache.pipelines.precision import channel_constants, dequantised
from vcache.pipelines.read_plan import ReadPlan
from vcache.store.quantise import scale_name
from vcache.store.reader import FeatureStore


class PlanNotRead(ValueError):
    """Features were asked for of which the batch holds no arrays, or it was not said of which plan."""


@dataclass(frozen=True)
class StoreWeights:
    """What features are made with besides the arrays: channel statistics of int8, frozen projections of derived maps."""

    constants: Mapping[str, Tensor]
    projections: Mapping[int, QueryKeyProjection]

    @classmethod
    def load(cls, store: FeatureStore, plans: Iterable[ReadPlan], device: torch.device) -> "StoreWeights":
        """Those of all the plans, each once."""
        plans = tuple(plans)
        quantised = dict.fromkeys(name for plan in plans for name in plan.quantised_arrays)
        derived = dict.fromkeys(layer for plan in plans if plan.maps_from == "derive" for layer in plan.maps.values())
        return cls(
            channel_constants(store, quantised, device),
            {layer: load_projection(store, layer, device) for layer in derived},
        )


class BatchFeatures:
    """The arrays of B clips on the device, and the features that were made of them so far.

    Features are shared among the plans: heads read them and never write to them.
    """

    def __init__(
        self,
        arrays: Mapping[str, Tensor],
        steps: Mapping[str, int],
        weights: StoreWeights,
        plans: Iterable[ReadPlan],
    ) -> None:
        """`steps` says of each array that every so many of the stored frames were read; `plans` are those that will ask."""
        self._arrays, self._steps, self._weights = arrays, steps, weights
        self._asked: set[str] = set()
        for plan in plans:
            self._asked |= {STEM_ARRAY} if plan.stem else set()
            self._asked |= set() if plan.streamed else {f"tokens/{layer}" for layer in plan.tokens.values()}
        self._made: dict[tuple[str, int], Tensor] = {}

    def of(self, plan: ReadPlan) -> ClipFeatures:
        """What the plan asked for.

        Raises:
            PlanNotRead: some of it was not read.
        """
        self._check(plan)
        step = plan.frame_step
        return ClipFeatures(
            tokens=self._tokens(plan),
            cls={asked: self._values(f"cls/{layer}", step) for asked, layer in plan.cls.items()},
            maps={asked: self._maps(plan, layer) for asked, layer in plan.maps.items()},
            stem=self._values(STEM_ARRAY, step) if plan.stem else None,
            embed=self._values("embed", step) if plan.embed else None,
            pixels=self._frames("pixels", plan.pixel_step) if plan.pixels else None,
        )

    def _check(self, plan: ReadPlan) -> None:
        missing = [
            name
            for name in plan.arrays
            if name not in self._arrays or self._read_step(name, plan.step_of(name)) is None
        ]
        if missing:
            there = ", ".join(self._arrays) or "nothing"
            raise PlanNotRead(
                f"features of {', '.join(missing)} were asked for (every {plan.step_of(missing[0])}. frame); of this batch were "
                f"read: {there}. Name the plan when the epoch begins."
            )

    def _read_step(self, name: str, step: int) -> int | None:
        """Of the frames that were read every so many are meant by every `step`-th stored frame; None where not all were read."""
        return step // self._steps[name] if step % self._steps[name] == 0 else None

    def _tokens(self, plan: ReadPlan) -> Mapping[int, Tensor]:
        """Streamed, each layer is made anew whenever it is asked for, unless another plan has had it made and kept."""
        step = plan.frame_step
        if not plan.streamed:
            return {asked: self._values(f"tokens/{layer}", step) for asked, layer in plan.tokens.items()}

        def make(asked: int) -> Tensor:
            name = f"tokens/{plan.tokens[asked]}"
            return self._made[name, step] if (name, step) in self._made else self._dequantised(name, step)

        return OnDemand(plan.tokens, make)

    def _values(self, name: str, step: int) -> Tensor:
        """Features as heads get them, kept for the next who asks."""
        return self._once(name, step, lambda: self._dequantised(name, step))

    def _maps(self, plan: ReadPlan, layer: int) -> Tensor:
        """Layer by layer, so that of int8 the queries and keys of one layer at a time are in memory as float32."""
        step = plan.frame_step
        if plan.maps_from == "maps":
            return self._values(f"maps/{layer}", 1)
        if plan.maps_from == "derive":
            return self._once(f"derived/{layer}", step, lambda: self._derived(layer, step))
        return self._once(f"attention/{layer}", step, lambda: self._of_queries_and_keys(layer, step))

    def _derived(self, layer: int, step: int) -> Tensor:
        """Of what enters the block; where it is also read as tokens or as the stem, of those that the heads get."""
        name = input_array(layer)
        entering = self._values(name, step) if name in self._asked else self._dequantised(name, step)
        return self._weights.projections[layer].maps(entering)

    def _of_queries_and_keys(self, layer: int, step: int) -> Tensor:
        return cross_frame_maps(*(self._dequantised(f"{kind}/{layer}", step) for kind in ("q", "k")))

    def _dequantised(self, name: str, step: int) -> Tensor:
        """Whatever the store keeps of them; see precision.py."""
        read = [part for part in (name, scale_name(name)) if part in self._arrays]
        return dequantised({part: self._frames(part, step) for part in read}, name, self._weights.constants)

    def _frames(self, name: str, step: int) -> Tensor:
        """Of more frames a copy, laid out as if only these had been read: the bits of what is computed may depend on it."""
        array, every = self._arrays[name], self._read_step(name, step)
        return array if every == 1 else array[:, ::every].contiguous()

    def _once(self, name: str, step: int, make: Callable[[], Tensor]) -> Tensor:
        if (name, step) not in self._made:
            self._made[name, step] = make()
        return self._made[name, step]


@dataclass(frozen=True)
class Batch:
    """This rank's clips of a batch: the rows of the split and the views they came from, sorted by view. There may be none."""

    rows: np.ndarray
    views: np.ndarray
    targets: Int[Tensor, " B"] | Float[Tensor, "B K"]
    """Of these rows, on the device: the class, or with several classes 1 for each of them, else 0."""
    num_global: int
    """Clips of this batch over all ranks."""
    clips: BatchFeatures
    plans: tuple[ReadPlan, ...]
    """What the batch was read for."""

    def __len__(self) -> int:
        return len(self.rows)

    def features(self, plan: ReadPlan | None = None) -> ClipFeatures:
        """What the plan asked for; without one, what the only plan of the batch asked for.

        Raises:
            PlanNotRead: there are several plans and none was named, or the batch was not read for this one.
        """
        if plan is None and len(self.plans) != 1:
            raise PlanNotRead(f"the batch was read for {len(self.plans)} plans. Say of which the features are wanted.")
        return self.clips.of(plan or self.plans[0])
