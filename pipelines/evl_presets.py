"""The rows of EVL's tables (Lin et al. 2022) as presets; recipe and views as in its appendix A, or B for UCF101 and HMDB51.

Where paper and official code (b282e8b) differ, a preset is what the paper's row counts or says, and its note names the other:

    T-CA      the paper's parameters and FLOPs of ViT-B/16 on Kinetics leave it out, those of ViT-L/14 and of
              Something-Something have it; the released scripts leave it on everywhere
    flip      the paper names one, the code has none: `--augment evl` is the code, `--augment evl-flip` the paper
    views     the paper evaluates Kinetics with 3x1; the released scripts of 16 and 32 frames with 1x3
    query     zero, as the code; `--set query_init=normal` is what a method that it never calls would draw
"""

from typing import Any

from vcache.pipelines.head_presets import HeadPreset

_B16, _L14, _L14_336 = "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"
_NO_TCA = {"temporal_cross_attention": False}
_STRIDES = {8: 16, 16: 16, 32: 8}

_COUNTED_WITHOUT = "T-CA is off, as the paper counts; the released scripts leave it on (k400-b16-8f-tca)."
_SCRIPT_VIEWS = "The released scripts of 16 and 32 frames are evaluated with 1x3 views."
_LAST_LAYERS = "The paper does not name the layers; the last ones are taken."
_UNREACHED = "The paper's 18,196 GMACs cannot be reached: the backbone alone takes 18,332."
_FINE_TUNED = (
    "The paper goes on from its Kinetics head, with a tenth of the learning rate and decay for it; a run starts anew, so "
    "this accuracy is not to be expected. Accuracy is the mean of three splits; this is the first."
)


def _kinetics(name: str, source: str, frames: int = 8, model: str = _B16, **fields: Any) -> HeadPreset:
    return HeadPreset(
        name=name,
        head="evl",
        source=source,
        dataset="k400",
        num_classes=400,
        model=model,
        frames=frames,
        stride=_STRIDES[frames],
        eval_views="3x1",
        augment="evl",
        **fields,
    )


def _something(name: str, source: str, frames: int = 8, model: str = _B16, **fields: Any) -> HeadPreset:
    depth = 12 if model == _B16 else 24
    return HeadPreset(
        name=name,
        head="evl",
        source=source,
        dataset="ssv2",
        num_classes=174,
        model=model,
        frames=frames,
        eval_views="1x3",
        augment="evl",
        settings={"layers": tuple(range(-depth, 0)), **fields.pop("settings", {})},
        recipe={"steps": 30_000},
        **fields,
    )


def _small(dataset: str, num_classes: int, model: str, steps: int, top1: float) -> HeadPreset:
    size = "l14-336" if model == _L14_336 else "l14"
    return HeadPreset(
        name=f"{dataset}-{size}-32f",
        head="evl",
        source="Table 12",
        dataset=dataset,
        num_classes=num_classes,
        model=model,
        frames=32,
        stride=2,
        eval_views="2x3",
        augment="evl",
        recipe={"steps": steps},
        top1=top1,
        note=_FINE_TUNED,
    )


def _last(depth: int) -> dict[str, Any]:
    return {"layers": tuple(range(-depth, 0))}


def _modules(conv: bool, positions: bool, tca: bool) -> dict[str, bool]:
    return {"temporal_conv": conv, "temporal_pos_embed": positions, "temporal_cross_attention": tca}


_MAIN = (
    _kinetics(
        "k400-b16-8f", "Tables 1, 2", top1=82.9, gmacs=444, millions=28.70, settings=_NO_TCA, note=_COUNTED_WITHOUT
    ),
    _kinetics(
        "k400-b16-16f",
        "Table 1",
        16,
        top1=83.6,
        gmacs=888,
        settings=_NO_TCA,
        note=f"{_COUNTED_WITHOUT} {_SCRIPT_VIEWS}",
    ),
    _kinetics(
        "k400-b16-32f",
        "Tables 1, 2",
        32,
        top1=84.2,
        gmacs=1777,
        millions=28.78,
        settings=_NO_TCA,
        note=f"{_COUNTED_WITHOUT} {_SCRIPT_VIEWS}",
    ),
    _kinetics("k400-l14-8f", "Table 1", 8, _L14, top1=86.3, gmacs=2022),
    _kinetics("k400-l14-16f", "Table 1", 16, _L14, top1=87.0, gmacs=4044, note=_SCRIPT_VIEWS),
    _kinetics("k400-l14-32f", "Table 1", 32, _L14, top1=87.3, gmacs=8088, note=_SCRIPT_VIEWS),
    _kinetics("k400-l14-336-32f", "Table 1", 32, _L14_336, top1=87.7, gmacs=18196, note=_UNREACHED),
    _kinetics("k400-b16-8f-tca", "Tables 3, 8a; released script", top1=82.9, gmacs=454),
)

_KINETICS_ABLATIONS = (
    _kinetics("k400-b16-8f-1layer", "Tables 2, 6a", top1=81.1, millions=7.41, settings={**_last(1), **_NO_TCA}),
    *(
        _kinetics(f"k400-b16-8f-{depth}layers", "Table 6a", top1=top1, settings={**_last(depth), **_NO_TCA})
        for depth, top1 in ((2, 82.1), (3, 82.6), (5, 83.0))
    ),
    *(
        _kinetics(
            f"k400-b16-8f-features-{''.join(str(-layer) for layer in layers)}",
            "Table 6b",
            top1=top1,
            settings={"layers": layers, **_NO_TCA},
        )
        for layers, top1 in (
            ((-2, -2, -1, -1), 82.7),
            ((-1, -1, -1, -1), 82.1),
            ((-2, -1, -2, -1), 82.4),
            ((-7, -5, -3, -1), 82.0),
        )
    ),
    _kinetics("k400-b16-8f-cls", "Table 6c, temporal only, token", top1=79.8, settings={"pooling": "cls", **_NO_TCA}),
    *(
        _kinetics(f"k400-b16-8f-{name}", f"Table 6c, {row}", top1=top1, settings={"pooling": pooling, **_NO_TCA})
        for name, pooling, row, top1 in (
            ("spatial-mean", "spatial_mean", "temporal only, avg", 75.8),
            ("temporal-mean", "temporal_mean", "spatial only, avg", 80.1),
        )
    ),
)

_TABLE_8A = (
    ("none", _modules(False, False, False), 82.5, 47.2),
    ("conv", _modules(True, False, False), 82.9, 57.1),
    ("pe", _modules(False, True, False), 82.5, 58.5),
    ("tca-only", _modules(False, False, True), 82.6, 59.5),
    ("conv-pe", _modules(True, True, False), 82.9, 59.4),
    ("conv-tca", _modules(True, False, True), 82.7, 60.0),
    ("pe-tca", _modules(False, True, True), 82.7, 60.7),
)
"""All three together are k400-b16-8f-tca and ssv2-b16-8f."""

_TEMPORAL_MODULES = (
    *(
        _kinetics(f"k400-b16-8f-{name}", "Table 8a", top1=kinetics, settings=modules)
        for name, modules, kinetics, _ in _TABLE_8A
    ),
    *(
        _something(f"ssv2-b16-8f-{name}", "Table 8a", top1=something, settings=modules)
        for name, modules, _, something in _TABLE_8A
    ),
)

_SOMETHING = (
    _something("ssv2-b16-8f", "Tables 8, 9", top1=61.0, gmacs=512),
    _something("ssv2-b16-16f", "Table 9", 16, top1=61.7, gmacs=1023),
    _something("ssv2-b16-32f", "Table 9", 32, top1=62.4, gmacs=2047),
    _something("ssv2-l14-8f", "Table 9", 8, _L14, top1=65.1, gmacs=2411),
    _something("ssv2-l14-32f", "Table 9", 32, _L14, top1=66.7, gmacs=9641),
    _something("ssv2-l14-336-32f", "Table 9", 32, _L14_336, top1=68.0, gmacs=24259),
    *(
        _something(f"ssv2-b16-8f-{depth}layers", "Table 8b", top1=top1, settings=_last(depth), note=_LAST_LAYERS)
        for depth, top1 in ((4, 58.6), (6, 60.1), (8, 60.2), (10, 60.5))
    ),
)

_SMALL = (
    _small("ucf101", 101, _L14, 600, 98.5),
    _small("ucf101", 101, _L14_336, 1000, 98.6),
    _small("hmdb51", 51, _L14, 600, 83.6),
    _small("hmdb51", 51, _L14_336, 1000, 83.2),
)

PRESETS = (*_MAIN, *_SOMETHING, *_KINETICS_ABLATIONS, *_TEMPORAL_MODULES, *_SMALL)
