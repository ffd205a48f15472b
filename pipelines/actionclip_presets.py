"""The rows of ActionCLIP's tables (Wang et al. 2021) as presets; recipe and augmentation as in the official code (31c34df).

The first is row V1 of Table 5, both towers frozen, which is what a store of embeddings can reach. In every other row the paper
trains both towers, and its number is what frozen embeddings stay below. Where paper and code differ, a preset is what runs:

    templates   16, as coded; the paper says 18
    warm-up     5 epochs of 50, by both
    frames      the middles of equal segments, as the official validation has them

Not here, as they are no head on embeddings of CLIP's image tower: one classifier without text (Table 1), towers with random
weights (Table 2), Joint and Shift (Table 4), which are before and inside the tower, one tower trained (Table 5), ResNet-50 (Table
6), and heads and towers that were trained on Kinetics before (Table 9, figure 3, UCF101 and HMDB-51).
"""

from typing import Any

from vcache.pipelines.head_presets import HeadPreset

_B32, _B16 = "ViT-B-32-quickgelu", "ViT-B-16-quickgelu"

TRAINED_TOWERS = "The paper trains both towers, which are frozen here."
_SCALE_ALONE = f"{TRAINED_TOWERS} The mean has nothing to train, and the loss trains the scale of the cosines alone."


def _preset(
    name: str,
    top1: float,
    source: str,
    *,
    model: str = _B32,
    frames: int = 8,
    note: str = TRAINED_TOWERS,
    **fields: Any,
) -> HeadPreset:
    """`name` is what follows tower and frames; it may be empty."""
    return HeadPreset(
        name="-".join(filter(None, ("k400", "b32" if model == _B32 else "b16", f"{frames}f", name))),
        head="actionclip",
        source=source,
        dataset="k400",
        num_classes=400,
        model=model,
        frames=frames,
        eval_views=fields.pop("eval_views", "1x1"),
        augment="actionclip",
        top1=top1,
        note=note,
        **fields,
    )


PRESETS = (
    _preset("frozen", 72.21, "Table 5, V1", note="Both towers are frozen, as here."),
    _preset("", 78.36, "Tables 1 to 7", gmacs=35.4, millions=144.1),
    _preset("label", 77.82, "Table 3", settings={"templates": "label"}),
    *(
        _preset(
            name,
            top1,
            "Table 4",
            settings={"prompt": prompt},
            note=_SCALE_ALONE if prompt == "meanp" else TRAINED_TOWERS,
        )
        for name, prompt, top1 in (
            ("meanp", "meanp", 77.11),
            ("lstm", "lstm", 77.09),
            ("conv1d", "conv1d", 77.04),
            ("transf-cls", "transf_cls", 78.12),
        )
    ),
    *(
        _preset("", top1, "Tables 6, 7", model=_B16, frames=frames, gmacs=gmacs, millions=141.7)
        for frames, top1, gmacs in ((8, 81.09, 140.8), (16, 81.68, 281.6), (32, 82.32, 563.1))
    ),
    *(
        _preset("10x3", top1, "Table 8", model=_B16, frames=frames, eval_views="10x3")
        for frames, top1 in ((16, 82.6), (32, 83.8))
    ),
)
