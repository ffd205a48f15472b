"""`vcache zero-shot`: CLIP's embeddings of the videos of a store against the text of its classes, without any training.

    v = mean over the frames of CLIP's embeddings; of all views, where there are several
    embeddings       100 cos(v, mean of the normalised templates of the class)            CLIP's ensemble of prompts
    probabilities    mean over the templates of the softmax of 100 cos(v, class in that template)        ActionCLIP

The first is Text4Vis with TAP before its first step, the second ActionCLIP with MeanP, of which each view is classified by
itself: these heads are what is evaluated, so that the number stands beside those of trained ones.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vcache.heads.registry import get_head
from vcache.pipelines.class_text import clip_sets, how_to_add, set_encoders, stored_sets, text_constant
from vcache.pipelines.console import count
from vcache.pipelines.device import select_device
from vcache.pipelines.evaluation.class_choice import NAMED, ClassChoice
from vcache.pipelines.evaluation.evaluate import choose_split
from vcache.pipelines.evaluation.head_evaluation import Evaluation, evaluate_head
from vcache.pipelines.evaluation.saving import write_predictions
from vcache.pipelines.matching import build_head_config
from vcache.pipelines.stored_views import ViewGrid
from vcache.pipelines.targets import among_classes, targets_of
from vcache.pipelines.templates import TEMPLATE_SETS
from vcache.pipelines.zero_shot_classes import Candidates, read_candidates
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore

ENSEMBLES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "embeddings": ("text4vis", {"temporal": "tap"}),
    "probabilities": ("actionclip", {"prompt": "meanp"}),
}
"""What is made of several templates of a class, and the head that does it before it is trained."""


class ZeroShotError(ValueError):
    """Text that a store does not have, or that is not in the space of its videos."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """What `vcache zero-shot` is asked."""

    store: StorePath
    templates: tuple[str, ...] = ()
    """Sets of templates of the store; none: all that it has."""
    classes: Path | None = None
    """A file of names to tell apart (zero_shot_classes.py); None: the classes of the store."""
    split: str | None = None
    """None: the split to validate on."""
    views: ViewGrid | None = None
    """None: the largest grid that is complete."""
    ensemble: str = "embeddings"
    """One of ENSEMBLES."""
    half_classes: bool = False
    """Also tell halves of the classes apart."""
    device: str = "auto"
    batch_size: int = 256
    allow_incomplete: bool = False
    save: Path | None = None
    """Where the predictions are to go: checked before anything is compared, written by `save_zero_shot`."""
    model: str | None = None
    pretrained: str | None = None
    """Where the store's checkpoint lies, if it was moved: names beside the store's classes are encoded by it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroShotRow:
    """How good one set of templates is."""

    templates: str
    num_templates: int
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroShot:
    """One row for each set of templates, of the same videos and classes."""

    store: StorePath
    ensemble: str
    rows: tuple[ZeroShotRow, ...]


def zero_shot(
    config: ZeroShotConfig,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> ZeroShot:
    """Compare the videos of a split with text; `on_note` hears what the file of classes leaves out and adds.

    Raises:
        ZeroShotError: the store has no text, not these templates, or theirs is of another encoder; there is no such ensemble, or
            no such halves.
        ClassFileError: see `read_candidates`.
        TextMismatch, NoTextTower: names beside the store's classes cannot be encoded.
        RunError, HeadStoreMismatch, IncompleteSplit, HalfClassesError, ScoresError: see `evaluate_head`.
    """
    if config.ensemble not in ENSEMBLES:
        raise ZeroShotError(f"--ensemble {config.ensemble!r} is none of {', '.join(ENSEMBLES)}.")
    with FeatureStore.open(config.store) as store:
        sets = _sets(store, config.templates)
        if config.save is not None:
            _check_place(config.save, len(sets))
        split = choose_split(store, config.split)
        candidates = read_candidates(config.classes, store.manifest) if config.classes else Candidates()
        if candidates.others and config.half_classes:
            raise ZeroShotError(
                f"--half-classes draws halves of the classes of {store.manifest.dataset}, and {config.classes} names others: "
                f"{candidates.others[0]!r} is the first. Leave one of both out."
            )
        for note in _notes(config, store, split, candidates):
            on_note(note)
        others = _encoded(config, store, candidates.others, sets, on_stage)
        rows = []
        for name in sets:
            on_stage(f"comparing with {name}")
            evaluation = evaluate_untrained(
                store,
                candidates.choice(store.manifest, name, others.get(name)),
                split,
                ensemble=config.ensemble,
                views=config.views,
                half_classes=config.half_classes,
                device=select_device(config.device),
                batch_size=config.batch_size,
                allow_incomplete=config.allow_incomplete,
                on_note=on_note,
            )
            num_templates = store.constant(text_constant(name)).shape[1]
            rows.append(ZeroShotRow(templates=name, num_templates=num_templates, evaluation=evaluation))
        return ZeroShot(store=config.store, ensemble=config.ensemble, rows=tuple(rows))


def evaluate_untrained(
    store: FeatureStore, asked: ClassChoice, split: str, *, ensemble: str = "embeddings", **options: Any
) -> Evaluation:
    """CLIP on the classes and by the templates that are `asked`; `options` and errors are those of `evaluate_head`."""
    name, settings = ENSEMBLES[ensemble]
    head = get_head(name)
    config = build_head_config(name, {**settings, "templates": asked.templates}, store.manifest)
    return evaluate_head(
        head(config),
        store,
        name="zero-shot",
        requirements=head.requires(config),
        asked=asked,
        split=split,
        run=f"zero-shot {asked.templates}",
        **options,
    )


def save_zero_shot(found: ZeroShot, where: Path) -> tuple[Path, ...]:
    """Write the predictions of each set of templates, members for `vcache ensemble`; returns the npz files.

    Args:
        where: a file named *.npz, where there is one set, or a folder.

    Raises:
        ZeroShotError: one file is named for several sets.
    """
    _check_place(where, len(found.rows))
    files = [where if where.suffix == ".npz" else where / _file_name(found, row) for row in found.rows]
    return tuple(
        write_predictions(row.evaluation.predictions, file)[0] for row, file in zip(found.rows, files, strict=True)
    )


def _check_place(where: Path, num_sets: int) -> None:
    if where.suffix == ".npz" and num_sets > 1:
        raise ZeroShotError(
            f"--save {where}: one file cannot hold the predictions of {num_sets} sets of templates. Name a folder, or one set "
            "with --templates."
        )


def _file_name(found: ZeroShot, row: ZeroShotRow) -> str:
    predictions = row.evaluation.predictions
    ensemble = "" if found.ensemble == "embeddings" else f"-{found.ensemble}"
    named = "-named" if predictions.of_classes == NAMED else ""
    return f"zero-shot-{row.templates}{ensemble}-{predictions.split}-{predictions.views}{named}.npz"


def _sets(store: FeatureStore, asked: Sequence[str]) -> tuple[str, ...]:
    """The sets that are asked for, or all of the store that are of CLIP's text tower."""
    own = clip_sets(store.manifest)
    for name in asked:
        if name not in own:
            raise ZeroShotError(_without(store, name, own))
    if not own:
        raise ZeroShotError(
            f"{store.path} holds no text embeddings of its class names in the space of its videos. {how_to_add(store, 'label')}"
        )
    return tuple(dict.fromkeys(asked)) or own


def _without(store: FeatureStore, name: str, own: Sequence[str]) -> str:
    choose = f"It holds {', '.join(own)}: choose with --templates NAME" if own else "It holds none of CLIP's"
    if name in stored_sets(store.manifest):
        encoder = set_encoders(store.manifest)[name]["encoder"]
        return (
            f"--templates {name}: they are of the text encoder {encoder}, which knows nothing of videos: without training "
            f"there is nothing to compare. {choose}."
        )
    if name in TEMPLATE_SETS:
        return f"{store.path} holds no text of the templates {name!r}. {how_to_add(store, name)}"
    file = name if Path(name).is_file() else "FILE.txt"
    add = shlex.join(["vcache", "text", str(store.path), "--templates", file])
    after = f"  and name them {Path(file).stem}" if file == name else ""
    return f"{store.path} holds no text of the templates {name!r}. {choose}. Or add your own with:  {add}{after}"


def _notes(config: ZeroShotConfig, store: FeatureStore, split: str, candidates: Candidates) -> list[str]:
    """What the file of classes leaves out, and adds."""
    notes, names = [], store.manifest.class_names
    if candidates.places is not None:
        _, taken = among_classes(targets_of(store, split), candidates.places, any_of=True)
        left, num_left = len(names) - len(candidates.places), int((~taken).sum())
        videos, classes = count(num_left, "video"), "1 class" if left == 1 else f"{left} classes"
        notes.append(
            f"{videos} of the {classes} that {config.classes} does not name {'is' if num_left == 1 else 'are'} left out."
        )
    if candidates.others:
        told = ", ".join(candidates.others[:3]) + (", ..." if len(candidates.others) > 3 else "")
        notes.append(
            f"{count(len(candidates.others), 'name')} of {config.classes} beside the classes of {store.manifest.dataset}, which "
            f"videos can be taken for: {told}."
        )
    return notes


def _encoded(
    config: ZeroShotConfig,
    store: FeatureStore,
    names: Sequence[str],
    sets: Sequence[str],
    on_stage: Callable[[str], None],
) -> dict[str, Tensor]:
    """The text of the names beside the store's classes, by the set of templates."""
    if not names:
        return {}
    from vcache.pipelines.text_tower import tower_of_store  # loads open_clip, which takes seconds
    from vcache.pipelines.zero_shot_text import encode_others

    on_stage("loading the text tower")
    templates = [part for one in config.templates for part in ("--templates", one)]
    again = ["zero-shot", str(store.path), "--classes", str(config.classes), *templates]
    tower = tower_of_store(store, again, config.model, config.pretrained, config.device)
    on_stage("encoding the names")
    return {one: encode_others(store, tower, names, one) for one in sets}
