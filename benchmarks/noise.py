"""A store of noise of any size that heads can be trained from: 8-frame clips of ViT-B/16, 400 classes."""

from collections.abc import Sequence
from pathlib import Path

from reader import SPECS, D, E, T, make_store  # the scripts beside this one
from scale import FACTS

from vcache.store.layout import ArraySpec

NUM_CLASSES = 400


def noise_store(path: Path, arrays: Sequence[str], num_rows: int) -> Path:
    """`arrays` are tokens and cls of layers 8 to 11, as "tokens/11", and embed."""
    known = {spec.name: spec for spec in SPECS} | {
        f"cls/{layer}": _vectors(f"cls/{layer}", D) for layer in range(8, 12)
    }
    known |= {"embed": _vectors("embed", E)}
    facts = {"backbone": vars(FACTS), "request": {"dataset": "noise", "frames": T, "dtype": "float16"}}
    class_names = tuple(f"class {label}" for label in range(NUM_CLASSES))
    make_store(path, num_rows, tuple(known[name] for name in arrays), class_names=class_names, facts=facts).close()
    return path


def _vectors(name: str, width: int) -> ArraySpec:
    return ArraySpec(name=name, dims=("frame", "channel"), shape=(T, width), chunk=(T, width), dtype="float16")
