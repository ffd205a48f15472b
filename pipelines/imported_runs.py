"""Which stores an imported head can be evaluated on. It was trained on features that nobody recorded, so there is no key to
compare: what its config says is checked, and what it cannot say is told as a note."""

import shlex

import torch
from jaxtyping import Int
from torch import Tensor

from vcache.pipelines.class_text import LOGIT_SCALE, text_facts
from vcache.pipelines.matching import pixel_statistics
from vcache.pipelines.runs import Run, RunError
from vcache.store.object_path import StorePath
from vcache.store.reader import FeatureStore


def open_named_store(run: Run, path: StorePath | None, *, any_classes: bool = False) -> FeatureStore:
    """The store at `path`, if the imported head fits its sizes and, unless it may have `any_classes`, its classes.

    Layers and frames are for `match` to check.

    Raises:
        RunError: no path, nothing there, a store of another backbone or other classes, or one with features of other weights than
            those that were trained along with the head.
    """
    if path is None:
        raise RunError(
            f"{run.path} was imported, so it has no store of its own. Name one with --store; what it reads is made with:  "
            f"{run.config['imported']['extract']}"
        )
    if not path.exists():
        raise RunError(f"--store {path} is not there. What {run.path} reads is made with:  {_extract(run)}")
    store = FeatureStore.open(path)
    try:
        _check_sizes(run, store)
        _check_towers(run, store)
        if not any_classes:
            _check_classes(run, store)
    except RunError:
        store.close()
        raise
    return store


def classifies_by_text(run: Run) -> bool:
    """Whether the head is given the text of the classes, and takes any."""
    return run.requirements().text is not None


def class_order(run: Run, store: FeatureStore) -> Int[Tensor, " K"]:
    """Where the store's classes are among the head's: `logits[:, order]` are in the order of the store's labels.

    0, 1, 2, ... but for an imported head with the same names in another order. One that classifies by text is given the store's,
    in the store's order.
    """
    names = store.manifest.class_names
    if not run.imported or not run.has_class_names or classifies_by_text(run) or run.class_names() == names:
        return torch.arange(len(names))
    place = {name: index for index, name in enumerate(run.class_names())}
    return torch.tensor([place[name] for name in names])


def notes_on_store(run: Run, store: FeatureStore, *, any_classes: bool = False) -> tuple[str, ...]:
    """What no check can hold against the store and a reader of the accuracies should know, a sentence each; of our own runs
    nothing. With `any_classes` others are told apart than those that the head was trained on."""
    if not run.imported:
        return ()
    if _has_own_tower(run):
        return (*_notes_on_frames(store), *_notes_on_classes(run, store))
    notes = _notes_on_backbone(run, store)
    head = run.config["head_config"]
    if "pixel_mean" in head and any(
        tuple(head[name]) != told for name, told in pixel_statistics(store.manifest).items()
    ):
        notes.append(
            "its frames were normalised by other means and deviations than the head normalises their pixels by, which are CLIP's."
        )
    official = run.config["imported"].get("precision", "float16")
    if (precision := store.manifest.spec.get("precision", "float32")) != official:
        notes.append(
            f"its backbone ran in {precision}, the official one in {official}: logits differ by their rounding, and a video "
            "between two classes may change sides."
        )
    by_text = classifies_by_text(run)
    return (*notes, *(_notes_on_text(run, store, any_classes) if by_text else _notes_on_classes(run, store)))


def _notes_on_backbone(run: Run, store: FeatureStore) -> list[str]:
    """Whether its features are those that the head was trained on, as far as the checkpoint tells."""
    ours, request = run.config["imported"].get("visual_sha256"), store.manifest.facts["request"]
    if ours is not None:
        theirs = store.manifest.spec["weights_sha256"]
        if ours == theirs:
            return []
        return [
            f"the checkpoint has the weights of the image tower that it was trained on (sha256 {ours[:12]}), and "
            f"{store.path.name} was made with others ({theirs[:12]}): the accuracies say nothing of the checkpoint."
        ]
    if request.get("pretrained") == "openai":
        return []
    source = request.get("pretrained") or request.get("model") or "weights that it does not name"
    return [
        f"the checkpoint was trained on features of OpenAI's CLIP, and {store.path.name} has those of {source}: unless "
        "these are the same weights, the accuracies say nothing of the checkpoint."
    ]


def _notes_on_frames(store: FeatureStore) -> list[str]:
    """Of a head that sees pixels as they were stored, and was trained on frames in their own proportions."""
    if store.manifest.spec["preprocessing"].get("resize_mode") != "squash":
        return []
    return [
        f"{store.path.name} has whole frames made square, as its backbone is shown them; the checkpoint was trained on squares "
        "cut out of frames, and its accuracy may be lower on these."
    ]


def _notes_on_classes(run: Run, store: FeatureStore) -> list[str]:
    if not run.has_class_names:
        return [
            f"the checkpoint came without class names: its {len(store.manifest.class_names)} outputs are taken for the "
            f"classes of {store.manifest.dataset} in their order. Import it with --classes FILE to have that checked."
        ]
    if run.class_names() != store.manifest.class_names:
        return ["the checkpoint has the store's classes in another order; its outputs were put in that of the store."]
    return []


def _notes_on_text(run: Run, store: FeatureStore, any_classes: bool) -> list[str]:
    notes = []
    scale = run.config["imported"].get("logit_scale")
    if scale is not None and LOGIT_SCALE in store.manifest.constants:
        stored = float(store.constant(LOGIT_SCALE)[0])
        if abs(scale - stored) > 1e-3:
            notes.append(
                f"the logit scale of the checkpoint is {scale:.4f}, that of {store.path.name}'s CLIP {stored:.4f}, which is "
                "taken: averages over views may differ a little."
            )
    if not run.has_class_names:
        notes.append(
            f"the checkpoint does not tell its classes: videos are compared with the text of the "
            f"{len(store.manifest.class_names)} classes of {store.manifest.dataset}, whether it was trained on these or not."
        )
    elif strange := len(set(store.manifest.class_names) - set(run.class_names())):
        notes.append(
            f"{strange} of the {len(store.manifest.class_names)} classes of {store.manifest.dataset} are not among the "
            f"{len(run.class_names())} that the checkpoint was trained on: "
            + (
                "it recognises them by their text alone (zero-shot)."
                if any_classes
                else "their videos are left out (--classes all takes them, too)."
            )
        )
    return notes


def _has_own_tower(run: Run) -> bool:
    """Whether it reads pixels alone and runs a whole image tower on them, which it keeps: nothing of the store's counts."""
    return bool(run.config["imported"].get("own_tower"))


def _check_sizes(run: Run, store: FeatureStore) -> None:
    head, backbone = run.config["head_config"], store.manifest.facts["backbone"]
    if _has_own_tower(run):
        side, patch_size = int(backbone["image_size"]), int(head["patch_size"])
        if [side // patch_size] * 2 != list(head["grid"]):
            raise RunError(
                f"{run.path} reads frames of {_word(head['grid'])} patches of {patch_size} pixels; {store.path} holds frames of "
                f"{side} x {side}. What it reads is made with:  {_extract(run)}"
            )
        return
    for name in ("width", "grid", "num_layers", "patch_size", "embed_dim"):
        if name in head and list(_pair(head[name])) != list(_pair(backbone[name])):
            raise RunError(
                f"{run.path} reads features of {name} {_word(head[name])}; {store.path} holds those of {backbone['model']}, "
                f"with {_word(backbone[name])}. What it reads is made with:  {_extract(run)}"
            )
    if "num_heads" in head and head["num_heads"] != backbone["num_heads"] and "num_heads" not in _settings(run):
        raise RunError(
            f"{run.path} is taken to have num_heads={head['num_heads']}, one for 64 channels as CLIP has, as no checkpoint says "
            f"it; the backbone of {store.path} has {backbone['num_heads']}. Import it again with "
            f"--set num_heads={backbone['num_heads']}, or with --set num_heads={head['num_heads']} if that is right."
        )


def _check_towers(run: Run, store: FeatureStore) -> None:
    """What was trained along with a head makes the features that it reads, and nothing else does."""
    imported = run.config["imported"]
    if "trained_along" not in imported:
        return
    told = {
        "visual": store.manifest.spec["weights_sha256"],
        "text": text_facts(store.manifest).get("weights_sha256"),
    }
    for tower, what in imported["trained_along"].items():
        ours, theirs = imported[f"{tower}_sha256"], told[tower]
        if theirs is not None and ours != theirs:
            raise RunError(
                f"{run.path} reads what the {what} in its checkpoint makes, which was trained along with it (weights "
                f"{ours[:12]}); {store.path} was made with others ({theirs[:12]}), of which the head says nothing that counts. "
                f"What it reads is made with:  {_extract(run)}\nA head for frozen towers is trained with:  "
                f"{shlex.join(['vcache', 'train-head', run.head, '--store', str(store.path)])}"
            )


def _check_classes(run: Run, store: FeatureStore) -> None:
    ours, by_text = store.manifest.class_names, classifies_by_text(run)  # by text it is given as many as there are
    num_classes = run.config["head_config"]["num_classes"]
    if num_classes != len(ours) and not by_text:
        raise RunError(f"{run.path} has {num_classes} classes; {store.path} holds {_classes(store)}.")
    if not run.has_class_names or run.class_names() == ours:
        return
    names = run.class_names()
    if strange := [name for name in names if name not in set(ours)]:
        mend = ", or ask for all classes of this one, by their text, with --classes all" if by_text else ""
        raise RunError(
            f"{run.path} has other classes than {store.path}, which holds {_classes(store)}: {strange[0]!r} and "
            f"{len(strange) - 1} more are not among them. Name a store with the classes of the run{mend}."
        )


def _classes(store: FeatureStore) -> str:
    return f"{store.manifest.dataset} with {len(store.manifest.class_names)}"


def _pair(size: object) -> tuple[object, ...]:
    return tuple(size) if isinstance(size, list | tuple) else (size,)


def _word(size: object) -> str:
    return "x".join(map(str, _pair(size)))


def _settings(run: Run) -> dict[str, str]:
    return dict(run.config["imported"]["settings"])


def _extract(run: Run) -> str:
    return str(run.config["imported"]["extract"])
