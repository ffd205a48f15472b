"""Head requirements x what a store holds -> a ReadPlan, or an error that prints the command which mends it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vcache.extract.layers import LayerError, absolute_layer, resolve_layers
from vcache.heads.registry import get_head, list_heads
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.class_text import clip_sets, how_to_add, set_encoders, text_constant
from vcache.pipelines.console import size
from vcache.pipelines.derivation import STEM_ARRAY
from vcache.pipelines.extract_commands import bytes_per_clip, describe_arrays, extract_command, layers_word
from vcache.pipelines.frame_step import frame_step_problem, strided_hint
from vcache.pipelines.read_plan import MapsSource, ReadPlan, map_arrays
from vcache.pipelines.settings import SettingError, build
from vcache.pipelines.stored_views import extraction_words, stored_pixel_frames, view_definitions
from vcache.store.manifest import Manifest
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore

STORE_FACTS = (
    "num_classes",
    "num_frames",
    "num_layers",
    "width",
    "num_heads",
    "grid",
    "patch_size",
    "embed_dim",
    "pixel_mean",
    "pixel_std",
)
"""Fields of a head's Config that are filled from the store."""

SETTABLE_FACTS = ("num_frames", "num_heads")
"""Those that may be set all the same: another number of frames is a wish that another store can meet, and a decoder may divide
its queries among more or fewer heads than the backbone. Other sizes are never right."""


class HeadStoreMismatch(ValueError):
    """The head reads something that the store does not hold; ends in the command that adds it, where one can."""


def build_head_config(
    head: str,
    settings: Mapping[str, Any],
    manifest: Manifest,
    *,
    frame_step: int = 1,
    num_classes: int | None = None,
) -> Any:
    """The head's Config: shapes from the store, the rest from the settings, else the paper's defaults.

    With `frame_step` n a clip has every n-th of the stored frames; see `match`. `num_classes` is said where not all of the
    store's are told apart. A setting of `layers` may be a selection ("-2:", "all") as for `vcache extract --layers`.

    Raises:
        SettingError: a setting cannot be read or the Config refuses it, or it is a size that the store gives.
        LayerError: the backbone does not have these layers.
        HeadStoreMismatch: the stored clips cannot be read at this frame step.
    """
    if problem := frame_step_problem(frame_step, manifest.facts["request"]):
        raise HeadStoreMismatch(f"the store {problem}")
    config = get_head(head).Config
    backbone = manifest.facts["backbone"]
    facts = {
        **backbone,
        "num_classes": len(manifest.class_names) if num_classes is None else num_classes,
        "num_frames": manifest.facts["request"]["frames"] // frame_step,
        "grid": tuple(backbone["grid"]),
    }
    names = {field.name for field in dataclasses.fields(config)}
    facts |= pixel_statistics(manifest) if "pixel_mean" in names else {}
    if fixed := [name for name in STORE_FACTS if name in settings and name not in SETTABLE_FACTS]:
        raise SettingError(f"--set {fixed[0]}: it comes from the store, which has {facts[fixed[0]]}. Leave it out.")
    values = {name: facts[name] for name in STORE_FACTS if name in names} | dict(settings)
    if isinstance(layers := values.get("layers"), str) and (":" in layers or layers == "all"):
        values["layers"] = resolve_layers(layers, backbone["num_layers"])
    return _with_context_width(build(config, values), head, manifest)


def _with_context_width(config: Any, head: str, manifest: Manifest) -> Any:
    """What vectors before the class names have to be as wide as; the backbone's own sizes do not say it."""
    if not get_head(head).requires(config).prompts:
        return config
    from vcache.pipelines.text_tower import context_width  # open_clip takes seconds

    width = context_width(manifest)
    if config.context_width not in (None, width):
        raise SettingError(f"--set context_width: it comes from the store, which has {width}. Leave it out.")
    return dataclasses.replace(config, context_width=width)


def pixel_statistics(manifest: Manifest) -> dict[str, tuple[float, ...]]:
    """What the backbone's images were normalised by: mean and deviation of each colour, of values from 0 to 1."""
    preprocessing = manifest.spec["preprocessing"]
    return {f"pixel_{name}": tuple(preprocessing[name]) for name in ("mean", "std")}


def match(
    head: str,
    requirements: HeadRequirements,
    store: FeatureStore,
    splits: Iterable[str],
    *,
    views: Mapping[str, Sequence[int]] | None = None,
    frame_step: int = 1,
) -> ReadPlan:
    """The plan for reading what the head asks for from these splits; from view 0 of each, or from the `views` named for it.

    With `frame_step` n every n-th stored frame is read, which makes clips of another stride, so never unasked; see frame_step.py.

    Raises:
        HeadStoreMismatch: layers, frames or Q/K are missing; names both sides and the `vcache extract` command to run. Or the
            stored clips cannot be read at this frame step, or the text is of an encoder that the head cannot take.
    """
    if problem := frame_step_problem(frame_step, store.manifest.facts["request"]):
        raise HeadStoreMismatch(f"{store.path.name} {problem}")
    facts = store.manifest.facts["backbone"]
    try:
        plan = ReadPlan(
            tokens={layer: absolute_layer(layer, facts["num_layers"]) for layer in requirements.tokens},
            cls={layer: absolute_layer(layer, facts["num_layers"]) for layer in requirements.cls},
            maps={layer: absolute_layer(layer, facts["num_layers"]) for layer in requirements.maps},
            stem=requirements.stem,
            embed=requirements.embed,
            pixels=requirements.pixels,
            text=requirements.text,
            streamed=requirements.streamed,
        )
    except LayerError as error:
        raise HeadStoreMismatch(f"head {head!r} reads a layer that {facts['model']} does not have: {error}") from error
    reads = [(split, tuple((views or {}).get(split, (0,)))) for split in splits]
    int8 = store.manifest.spec.get("dtype") == "int8"
    plan = dataclasses.replace(plan, int8=int8, frame_step=frame_step)
    plan = dataclasses.replace(plan, pixel_step=_pixel_step(head, plan, store))
    plan = dataclasses.replace(plan, maps_from=_maps_source(plan, store, reads))
    _check_frames(head, requirements.num_frames, plan, store)
    for split, numbers in reads:
        missing = {view: set(plan.arrays) - _held(store, split, view) for view in numbers}
        if any(missing.values()) or set(plan.constants) - store.manifest.constants.keys():
            raise HeadStoreMismatch(
                _missing_message(head, plan, store, split, missing) + _other_cuts(requirements, store, reads)
            )
    if plan.text is not None and text_constant(plan.text) not in store.manifest.constants:
        raise HeadStoreMismatch(
            f"head {head!r} classifies by text embeddings of the class names, and {store.path.name} holds none of the templates "
            f"{plan.text!r}.\n{how_to_add(store, plan.text)}"
        )
    if plan.text is not None:
        _check_text_encoder(head, plan.text, store)
    return plan


def _check_text_encoder(head: str, templates: str, store: FeatureStore) -> None:
    """Text of another encoder is in a space of its own, also where its width happens to be that of CLIP's."""
    told = set_encoders(store.manifest).get(templates)
    heads = list_heads()
    if told is None or getattr(heads.get(head), "any_text_width", False):
        return
    own = clip_sets(store.manifest)
    can = ", ".join(name for name, one in heads.items() if getattr(one, "any_text_width", False))
    taken = f" Text of any encoder is taken by: {can}." if can else ""
    choose = (
        f"Choose a set of CLIP's with --set templates=NAME: {', '.join(own)}." if own else how_to_add(store, "label")
    )
    raise HeadStoreMismatch(
        f"head {head!r} compares videos with text in the {store.manifest.facts['backbone']['embed_dim']} channels of CLIP's "
        f"embeddings; {templates!r} of {store.path.name} has {told['width']} channels of the text encoder {told['encoder']}.\n"
        f"{choose}{taken}"
    )


def _pixel_step(head: str, plan: ReadPlan, store: FeatureStore) -> int:
    """Every so many of the stored pixel frames are as many for each frame as the head asks for."""
    if not plan.pixels or not (stored := stored_pixel_frames(store)):
        return 1
    frames = store.manifest.facts["request"]["frames"]
    step, rest = divmod(stored * plan.frame_step, frames * plan.pixels)
    if rest or not step:
        wanted = _least_pixel_frames(plan, store.manifest)
        path = store.path.parent / f"{store.path.name.removesuffix('.zarr')}-{wanted}-pixel-frames.zarr"
        own = _command_for(plan, store.manifest, store=path, words={"pixels": wanted})
        raise HeadStoreMismatch(
            f"head {head!r} reads the pixels of {plan.pixels} frames for each frame of a clip; {store.path.name} holds those of "
            f"{stored} for {frames // plan.frame_step} frames.\nExtract a store of its own with:  {own}"
        )
    return step


def _least_pixel_frames(plan: ReadPlan, manifest: Manifest) -> int:
    """The least number, as `vcache extract --pixels` takes it, that a plan can be read from."""
    return int(manifest.facts["request"]["frames"]) * (plan.pixels // math.gcd(plan.pixels, plan.frame_step))


def _pixel_frames_to_add(plan: ReadPlan, store: FeatureStore) -> int:
    """What a store without all the pixels that a plan reads has to be completed with: a store keeps one number of them."""
    return (stored_pixel_frames(store) or _least_pixel_frames(plan, store.manifest)) if plan.pixels else 0


def _held(store: FeatureStore, split: str, view: int) -> set[str]:
    """The arrays of a view; none of a view that the store does not define, as nobody knows what that would be."""
    return set(store.arrays(split, view)) if view < len(view_definitions(store.manifest)) else set()


def _maps_source(plan: ReadPlan, store: FeatureStore, reads: list[tuple[str, tuple[int, ...]]]) -> MapsSource:
    """The first of maps, Q/K and derivation that the store has for all layers; if none, the one that it has for some.

    What all views have comes before what view 0 has: the others are then to be completed in its way.
    """
    # Stored maps are of neighbouring frames: of others they are made of what is read.
    sources: tuple[MapsSource, ...] = ("maps", "qk", "derive") if plan.frame_step == 1 else ("qk", "derive")
    for places in ([(split, view) for split, views in reads for view in views], [(split, 0) for split, _ in reads]):
        stored = set.intersection(*(_held(store, *place) for place in places)) | store.manifest.constants.keys()
        for source in sources:
            tried = dataclasses.replace(plan, maps_from=source)
            needed = {name for layer in plan.maps.values() for name in map_arrays(source, layer)}
            if {*tried.constants, *needed} <= stored:
                return source
    kinds = {name.split("/")[0] for name in stored}
    stored_maps = "maps" in kinds and "maps" in sources
    return "qk" if "q" in kinds else "maps" if stored_maps else "derive" if "blocks" in kinds else "qk"


def _check_frames(head: str, wanted: int | None, plan: ReadPlan, store: FeatureStore) -> None:
    request = store.manifest.facts["request"]
    stored, read = request["frames"], request["frames"] // plan.frame_step
    if wanted is None or wanted == read:
        return
    of_these = f", of which every {plan.frame_step}. frame is read" if plan.frame_step > 1 else ""
    raise HeadStoreMismatch(
        f"head {head!r} reads clips of {wanted} frames; {store.path.name} holds clips of {stored}{of_these}.\n"
        f"Extract a store of its own with:  {_command_for(plan, store.manifest, frames=wanted)}"
        + strided_hint(wanted, request)
    )


def _missing_message(
    head: str, plan: ReadPlan, store: FeatureStore, split: str, missing: Mapping[int, set[str]]
) -> str:
    """`missing` are array names, by each view that is to be read."""
    behind = [view for view, names in missing.items() if names]
    view = next(iter(behind), 0)
    wants = describe_arrays(plan.arrays) + (f" in {len(missing)} views" if len(missing) > 1 else "")
    where = f"view {view} of split {split!r}" if view else f"split {split!r}"
    holds = describe_arrays(_held(store, split, view)) or "no features"
    num_pixels = _pixel_frames_to_add(plan, store)
    num_bytes = bytes_per_clip(missing.get(view, ()), store.manifest, num_pixel_frames=num_pixels)
    return (
        f"head {head!r} reads {wants}; {where} of {store.path.name} holds {holds}.\n"
        f"Extract the rest with:  {completing_command(store, plan, behind)}\n"
        f"(adds {size(num_bytes)} per clip; what is stored is kept)"
    )


def _other_cuts(requirements: HeadRequirements, store: FeatureStore, reads: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Of a head that runs top blocks: with which numbers of them it reads what is there."""
    if not requirements.tail or requirements.tail_stem:
        return ""
    num_layers = store.manifest.facts["backbone"]["num_layers"]
    held = set.intersection(*(_held(store, split, view) for split, views in reads for view in views))
    below = [*(f"tokens/{num_layers - num_blocks - 1}" for num_blocks in range(1, num_layers)), STEM_ARRAY]
    blocks = [str(num_blocks) for num_blocks, name in enumerate(below, start=1) if name in held]
    return f"\nWhat is stored serves --set blocks=N for N = {', '.join(blocks)}." if blocks else ""


def completing_command(
    store: FeatureStore, plan: ReadPlan, views: Iterable[int] = (), *, eval_views: str | None = None
) -> str:
    """The `vcache extract` line after which the store holds everything that the plan reads, in these views.

    `eval_views` asks for a grid of evaluation views that the store may not define yet, as "3x1".
    """
    words = extraction_words(store.manifest, views) | ({"eval_views": eval_views} if eval_views else {})
    words |= {"pixels": pixels} if (pixels := _pixel_frames_to_add(plan, store)) else {}
    return _command_for(plan, store.manifest, store=store.path, words=words)


def _command_for(
    plan: ReadPlan,
    manifest: Manifest,
    *,
    frames: int | None = None,
    store: StorePath | None = None,
    words: Mapping[str, Any] | None = None,
) -> str:
    """The line that extracts the layers of a plan, and where it reads none, the embedding alone."""
    word = layers_word(list(plan.layers), manifest.facts["backbone"]["num_layers"], stem=plan.stem)
    cross_frame = plan.maps_from if plan.maps else "none"
    asked = dict(words or {})
    if plan.pixels and frames:
        asked["pixels"] = frames * plan.pixels
    return extract_command(manifest, layers=word, frames=frames, store=store, cross_frame=cross_frame, words=asked)
