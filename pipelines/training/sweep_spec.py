"""What a sweep consists of: heads x grids x seeds -> members, each a training of its own with a name and a folder.

    heads    evl, grid depth=1,2 and temporal_conv=on,off       depth=1 temporal_conv=on seed=0
    seeds    0, 1                                               depth=1 temporal_conv=on seed=1
                                                                depth=1 temporal_conv=off seed=0   ... eight in all

Every value is text as `--set` takes it, from the command line and from a file alike: what a head makes of it is checked where it
is trained. Only names are checked here.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vcache.heads.registry import get_head
from vcache.heads.requirements import Recipe
from vcache.pipelines.settings import SettingError, build, split_settings
from vcache.pipelines.training.config import TrainingConfig
from vcache.store.object_path import store_path

_OWN_FIELDS = ("head", "settings", "out", "seed")
"""Of a training's configuration, what a sweep says in its own way."""

ONE_FOR_ALL = ("device", "resident", "checkpoint_minutes")
"""Of the machine, not of a head: may be set, and not varied."""

_Run = dataclasses.make_dataclass(
    "_Run", [(f.name, f.type) for f in dataclasses.fields(TrainingConfig) if f.name not in _OWN_FIELDS]
)

LONGEST_FOLDER = 150
"""Characters; file systems allow 255, and paths are pasted."""


@dataclass(frozen=True, kw_only=True)
class HeadGrid:
    """One head with what is the same for all its members (`settings`) and what is varied (`grid`), by name, as text."""

    head: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Fields of the head's Config, of its Recipe, or of the run (TrainingConfig)."""
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The last name varies fastest; seeds vary faster still."""
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class SweepMember:
    """One training of a sweep. `label` tells it from those of other settings, `name` from those of other seeds, too."""

    label: str
    name: str
    folder: str
    """Of the run, in the sweep's."""
    varied: Mapping[str, str]
    """What its settings differ in from those of other members."""
    config: TrainingConfig
    parameters: int | None = None
    """That are trained; None until the store is known."""

    def to_json(self) -> dict[str, Any]:
        """For sweep.json; `from_json` gives it back."""
        return {**vars(self), "varied": dict(self.varied), "config": self.config.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SweepMember":
        return cls(**{**values, "config": TrainingConfig.from_json(values["config"])})


def parse_grids(pairs: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """["depth=1,2", "layers=[8,9],-2:"] -> {"depth": ("1", "2"), "layers": ("8,9", "-2:")}.

    Raises:
        SettingError: not of the form name=a,b; a name or a value given twice; a bracket left open.
    """
    grids: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not values.strip():
            raise SettingError(f"--grid {pair!r} is not of the form name=a,b,c, as in --grid depth=1,2,4.")
        if name in grids:
            raise SettingError(f"--grid {name} is given twice. Give all its values at once: --grid {name}=a,b,c.")
        grids[name] = tuple(_split_values(name, values))
    return grids


def _split_values(name: str, text: str) -> list[str]:
    """At the commas that are in no bracket; the brackets around a value are left out."""
    if not re.fullmatch(r"([^][]|\[[^][]*\])*", text):
        raise SettingError(
            f"--grid {name}={text}: brackets do not match. Lists are written --grid {name}=[8,9],[10,11]."
        )
    values = [re.sub(r"^\[(.*)\]$", r"\1", part.strip()).strip() for part in re.split(r",(?![^[]*\])", text)]
    if "" in values:
        raise SettingError(f"--grid {name}={text}: a value is empty. Write `none` where no value is meant.")
    return values


def expand(blocks: Sequence[HeadGrid]) -> tuple[SweepMember, ...]:
    """The members, block after block: the product of the grid in its order, and of each choice all seeds.

    Raises:
        UnknownHead: names the nearest.
        SettingError: a name that head, recipe and run do not have (with the nearest); one that is set and varied; values or
            members that come twice; nothing to train.
    """
    for block in blocks:
        _check(block)
    _check_machine(blocks)
    rows = [
        (block.head, {**block.settings, **dict(zip(block.grid, choice, strict=True))}, seed)
        for block in blocks
        for choice in itertools.product(*block.grid.values())
        for seed in block.seeds
    ]
    if not rows:
        raise SettingError("a sweep needs a head and a seed; there is nothing to train.")
    names, num_heads, num_seeds = _varied_names(rows), len({row[0] for row in rows}), len({row[2] for row in rows})
    members: dict[str, SweepMember] = {}
    for head, settings, seed in rows:
        varied = {name: settings[name] for name in names if name in settings}
        member = _member(head, settings, varied, seed, with_head=num_heads > 1 or not names, with_seed=num_seeds > 1)
        if member.name in members:
            raise SettingError(f"the sweep has {member.name} twice. Leave one of them out.")
        members[member.name] = member
    return _with_own_folders(members.values())


def _check(block: HeadGrid) -> None:
    if both := [name for name in block.grid if name in block.settings]:
        name = both[0]
        raise SettingError(
            f"{name} is set to {block.settings[name]} and varied over {', '.join(block.grid[name])}. Do one of both."
        )
    if fixed := [name for name in block.grid if name in ONE_FOR_ALL]:
        raise SettingError(f"{fixed[0]} is the same for all heads of a sweep. Set it, do not vary it.")
    for name, values in {**block.grid, "seed": tuple(map(str, block.seeds))}.items():
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise SettingError(f"{name} is varied over {', '.join(values)}: {twice[0]} comes twice.")
    first = {name: values[0] for name, values in block.grid.items()}
    try:
        split_settings({**block.settings, **first}, get_head(block.head).Config, Recipe, _Run)
    except SettingError as error:
        raise SettingError(f"head {block.head!r}: {error}") from error


def _check_machine(blocks: Sequence[HeadGrid]) -> None:
    """What one head says of the machine would go for all that are trained beside it, or be lost."""
    for name in ONE_FOR_ALL:
        if len({block.settings.get(name) for block in blocks}) > 1:
            raise SettingError(f"{name} is the same for all heads of a sweep. Set it in [common], or for none.")


def _varied_names(rows: Sequence[tuple[str, Mapping[str, str], int]]) -> list[str]:
    """Settings in which members differ: two values of it, or members of one head with and without it."""
    names = dict.fromkeys(name for _, settings, _ in rows for name in settings)
    heads = {head: [settings for other, settings, _ in rows if other == head] for head, _, _ in rows}

    def varies(name: str) -> bool:
        values = {settings[name] for _, settings, _ in rows if name in settings}
        return len(values) > 1 or any(
            0 < sum(name in one for one in of_head) < len(of_head) for of_head in heads.values()
        )

    return [name for name in names if varies(name)]


def _member(
    head: str, settings: Mapping[str, str], varied: Mapping[str, str], seed: int, *, with_head: bool, with_seed: bool
) -> SweepMember:
    words = [f"{name}={value}" for name, value in varied.items()]
    seeds = [f"seed={seed}"] if with_seed else []
    label = " ".join([head] * with_head + words)
    folder = "-".join([head, *(_slug(name, value) for name, value in varied.items()), *([f"seed{seed}"] * with_seed)])
    own, recipe, run = split_settings(settings, get_head(head).Config, Recipe, _Run)
    store = {"store": store_path(run.pop("store"))} if "store" in run else {}  # may be a URL
    config = build(TrainingConfig, {"head": head, "settings": {**own, **recipe}, "seed": seed, **run, **store})
    return SweepMember(label=label, name=" ".join([label, *seeds]), folder=folder, varied=varied, config=config)


def _slug(name: str, value: str) -> str:
    """Part of a folder name: "depth1", "temporal_conv_on"."""
    safe = re.sub(r"[^A-Za-z0-9.+-]+", "_", value).strip("_") or "none"
    return f"{name}{safe}" if safe[0].isdigit() else f"{name}_{safe}"


def _with_own_folders(members: Iterable[SweepMember]) -> tuple[SweepMember, ...]:
    """What names lose in folders may make two alike, or end them: those have the place in the sweep behind them."""
    taken: set[str] = set()
    result = []
    for number, member in enumerate(members):
        folder = member.folder[:LONGEST_FOLDER]
        if folder in taken or folder != member.folder:
            folder = f"{folder}-{number}"
        taken.add(folder)
        result.append(dataclasses.replace(member, folder=folder))
    return tuple(result)
