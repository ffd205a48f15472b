"""EVL's Table 8 as settings of the demo's runs, with the paper's own numbers beside them.

Lin et al. 2022, "Frozen CLIP Models are Efficient Video Learners", Tables 8a, 8b and 6a: ViT-B/16, 8 frames, top-1 in percent.
"""

from dataclasses import dataclass
from typing import Any

# Fields of EVL's Config, and what the paper calls them.
MODULES = {"temporal_conv": "T-Conv", "temporal_pos_embed": "T-PE", "temporal_cross_attention": "T-CA"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """EVL with some of its temporal modules on the last `depth` layers of the backbone."""

    temporal_conv: bool = True
    temporal_pos_embed: bool = True
    temporal_cross_attention: bool = True
    depth: int = 4

    @property
    def settings(self) -> dict[str, Any]:
        """As for `TrainingConfig.settings`."""
        return {**{name: getattr(self, name) for name in MODULES}, "layers": tuple(range(-self.depth, 0))}

    @property
    def label(self) -> str:
        """ "T-Conv + T-CA"; "all modules, depth 2"."""
        on = [word for name, word in MODULES.items() if getattr(self, name)]
        modules = "all modules" if len(on) == len(MODULES) else " + ".join(on) or "no temporal module"
        return modules if self.depth == 4 else f"{modules}, depth {self.depth}"

    @property
    def slug(self) -> str:
        """ "evl-conv_on-pe_off-ca_on-depth4", the start of a folder's name."""
        words = [
            f"{word.removeprefix('T-').lower()}_{'on' if getattr(self, name) else 'off'}"
            for name, word in MODULES.items()
        ]
        return "-".join(["evl", *words, f"depth{self.depth}"])


@dataclass(frozen=True)
class PaperRow:
    """A row of one of the two tables. None: the paper does not have it."""

    variant: Variant
    k400: float | None
    ssv2: float | None


def _modules(conv: bool, pos_embed: bool, cross_attention: bool) -> Variant:
    return Variant(temporal_conv=conv, temporal_pos_embed=pos_embed, temporal_cross_attention=cross_attention)


TABLE_8A = (
    PaperRow(_modules(False, False, False), 82.5, 47.2),
    PaperRow(_modules(True, False, False), 82.9, 57.1),
    PaperRow(_modules(False, True, False), 82.5, 58.5),
    PaperRow(_modules(False, False, True), 82.6, 59.5),
    PaperRow(_modules(True, True, False), 82.9, 59.4),
    PaperRow(_modules(True, False, True), 82.7, 60.0),
    PaperRow(_modules(False, True, True), 82.7, 60.7),
    PaperRow(_modules(True, True, True), 82.9, 61.0),
)

# K-400 is Table 6a: 8b has Something-Something V2 alone, from depth 4 on.
TABLE_8B = (
    PaperRow(Variant(depth=1), 81.1, None),
    PaperRow(Variant(depth=2), 82.1, None),
    PaperRow(Variant(depth=3), 82.6, None),
    PaperRow(Variant(depth=4), 82.9, 58.6),
)
PAPER_DEEPER = {6: 60.1, 8: 60.2, 10: 60.5, 12: 61.0}
"""The rest of Table 8b, depth -> SSv2: the tiny CLIP has four blocks where ViT-B/16 has twelve."""

TABLES = {"8a": TABLE_8A, "8b": TABLE_8B}
VARIANTS = tuple(dict.fromkeys(row.variant for table in TABLES.values() for row in table))
"""What has to be trained, each once: all modules at depth 4 are a row of both tables."""
