"""The `vcache extract` lines that errors end in, and words for the arrays that they add."""

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from vcache.extract.layers import NO_LAYERS, STEM, keeps_no_layer
from vcache.pipelines.derivation import STEM_ARRAY
from vcache.store.manifest import Manifest
from vcache.store.object_path import StorePath
from vcache.store.parts import group_parts
from vcache.store.quantise import QUANTISED_KINDS

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

_WITHOUT_LAYERS = {STEM_ARRAY: "the stem (what enters block 0)", "embed": "the embedding", "pixels": "pixels"}


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
    line += cross_frame_words(layers, cross_frame)
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


def cross_frame_words(layers: str, cross_frame: str) -> list[str]:
    """The option, unless it is what `vcache extract` does by itself with these --layers."""
    return [] if cross_frame == ("none" if keeps_no_layer(layers) else "qk") else ["--cross-frame", cross_frame]


def layers_word(layers: list[int], num_layers: int, *, stem: bool = False) -> str:
    """The shortest `--layers` of these: "8:" for the last ones, else "0,3,6"; with the stem "stem,8:"; "none" for none."""
    words = [STEM] if stem else []
    if layers and layers == list(range(layers[0], num_layers)):
        words.append(f"{layers[0]}:")
    else:
        words += map(str, layers)
    return ",".join(words) or NO_LAYERS


def describe_arrays(names: Collection[str]) -> str:
    """ "tokens of layers 8-11, Q/K of layers 8-11" of array names."""
    layers: dict[str, list[int]] = {}
    for name in names:
        kind, slash, layer = name.partition("/")
        if slash and name != STEM_ARRAY and kind != "k" and not kind.endswith("_scale"):
            layers.setdefault("Q/K" if kind == "q" else kind, []).append(int(layer))
    words = [f"{kind} of layers {_ranges(sorted(numbers))}" for kind, numbers in sorted(layers.items(), reverse=True)]
    words += [word for name, word in _WITHOUT_LAYERS.items() if name in names]
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


def bytes_per_clip(
    names: Collection[str], manifest: Manifest, dtype: str | None = None, *, num_pixel_frames: int = 0
) -> int:
    """Bytes that one clip's rows of these arrays take, in the store or as this dtype; pixels are bytes in any."""
    backbone, frames = manifest.facts["backbone"], manifest.facts["request"]["frames"]
    dtype = dtype or manifest.facts["request"]["dtype"]
    width, tokens = backbone["width"], backbone["num_tokens"]
    sizes = {"cls": width} | dict.fromkeys(("tokens", "block_input", "q", "k"), tokens * width)
    sizes |= {"embed": backbone["embed_dim"], "maps": 2 * (tokens - 1) ** 2}
    sizes |= dict.fromkeys(("tokens_scale", "block_input_scale"), tokens)
    sizes |= dict.fromkeys(("q_scale", "k_scale"), tokens * backbone["num_heads"])
    kinds = [name.split("/")[0] for name in names]
    by_frame = [kind for kind in kinds if kind != "pixels"]
    of_pixels = num_pixel_frames * 3 * backbone["image_size"] ** 2 if "pixels" in kinds else 0
    return of_pixels + sum((frames - (kind == "maps")) * _item_bytes(kind, dtype) * sizes[kind] for kind in by_frame)


def _item_bytes(kind: str, dtype: str) -> int:
    if dtype == "int8" and kind in QUANTISED_KINDS:
        return 1
    return 4 if dtype == "float32" else 2
