"""Head requirements x what a store holds -> a ReadPlan, or an error that prints the command which mends it."""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vcache.extract.layers import LayerError, absolute_layer, resolve_layers
from vcache.heads.registry import get_head
from vcache.heads.requirements import HeadRequirements
from vcache.pipelines.derivation import constant_names as weight_names
from vcache.pipelines.derivation import input_array
from vcache.pipelines.settings import SettingError, build
from vcache.pipelines.stored_views import extraction_words, training_views, view_definitions
from vcache.pipelines.stores import open_stores, vcache_home
from vcache.store.errors import StoreError
from vcache.store.manifest import Manifest
from vcache.store.object_path import StorePath
from vcache.store.parts import group_parts
from vcache.store.quantise import QUANTISED_KINDS, constant_names, scale_name
from vcache.store.reader import FeatureStore

STORE_FACTS = ("num_classes", "num_frames", "width", "num_heads", "grid", "embed_dim")
"""Fields of a head's Config that are filled from the store."""

SETTABLE_FACTS = ("num_frames", "num_heads")
"""Those that may be set all the same: another number of frames is a wish that another store can meet, and a decoder may divide
its queries among more or fewer heads than the backbone. Other sizes are never right."""

# Options of `vcache extract` that a store records, and their defaults.
_REQUEST_DEFAULTS: dict[str, Any] = {
    "root": None,
    "model": "ViT-B-16-quickgelu",
    "pretrained": "openai",
    "random_weights": False,
    "tsn": False,
    "frames": 8,
    "stride": 16,
    "dtype": "float16",
    "preprocess": "fast",
    "decoder": "pyav",
    "val_fraction": 0.2,
    "views": 1,
    "eval_views": "1x1",
    "augment": "crop-flip",
    "view_seed": 0,
    "pixels": 0,
}


MapsSource = Literal["qk", "maps", "derive"]


class HeadStoreMismatch(ValueError):
    """The head reads something that the store does not hold; ends in the command that adds it, where one can."""


class NoFittingStore(LookupError):
    """No store under `$VCACHE_HOME` fits the head, or several do."""


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """Which stored array answers each thing that a head asked for: asked layer -> absolute layer of the backbone."""

    tokens: Mapping[int, int]
    cls: Mapping[int, int]
    maps: Mapping[int, int]
    embed: bool
    maps_from: MapsSource = "qk"
    """Whether cross-frame maps are made of stored queries and keys, read as they are, or derived from what enters the block."""
    int8: bool = False
    """Whether tokens, queries and keys are stored as int8, with scales."""

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
        names += [name for layer in self.maps.values() for name in _map_arrays(self.maps_from, layer)]
        names += ["embed"] if self.embed else []
        return tuple(dict.fromkeys(names))

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the store's constants that are read."""
        layers = self.maps.values() if self.maps_from == "derive" else ()
        weights = tuple(name for layer in layers for name in weight_names(layer))
        return (*weights, *(constant for name in self.quantised_arrays for constant in constant_names(name)))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, ascending; not those whose tokens are only what enters another block."""
        return tuple(sorted({*self.tokens.values(), *self.cls.values(), *self.maps.values()}))


def _map_arrays(source: MapsSource, layer: int) -> tuple[str, ...]:
    """The arrays that a layer's maps are made of."""
    return {"qk": (f"q/{layer}", f"k/{layer}"), "maps": (f"maps/{layer}",), "derive": (input_array(layer),)}[source]


def build_head_config(head: str, settings: Mapping[str, Any], manifest: Manifest) -> Any:
    """The head's Config: shapes from the store, the rest from the settings, else the paper's defaults.

    A setting of `layers` may be a selection ("-2:", "all") as for `vcache extract --layers`.

    Raises:
        SettingError: a setting cannot be read or the Config refuses it, or it is a size that the store gives.
        LayerError: the backbone does not have these layers.
    """
    config = get_head(head).Config
    backbone = manifest.facts["backbone"]
    facts = {
        **backbone,
        "num_classes": len(manifest.class_names),
        "num_frames": manifest.facts["request"]["frames"],
        "grid": tuple(backbone["grid"]),
    }
    names = {field.name for field in dataclasses.fields(config)}
    if fixed := [name for name in STORE_FACTS if name in settings and name not in SETTABLE_FACTS]:
        raise SettingError(f"--set {fixed[0]}: it comes from the store, which has {facts[fixed[0]]}. Leave it out.")
    values = {name: facts[name] for name in STORE_FACTS if name in names} | dict(settings)
    if isinstance(layers := values.get("layers"), str) and (":" in layers or layers == "all"):
        values["layers"] = resolve_layers(layers, backbone["num_layers"])
    return build(config, values)


def match(
    head: str,
    requirements: HeadRequirements,
    store: FeatureStore,
    splits: Iterable[str],
    *,
    views: Mapping[str, Sequence[int]] | None = None,
) -> ReadPlan:
    """The plan for reading what the head asks for from these splits; from view 0 of each, or from the `views` named for it.

    Raises:
        HeadStoreMismatch: layers, frames or Q/K are missing; names both sides and the `vcache extract` command to run. Or the
            videos have several labels each.
    """
    _check_labels(head, store)
    facts = store.manifest.facts["backbone"]
    try:
        plan = ReadPlan(
            tokens={layer: absolute_layer(layer, facts["num_layers"]) for layer in requirements.tokens},
            cls={layer: absolute_layer(layer, facts["num_layers"]) for layer in requirements.cls},
            maps={layer: absolute_layer(layer, facts["num_layers"]) for layer in requirements.maps},
            embed=requirements.embed,
        )
    except LayerError as error:
        raise HeadStoreMismatch(f"head {head!r} reads a layer that {facts['model']} does not have: {error}") from error
    reads = [(split, tuple((views or {}).get(split, (0,)))) for split in splits]
    int8 = store.manifest.spec.get("dtype") == "int8"
    plan = dataclasses.replace(plan, maps_from=_maps_source(plan, store, reads), int8=int8)
    _check_frames(head, requirements.num_frames, plan, store)
    for split, numbers in reads:
        missing = {view: set(plan.arrays) - _held(store, split, view) for view in numbers}
        if any(missing.values()) or set(plan.constants) - store.manifest.constants.keys():
            raise HeadStoreMismatch(_missing_message(head, plan, store, split, missing))
    return plan


def _check_labels(head: str, store: FeatureStore) -> None:
    """Of several labels the table's `label` is the first, and -1 where there is none: nothing to train on or to count."""
    if store.manifest.facts.get("multi_label"):
        raise HeadStoreMismatch(
            f"head {head!r} is trained and evaluated on one label per video; the videos of {store.path.name} have several, "
            "stored as multi_hot, on which heads cannot be trained so far. Choose a store with one label per video."
        )


def _held(store: FeatureStore, split: str, view: int) -> set[str]:
    """The arrays of a view; none of a view that the store does not define, as nobody knows what that would be."""
    return set(store.arrays(split, view)) if view < len(view_definitions(store.manifest)) else set()


def _maps_source(plan: ReadPlan, store: FeatureStore, reads: list[tuple[str, tuple[int, ...]]]) -> MapsSource:
    """The first of maps, Q/K and derivation that the store has for all layers; if none, the one that it has for some.

    What all views have comes before what view 0 has: the others are then to be completed in its way.
    """
    sources: tuple[MapsSource, ...] = ("maps", "qk", "derive")
    for places in ([(split, view) for split, views in reads for view in views], [(split, 0) for split, _ in reads]):
        stored = set.intersection(*(_held(store, *place) for place in places)) | store.manifest.constants.keys()
        for source in sources:
            tried = dataclasses.replace(plan, maps_from=source)
            needed = {name for layer in plan.maps.values() for name in _map_arrays(source, layer)}
            if {*tried.constants, *needed} <= stored:
                return source
    kinds = {name.split("/")[0] for name in stored}
    return "qk" if "q" in kinds else "maps" if "maps" in kinds else "derive" if "blocks" in kinds else "qk"


def _check_frames(head: str, wanted: int | None, plan: ReadPlan, store: FeatureStore) -> None:
    stored = store.manifest.facts["request"]["frames"]
    if wanted in (None, stored):
        return
    raise HeadStoreMismatch(
        f"head {head!r} reads clips of {wanted} frames; {store.path.name} holds clips of {stored}.\n"
        f"Extract a store of its own with:  {_command_for(plan, store.manifest, frames=wanted)}"
    )


def _missing_message(
    head: str, plan: ReadPlan, store: FeatureStore, split: str, missing: Mapping[int, set[str]]
) -> str:
    """`missing` are array names, by each view that is to be read."""
    behind = [view for view, names in missing.items() if names]
    view = next(iter(behind), 0)
    wants = _describe(plan.arrays) + (f" in {len(missing)} views" if len(missing) > 1 else "")
    where = f"view {view} of split {split!r}" if view else f"split {split!r}"
    holds = _describe(_held(store, split, view)) or "no features"
    num_bytes = _bytes_per_clip(missing.get(view, ()), store.manifest)
    return (
        f"head {head!r} reads {wants}; {where} of {store.path.name} holds {holds}.\n"
        f"Extract the rest with:  {completing_command(store, plan, behind)}\n"
        f"(adds {num_bytes / 1e6:.3g} MB per clip; what is stored is kept)"
    )


def completing_command(
    store: FeatureStore, plan: ReadPlan, views: Iterable[int] = (), *, eval_views: str | None = None
) -> str:
    """The `vcache extract` line after which the store holds everything that the plan reads, in these views.

    `eval_views` asks for a grid of evaluation views that the store may not define yet, as "3x1".
    """
    words = extraction_words(store.manifest, views) | ({"eval_views": eval_views} if eval_views else {})
    return _command_for(plan, store.manifest, store=store.path, words=words)


def _command_for(
    plan: ReadPlan,
    manifest: Manifest,
    *,
    frames: int | None = None,
    store: StorePath | None = None,
    words: Mapping[str, Any] | None = None,
) -> str:
    """The line that extracts the layers of a plan; where it reads none, the last layer, which is the least one can ask for."""
    word = layers_word(list(plan.layers), manifest.facts["backbone"]["num_layers"]) or "-1"
    cross_frame = plan.maps_from if plan.maps else "none"
    return extract_command(
        manifest, layers=word, frames=frames, store=store, cross_frame=cross_frame, words=words or {}
    )


def _describe(names: Iterable[str]) -> str:
    """ "tokens of layers 8-11, Q/K of layers 8-11" of array names."""
    layers: dict[str, list[int]] = {}
    for name in names:
        kind, slash, layer = name.partition("/")
        if slash and kind != "k" and not kind.endswith("_scale"):
            layers.setdefault("Q/K" if kind == "q" else kind, []).append(int(layer))
    words = [f"{kind} of layers {_ranges(sorted(numbers))}" for kind, numbers in sorted(layers.items(), reverse=True)]
    if "embed" in names:
        words.append("the embedding")
    return ", ".join(words)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    words: list[str] = []
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            words.append(str(numbers[start]) if i - start == 1 else f"{numbers[start]}-{numbers[i - 1]}")
            start = i
    return ", ".join(words)


def layers_word(layers: list[int], num_layers: int) -> str:
    """The shortest `--layers` that selects these: "8:" for the last ones, else "0,3,6"."""
    if layers and layers == list(range(layers[0], num_layers)):
        return f"{layers[0]}:"
    return ",".join(map(str, layers))


def _bytes_per_clip(names: Collection[str], manifest: Manifest) -> int:
    """Bytes that one clip's rows of these arrays take."""
    backbone, frames = manifest.facts["backbone"], manifest.facts["request"]["frames"]
    dtype = manifest.facts["request"]["dtype"]
    width, tokens = backbone["width"], backbone["num_tokens"]
    sizes = {"cls": width} | dict.fromkeys(("tokens", "block_input", "q", "k"), tokens * width)
    sizes |= {"embed": backbone["embed_dim"], "maps": 2 * (tokens - 1) ** 2}
    sizes |= dict.fromkeys(("tokens_scale", "block_input_scale"), tokens)
    sizes |= dict.fromkeys(("q_scale", "k_scale"), tokens * backbone["num_heads"])
    kinds = [name.split("/")[0] for name in names]
    return sum((frames - (kind == "maps")) * _item_bytes(kind, dtype) * sizes[kind] for kind in kinds)


def _item_bytes(kind: str, dtype: str) -> int:
    if dtype == "int8" and kind in QUANTISED_KINDS:
        return 1
    return 4 if dtype == "float32" else 2


def extract_command(
    manifest: Manifest,
    *,
    layers: str,
    frames: int | None,
    store: StorePath | None,
    cross_frame: str,
    words: Mapping[str, Any],
) -> str:
    """The `vcache extract` line that makes or extends a store like this one; only what differs from the defaults is said.

    `words` come in the place of what the store's own request said, by the names of `request.recorded_request`.
    """
    request = {**manifest.facts["request"], **words}
    line = ["vcache", "extract", request["dataset"], "--layers", layers]
    asked = request if frames is None else {**request, "frames": frames}
    line += option_words(asked)
    line += [] if cross_frame == "qk" else ["--cross-frame", cross_frame]
    if request["split"] and store:  # without the word, it would take in splits that were left out on purpose
        line += ["--split", ",".join(group_parts(manifest.splits))]
    elif request["split"]:
        line += ["--split", request["split"]]
    return shlex.join(line + (["--store", str(store)] if store else []))


def option_words(request: Mapping[str, Any]) -> list[str]:
    """The options of `vcache extract` that a request stands for; only what differs from the defaults is said."""
    words: list[str] = []
    asked = {**request, "stride": None} if request["tsn"] else request  # TSN has no stride
    for name, default in _REQUEST_DEFAULTS.items():
        if asked.get(name) not in (default, None):  # an older store's request has fewer words
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if asked[name] is True else [flag, str(asked[name])]
    return words


def find_store(
    head: str,
    settings: Mapping[str, Any],
    train_split: str,
    *,
    num_views: int | None = None,
    check: Callable[[FeatureStore], None] = lambda store: None,
    extract_line: str = "vcache extract DATASET --layers -4:",
) -> FeatureStore:
    """The one store under `$VCACHE_HOME` that has the split to train on, in its views, and fits the head with these settings.

    `check` may refuse more stores with a HeadStoreMismatch; `extract_line` is what to run where there is no store at all.

    Raises:
        NoFittingStore: none is there, none fits (with the mending command of the nearest), or several do (with their paths).
    """
    fitting: list[FeatureStore] = []
    reasons: list[str] = []
    for path, store in open_stores(vcache_home()):
        if isinstance(store, StoreError):
            reasons.append(f"{path.name}: {store}")
            continue
        try:
            if train_split not in store.splits:
                raise HeadStoreMismatch(f"{path.name} has no split {train_split!r}.")
            check(store)
            requirements = get_head(head).requires(build_head_config(head, settings, store.manifest))
            views = {train_split: training_views(store.manifest, train_split, num_views)}
            match(head, requirements, store, store.splits, views=views)
            fitting.append(store)
        except HeadStoreMismatch as error:
            reasons.append(str(error))
        except (LayerError, StoreError) as error:  # one backbone that is too small must not hide the store that fits
            reasons.append(f"{path.name}: {error}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        paths = "\n".join(f"  --store {shlex.quote(str(store.path))}" for store in fitting)
        raise NoFittingStore(f"{len(fitting)} stores under {vcache_home()} fit head {head!r}. Say which:\n{paths}")
    if reasons:
        raise NoFittingStore(f"no store under {vcache_home()} fits head {head!r}:\n" + "\n".join(reasons))
    raise NoFittingStore(
        f"there is no store under {vcache_home()} yet. Make one with:  {extract_line}   or name one with --store PATH."
    )
