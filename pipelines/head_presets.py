"""Presets of `vcache train-head`: a row of a paper's table as head settings, recipe, and the store that it is trained from.

The presets of a head are PRESETS in HEAD_presets.py beside this file, with _ for -. Nothing here trains or extracts.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vcache.extract.layers import absolute_layer
from vcache.heads.registry import get_head
from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.settings import read_values
from vcache.pipelines.templates import EVERY_STORE, TEMPLATE_SETS

if TYPE_CHECKING:  # imported late: these load torch and zarr, and a shell waits for the names of presets
    from vcache.heads.requirements import HeadRequirements
    from vcache.store.manifest import Manifest

OURS = "ours"
"""The source of a row that is in no paper."""


class UnknownPreset(LookupError):
    """The head has no preset of this name."""


@dataclass(frozen=True, kw_only=True)
class HeadPreset:
    """One row of a table. What a user sets goes before `settings` and `recipe`."""

    name: str
    head: str
    source: str
    """Where the paper defines it; OURS for a row that it does not have."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the head's Config that are not its defaults, but for the number of frames."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the Recipe that are not the head's."""
    dataset: str
    num_classes: int
    model: str = "ViT-B-16-quickgelu"
    frames: int
    stride: int | None = None
    """None: the centres of equal segments (TSN)."""
    eval_views: str
    views: int = 8
    """Ours: the papers draw a new view in every epoch, a store has a fixed number of them."""
    augment: str
    top1: float | None = None
    """Per cent, as the paper has it; None where it has no number."""
    gmacs: int | float | None = None
    """The paper's, of backbone and head: EVL's and AIM's over all evaluation views, DiST's of one."""
    millions: float | None = None
    """The paper's parameters, in millions: of EVL and AIM those that are trained, of DiST with the image tower."""
    encoder: str | None = None
    """The text encoder of its templates, where it is not CLIP's: a model of Hugging Face."""
    note: str = ""
    """What differs between paper and official code, and which of them this is."""

    @property
    def head_settings(self) -> dict[str, Any]:
        return {**frames_of(self.head, self.frames), **self.settings}

    @property
    def request(self) -> dict[str, Any]:
        """What a store's request has to say, by the names of `request.recorded_request`."""
        return {
            "model": self.model,
            "pretrained": "openai",
            "random_weights": False,
            "tsn": self.stride is None,
            "frames": self.frames,
            "stride": self.stride or 16,
            "views": self.views,
            "eval_views": self.eval_views,
            "augment": self.augment,
            "pixels": self.frames * self._requirements.pixels,
        }

    @property
    def layers_and_cross_frame(self) -> tuple[str, str]:
        """The words of --layers and --cross-frame."""
        from vcache.pipelines.extract_commands import layers_word

        tower, asked = CLIP_TOWERS[self.model], self._requirements
        layers = {absolute_layer(layer, tower.num_layers) for layer in (*asked.tokens, *asked.cls, *asked.maps)}
        word = layers_word(sorted(layers), tower.num_layers, stem=asked.stem)
        if word.endswith(":") and len(layers) < tower.num_layers:  # the last ones: as papers say it
            word = word.replace(f"{min(layers)}:", f"-{len(layers)}:")
        return word, "qk" if asked.maps else "none"

    @property
    def text_lines(self) -> tuple[str, ...]:
        """The `vcache text` lines that add the text that the head reads and `vcache extract` does not write by itself."""
        wanted = dict.fromkeys((self._requirements.text, getattr(self._requirements, "training_text", None)))
        lines = []
        for name in wanted:
            if name is None or name in EVERY_STORE:
                continue
            words = ["vcache", "text", "STORE", "--templates", _template_set(name)]
            lines.append(shlex.join(words + (["--encoder", self.encoder] if self.encoder else [])))
        return tuple(lines)

    @property
    def _requirements(self) -> HeadRequirements:
        tower, head = CLIP_TOWERS[self.model], get_head(self.head)
        sizes = tower.facts_for(head.Config)
        return head.requires(head.Config(num_classes=self.num_classes, **sizes, **self.head_settings))

    @property
    def extract_line(self) -> str:
        """The `vcache extract` line that makes the store of this preset."""
        from vcache.pipelines.extract_commands import cross_frame_words, option_words

        layers, cross_frame = self.layers_and_cross_frame
        words = ["vcache", "extract", self.dataset, "--layers", layers, *option_words(self.request)]
        return shlex.join(words + cross_frame_words(layers, cross_frame))


def frames_of(head: str, num_frames: int) -> dict[str, int]:
    """The setting of a head that is made for a number of frames; none of one that takes any."""
    has_field = "num_frames" in {field.name for field in fields(get_head(head).Config)}
    return {"num_frames": num_frames} if has_field else {}


def _template_set(name: str) -> str:
    """Of "text4vis_distilbert", the embeddings of a set by another encoder: text4vis."""
    return next((one for one in TEMPLATE_SETS if name == one or name.startswith(f"{one}_")), name)


def presets_of(head: str) -> dict[str, HeadPreset]:
    """By name, in the order of the paper; none for a head without a file of presets."""
    module = f"{__package__}.{head.replace('-', '_')}_presets"
    if importlib.util.find_spec(module) is None:
        return {}
    return {preset.name: preset for preset in importlib.import_module(module).PRESETS}


def find_preset(head: str, name: str) -> HeadPreset:
    """The preset of that name.

    Raises:
        UnknownPreset: names the nearest, and the command that lists them.
    """
    presets = presets_of(head)
    if name in presets:
        return presets[name]
    if not presets:
        raise UnknownPreset(f"head {head!r} has no presets. Leave out --preset {name}.")
    near = difflib.get_close_matches(name, presets, n=1, cutoff=0.3)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UnknownPreset(f"head {head!r} has no preset {name!r}. {hint}See all with:  vcache heads {head}")


def check_store(preset: HeadPreset, manifest: Manifest, settings: Mapping[str, Any], name: str) -> None:
    """A store made with another kind of backbone, another number of frames or other sampling is refused.

    `settings` are the user's, which go before the preset's. Views are not compared: fewer of them are a weaker recipe, and
    another dataset is another experiment, but neither is another head.

    Raises:
        HeadStoreMismatch: what the preset wants, what the store called `name` holds, and the `vcache extract` line to run.
    """
    from vcache.pipelines.extract_commands import extract_command
    from vcache.pipelines.matching import HeadStoreMismatch

    tower, facts, stored = CLIP_TOWERS[preset.model], manifest.facts["backbone"], manifest.facts["request"]
    asked = frames_of(preset.head, preset.frames) | {key: settings[key] for key in ("num_frames",) if key in settings}
    frames = read_values(get_head(preset.head).Config, asked).get("num_frames", preset.frames)
    sizes = (tower.num_layers, tower.width, tower.grid)
    wanted = {
        "backbone": f"{preset.model} ({_sizes(*sizes)})",
        "clips": _clips(frames, preset.stride),
    }
    own = (facts["num_layers"], facts["width"], tuple(facts["grid"]))
    there = {
        "backbone": wanted["backbone"] if own == sizes else f"{facts['model']} ({_sizes(*own)})",
        "clips": _clips(stored["frames"], None if stored["tsn"] else stored["stride"]),
    }
    if wanted == there:
        return
    different = [kind for kind in wanted if wanted[kind] != there[kind]]
    layers, cross_frame = preset.layers_and_cross_frame
    words = {**preset.request, "frames": frames, "pixels": preset.request["pixels"] // preset.frames * frames}
    raise HeadStoreMismatch(
        f"preset {preset.name!r} is trained from {' and '.join(f'{kind} {wanted[kind]}' for kind in different)}; "
        f"{name} holds {' and '.join(f'{kind} {there[kind]}' for kind in different)}.\n"
        "Extract a store of its own with:  "
        + extract_command(manifest, layers=layers, frames=None, store=None, cross_frame=cross_frame, words=words)
    )


def _sizes(num_layers: int, width: int, grid: tuple[int, ...]) -> str:
    return f"{num_layers} blocks of width {width}, {grid[0]}x{grid[1]} patches"


def _clips(num_frames: int, stride: int | None) -> str:
    return f"of {num_frames} frames, " + ("sampled as in TSN" if stride is None else f"stride {stride}")
