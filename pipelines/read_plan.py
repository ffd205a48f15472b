"""Which stored arrays answer what a head asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vcache.pipelines.derivation import STEM_ARRAY, input_array
from vcache.pipelines.derivation import constant_names as weight_names
from vcache.store.quantise import QUANTISED_KINDS, constant_names, scale_name

MapsSource = Literal["qk", "maps", "derive"]


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """Which stored array answers each thing that a head asked for: asked layer -> absolute layer of the backbone."""

    tokens: Mapping[int, int]
    cls: Mapping[int, int]
    maps: Mapping[int, int]
    embed: bool
    stem: bool = False
    """Whether what enters block 0 is read."""
    maps_from: MapsSource = "qk"
    """Whether cross-frame maps are made of stored queries and keys, read as they are, or derived from what enters the block."""
    int8: bool = False
    """Whether tokens, queries and keys are stored as int8, with scales."""
    frame_step: int = 1
    """Every so many of the stored frames are read, from the first on."""
    pixels: int = 0
    """Frames whose pixels are read, for each frame that is read; 0 for none."""
    pixel_step: int = 1
    """Every so many of the stored pixel frames are read."""
    text: str | None = None
    """The set of templates whose text embeddings are read."""
    streamed: bool = False
    """Whether the tokens are made layer by layer; see HeadRequirements."""

    def step_of(self, name: str) -> int:
        """Every so many of the frames of an array are read, if it has frames."""
        return self.pixel_step if name == "pixels" else self.frame_step

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays to read, each once."""
        return (*self.features, *(scale_name(name) for name in self.quantised_arrays))

    @property
    def quantised_arrays(self) -> tuple[str, ...]:
        """Those of the arrays that are stored as int8."""
        return tuple(name for name in self.features if name.split("/")[0] in QUANTISED_KINDS) if self.int8 else ()

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the arrays that hold features, without the scales that some are read with."""
        names = [f"tokens/{layer}" for layer in self.tokens.values()]
        names += [f"cls/{layer}" for layer in self.cls.values()]
        names += [name for layer in self.maps.values() for name in map_arrays(self.maps_from, layer)]
        names += [STEM_ARRAY] if self.stem else []
        names += ["embed"] if self.embed else []
        names += ["pixels"] if self.pixels else []
        return tuple(dict.fromkeys(names))

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the store's constants that are read."""
        layers = self.maps.values() if self.maps_from == "derive" else ()
        weights = tuple(name for layer in layers for name in weight_names(layer))
        return (*weights, *(constant for name in self.quantised_arrays for constant in constant_names(name)))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, ascending; not those whose tokens are only what enters another block, nor the stem."""
        return tuple(sorted({*self.tokens.values(), *self.cls.values(), *self.maps.values()}))


def map_arrays(source: MapsSource, layer: int) -> tuple[str, ...]:
    """The arrays that a layer's maps are made of."""
    return {"qk": (f"q/{layer}", f"k/{layer}"), "maps": (f"maps/{layer}",), "derive": (input_array(layer),)}[source]
