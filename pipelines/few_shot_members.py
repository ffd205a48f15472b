"""What `vcache few-shot` trains: heads x grids x shots x seeds, where each seed draws other videos and other first weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vcache.pipelines.settings import SettingError
from vcache.pipelines.training.sweep_file import read_sweep
from vcache.pipelines.training.sweep_spec import SweepMember

ALL = "all"
NUM_SEEDS = 3

Shots = int | None
"""Videos of each class; None: all."""

_OWN = {
    "shots": "Say them with --shots.",
    "fraction": "Choose videos with --shots.",
    "data_seed": "Each seed draws its own videos.",
}
"""Settings of a training that few-shot says in its own way, and what to do instead."""


def parse_shots(text: str) -> tuple[Shots, ...]:
    """ "5,1,all" -> (1, 5, None), in the order of the table.

    Raises:
        SettingError: a part is neither a number of 1 or more nor "all", or comes twice.
    """
    words = [word.strip().lower() for word in text.split(",")]
    for word in words:
        if word != ALL and not (word.isdecimal() and int(word)):
            hint = " Zero-shot stands beside the others unasked." if word == "0" else ""
            raise SettingError(
                f"--shots {text}: {word!r} is no number of videos, nor {ALL}, as in --shots 1,3,5,all.{hint}"
            )
    shots = sorted({int(word) for word in words if word != ALL}) + ([None] if ALL in words else [])
    if len(shots) < len(words):
        raise SettingError(f"--shots {text}: a number comes twice.")
    return tuple(shots)


def shots_word(shots: Shots) -> str:
    """As `parse_shots` takes it."""
    return ALL if shots is None else str(shots)


def few_shot_members(
    heads: str,
    settings: Mapping[str, str],
    grid: Mapping[str, tuple[str, ...]],
    shots: Sequence[Shots],
    num_seeds: int | None = None,
) -> tuple[SweepMember, ...]:
    """The members of a command: of a head, or of a .toml file as a sweep reads it. Of one setting the videos of few shots are
    among those of more, seed by seed.

    Raises:
        UnknownHead, SettingError: see `read_sweep`; or settings that say which videos there are.
    """
    _refuse_own({**settings, **grid}, "is what few-shot varies itself")
    if num_seeds is None and not heads.endswith(".toml") and "seed" not in {**settings, **grid}:
        num_seeds = NUM_SEEDS
    words = tuple("none" if one is None else str(one) for one in shots)
    members = read_sweep(heads, settings, {**grid, "shots": words}, num_seeds)
    for member in members:
        said = {"fraction": member.config.fraction, "data_seed": member.config.data_seed}
        _refuse_own({name: value for name, value in said.items() if value}, f"is said in {heads}")
    return tuple(map(_drawn_by_seed, members))


def _refuse_own(said: Mapping[str, object], why: str) -> None:
    if own := [name for name in _OWN if name in said]:
        raise SettingError(f"{own[0]} {why}. {_OWN[own[0]]}")


def _drawn_by_seed(member: SweepMember) -> SweepMember:
    """Its videos are those of its seed; all videos are called so, and not "none"."""
    member = replace(member, config=replace(member.config, data_seed=member.config.seed))
    if member.config.shots is not None or "shots" not in member.varied:
        return member
    return replace(
        member,
        label=member.label.replace("shots=none", f"shots={ALL}"),
        name=member.name.replace("shots=none", f"shots={ALL}"),
        folder=member.folder.replace("shots_none", f"shots_{ALL}"),
        varied={**member.varied, "shots": ALL},
    )


def variant_of(member: SweepMember) -> dict[str, str]:
    """What it varies beside the shots: members of one variant are a row of the table and a line of the chart."""
    return {name: value for name, value in member.varied.items() if name != "shots"}
