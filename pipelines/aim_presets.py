"""The rows of AIM's tables (Yang et al. 2023) as presets; recipe, sampling and views as in appendix A and the official configs.

Blocks below the lowest adapter are in the store. All twelve adapted read what enters the first block (`--layers stem`), the top
six the output of layer 5. Where paper and official code (b3580d2) differ, a preset is what runs, and here is the other:

    embedding  the temporal embedding is added at the cut; in paper and code it is before ln_pre, below every cut
    warm-up    2.5 epochs, as coded; the paper says 3
    scale      1 on Something-Something, as coded; the paper says 0.5 everywhere
    adapters   2 T-adapters with ViT-L on Something-Something, as the paper counts (50 M); the config has 1 (38.0 M)
    ViT-L      on Kinetics-400 and Something-Something a tenth of the rate for all but the classifier, as coded, and by the same
               entry of the config decay for ln_post; on Kinetics-700 and Diving-48 neither, as coded
    views      1x1 on Diving-48, as the paper and the official README say; the config of ViT-B takes three crops

Not here, as they are not CLIP's: the rows on ImageNet-21k of Tables 1, 6 and 10, those with Swin, and full fine-tuning. Of the
rows of Table 1 that add one adapter after the other there is the configuration, and the accuracy, ImageNet-21k's, in the note.
"""

from typing import Any

from vcache.pipelines.clip_towers import CLIP_TOWERS
from vcache.pipelines.head_presets import OURS, HeadPreset

_B16, _L14 = "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"
_CLASSES = {"k400": 400, "k700": 700, "ssv2": 174, "diving48": 48}
_STRIDES = {8: 16, 16: 8, 32: 4}
_VIEWS = {"k400": "3x1", "k700": "3x3", "ssv2": "1x3", "diving48": "1x1"}
_SLOW_TOWER: dict[str, Any] = {"lr_multipliers": (("classifier.*", 1.0), ("*", 0.1)), "no_decay": ()}

_README = "GFLOPs and views are of the official README; the paper has none for this dataset."
_JITTER = "The official config has colour noise besides, which --augment aim leaves out."
_IN21K = "The paper has this row on ImageNet-21k alone, with {}%."
_TOP = "Temporal embedding at the cut, above the frozen half; in the paper it is below all blocks."
_BOTTOM = "All blocks are run: gradients of the adapters below go through the frozen half above."


def _preset(
    dataset: str, source: str, variant: str = "", *, frames: int = 8, model: str = _B16, **fields: Any
) -> HeadPreset:
    size, is_kinetics = "b16" if model == _B16 else "l14", dataset in ("k400", "k700")
    settings, recipe = _of_dataset(dataset, model)
    return HeadPreset(
        name=f"{dataset}-{size}-{frames}f{f'-{variant}' if variant else ''}",
        head="aim",
        source=source,
        settings={"blocks": CLIP_TOWERS[model].num_layers, **settings, **fields.pop("settings", {})},
        recipe=recipe,
        dataset=dataset,
        num_classes=_CLASSES[dataset],
        model=model,
        frames=frames,
        stride=_STRIDES[frames] if is_kinetics else None,
        eval_views=_VIEWS[dataset],
        augment="aim",
        **fields,
    )


def _of_dataset(dataset: str, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and recipe that all rows of a dataset have."""
    slow = _SLOW_TOWER if model == _L14 and dataset in ("k400", "ssv2") else {}
    if dataset == "ssv2":
        return {"temporal_adapters": 2, "adapter_scale": 1.0}, {"epochs": 50, "label_smoothing": 0.1, **slow}
    return {}, {"epochs": 50} if dataset == "diving48" else dict(slow)


# Frames, top-1, GMACs of all views, millions of trained parameters.
_TABLES = {
    ("k400", _B16): ("Table 2", ((8, 83.9, 606, 11.0), (16, 84.5, 1214, 11.0), (32, 84.7, 2428, 11.0))),
    ("k400", _L14): ("Table 2", ((8, 86.8, 2802, 38.0), (16, 87.3, 5604, 38.0), (32, 87.5, 11208, 38.0))),
    ("ssv2", _B16): ("Table 3", ((8, 66.4, 624, 14.3), (16, 68.1, 1248, 14.0), (32, 69.1, 2496, 14.0))),
    ("ssv2", _L14): ("Table 3", ((8, 67.6, 2877, 50.0), (16, 69.4, 5754, 50.0), (32, 70.6, 11508, 50.0))),
    ("k700", _B16): ("Table 4", ((32, 76.9, 7284, 11.0),)),
    ("k700", _L14): ("Table 4", ((32, 80.4, 33624, 38.0),)),
    ("diving48", _B16): ("Table 5", ((32, 88.9, 809, 11.0),)),
    ("diving48", _L14): ("Table 5", ((32, 90.6, 3736, 38.0),)),
}
_MORE_TABLES = {("k400", _B16, 8): "Tables 2, 6, 7, 8", ("ssv2", _B16, 8): "Tables 1, 3"}


def _note(dataset: str, model: str) -> str:
    if dataset in ("k700", "diving48"):
        return _README
    return _JITTER if (dataset, model) == ("k400", _L14) else ""


_MAIN = tuple(
    _preset(
        dataset,
        _MORE_TABLES.get((dataset, model, frames), table),
        frames=frames,
        model=model,
        top1=top1,
        gmacs=gmacs,
        millions=millions,
        note=_note(dataset, model),
    )
    for (dataset, model), (table, rows) in _TABLES.items()
    for frames, top1, gmacs, millions in rows
)

_COMPONENTS = (
    _preset(
        "ssv2",
        "Table 1",
        "spatial",
        settings={"temporal": False, "joint": False},
        millions=3.7,
        note=_IN21K.format(36.7),
    ),
    _preset("ssv2", "Table 1", "spatial-temporal", settings={"joint": False}, millions=10.8, note=_IN21K.format(61.2)),
)

_POSITIONS = (
    _preset("k400", "Table 7", "top6", settings={"blocks": 6}, top1=83.3, millions=5.6, note=_TOP),
    _preset("k400", "Table 7", "bottom6", settings={"positions": "lower_half"}, top1=80.7, millions=5.6, note=_BOTTOM),
    _preset(
        "k400",
        "Table 7",
        "skip",
        settings={"blocks": 11, "positions": "every_second"},
        top1=83.2,
        millions=5.6,
        note="Which every second block is not said: here the last one and downwards. The first has none and is in the store.",
    ),
)

_RATIOS = tuple(
    _preset("k400", "Table 8", name, settings={"bottleneck": ratio}, top1=top1, millions=millions)
    for name, ratio, top1, millions in (
        ("sixteenth", 0.0625, 83.3, 3.0),
        ("eighth", 0.125, 83.4, 5.6),
        ("half", 0.5, 83.8, 21.0),
    )
)

_OURS = (
    *(_preset("k400", OURS, f"top{blocks}", settings={"blocks": blocks}) for blocks in (1, 2, 3)),
    _preset("ssv2", OURS, "top6", settings={"blocks": 6}),
    _preset("k400", OURS, "top12", model=_L14, settings={"blocks": 12}),
)

PRESETS = (*_MAIN, *_COMPONENTS, *_POSITIONS, *_RATIOS, *_OURS)
