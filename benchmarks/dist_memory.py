"""What memory does a training step of DiST take, and are all layers ever in it as float32?

    python benchmarks/dist_memory.py [--clips 4]

The default DiST on clips of ViT-B/16 (noise: 12 layers of 8 frames, pixels of 16 frames at 224 x 224, 400 classes), from a store
of float16 and one of int8, through ClipLoader and TrainingStep on the CPU. Streamed, as `vcache train-head` has it, each layer is
made when the head asks for it; at once, all layers are made before the head begins. Each row is a fresh process:

    alive        most bytes at once in tensors made by a step: activations, gradients, layers of the backbone, what is between
    peak         high-water mark of resident memory of reading one batch and one step, above what was resident before; a step
                 with one clip has gone before, so that weights, gradients and optimiser state are there. In it are the batch as
                 stored and what glibc keeps of freed memory: with MALLOC_MMAP_THRESHOLD_=1048576 in the environment it keeps none
    activations  float32 that autograd keeps for the backward pass besides weights and layers of the backbone, in a second step
    layers       most layers of the backbone that were in memory as float32 at the same time, in that step

Beside them are the bytes of the batch as stored, and of all its layers in float32. Prints a table.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from evl_head import resident  # the scripts beside this one
from reader import D, N, T, machine
from scale import FACTS
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vcache.heads.dist import DiST
from vcache.pipelines.class_text import LOGIT_SCALE, give_text, text_constant
from vcache.pipelines.loading.loader import Batch, ClipLoader
from vcache.pipelines.matching import match
from vcache.pipelines.training.mixed_precision import training_precision
from vcache.pipelines.training.step import TrainingStep
from vcache.store.constants import Constant, write_constants
from vcache.store.layout import ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.quantise import constant_names, quantised_specs
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, create_store, declare_arrays

CPU = torch.device("cpu")
NUM_CLASSES, PIXEL_FRAMES = 400, 16
CONFIG = DiST.Config(num_classes=NUM_CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--row", nargs=2, metavar=("STORE", "WAY"), help="for the processes that the script starts")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(Path(args.row[0]), args.row[1] == "streamed", args.clips)))
        return
    print(f"{machine()}, torch {torch.__version__}; batches of {args.clips} clips; MB\n")
    print(
        "| store | layers | alive | peak | batch as stored | all layers in float32 | activations | most float32 layers at once |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float16", "int8"):
            store = make_store(Path(folder) / f"{dtype}.zarr", dtype, args.clips)
            for way in ("streamed", "at once"):
                command = [sys.executable, __file__, "--clips", str(args.clips), "--row", str(store), way]
                row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                megabytes = [f"{row[name] / 1e6:.0f}" for name in ("alive", "peak", "stored", "float32", "activations")]
                cells = [dtype, way, *megabytes, f"{row['copies']:.1f} of {FACTS.num_layers}"]
                print(f"| {' | '.join(cells)} |", flush=True)


def make_store(path: Path, dtype: str, num_rows: int) -> Path:
    """Noise, with the constants that int8 and the classifier need."""
    specs = array_specs(dtype)
    names = tuple(map(str, range(num_rows)))
    manifest = Manifest(
        key="0" * 16,
        spec={"dtype": dtype},
        dataset="noise",
        class_names=tuple(f"class {label}" for label in range(NUM_CLASSES)),
        rows_per_shard=num_rows,
        splits={"train": num_rows},
        facts={"backbone": vars(FACTS), "request": {"dataset": "noise", "frames": T, "dtype": dtype}},
    )
    create_store(path, manifest, {"train": VideoTable(names, names, np.arange(num_rows, dtype=np.int64))})
    rng = np.random.default_rng(0)
    with FeatureStore.open(path) as store:
        declare_arrays(store, "train", specs)
        with ShardWriter(store, "train", 0, specs) as writer:
            for row in range(num_rows):
                writer.write(row, {spec.name: noise(rng, spec) for spec in specs})
        write_constants(store, constants(rng, specs))
    return path


def array_specs(dtype: str) -> tuple[ArraySpec, ...]:
    """As `vcache extract --layers 0: --cross-frame none --pixels 16` lays them out."""
    size = FACTS.image_size
    frame = (size, size, 3)
    tokens = [
        ArraySpec(
            name=f"tokens/{layer}",
            dims=("frame", "token", "channel"),
            shape=(T, N, D),
            chunk=(1, N, D),
            dtype="float16",
        )
        for layer in range(FACTS.num_layers)
    ]
    pixels = ArraySpec(
        name="pixels",
        dims=("frame", "height", "width", "colour"),
        shape=(PIXEL_FRAMES, *frame),
        chunk=(1, *frame),
        dtype="uint8",
    )
    return (*(part for spec in tokens for part in (quantised_specs(spec) if dtype == "int8" else (spec,))), pixels)


def noise(rng: np.random.Generator, spec: ArraySpec) -> np.ndarray:
    if spec.dtype in ("uint8", "int8"):
        low, high = (0, 256) if spec.dtype == "uint8" else (-127, 128)
        return rng.integers(low, high, spec.shape, dtype=spec.dtype)
    scale = 3 / 127 if spec.name.startswith("tokens_scale") else 1.0
    return (np.abs(rng.normal(size=spec.shape)) * scale).astype(spec.dtype)


def constants(rng: np.random.Generator, specs: tuple[ArraySpec, ...]) -> dict[str, Constant]:
    text = rng.normal(size=(NUM_CLASSES, 1, FACTS.embed_dim)).astype(np.float32)
    made = {
        text_constant("label"): Constant(("class", "template", "channel"), text),
        LOGIT_SCALE: Constant(("scale",), np.log([100]).astype(np.float32)),
    }
    for name in (spec.name for spec in specs if spec.dtype == "int8"):
        made |= {constant: Constant(("channel",), np.ones(D, dtype=np.float32)) for constant in constant_names(name)}
    return made


def measure(path: Path, streamed: bool, num_clips: int) -> dict[str, float]:
    """One row, in a process of its own."""
    with FeatureStore.open(path) as store:
        torch.manual_seed(0)
        head = DiST(CONFIG)
        plan = dataclasses.replace(match("dist", DiST.requires(CONFIG), store, ["train"]), streamed=streamed)
        give_text(head, plan.text, store)
        step = training_step(head)
        run(step, ClipLoader(store, "train", plan, batch_size=1, device=CPU).in_order())
        loader = ClipLoader(store, "train", plan, batch_size=num_clips, device=CPU)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is resident no longer
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
        before = resident("VmRSS")
        run(step, loader.in_order())
        peak = resident("VmHWM") - before
        activations, copies = run_watched(step, loader, num_clips)
        with LivingTensors() as living:
            run(step, loader.in_order())
        return {
            "alive": living.most_bytes,
            "peak": peak,
            "stored": num_clips * sum(spec.row_bytes for spec in array_specs(str(store.manifest.spec["dtype"]))),
            "float32": FACTS.num_layers * num_clips * T * N * D * 4,
            "activations": activations,
            "copies": copies,
        }


def training_step(head: nn.Module) -> TrainingStep:
    """The recipe of the paper without mixing, which would need memory of its own."""
    recipe = dataclasses.replace(DiST.recipe, mixup=0.0, cutmix=0.0)
    return TrainingStep(head, recipe, training_precision("float32", CPU), num_steps=100, steps_per_epoch=10)


def run(step: TrainingStep, batches: Iterator[Batch]) -> None:
    """One step on the first batch, as the training loop does it."""
    batch = next(batches)
    step(batch.features(), batch.targets, 1)


def run_watched(step: TrainingStep, loader: ClipLoader, num_clips: int) -> tuple[int, float]:
    """(bytes that autograd keeps of the head's activations, most float32 layers of the backbone at once) of a step."""
    weights = {p.untyped_storage().data_ptr() for p in step.head.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.dtype == torch.float32 and storage.data_ptr() not in weights and not layers.has(storage):
            kept[storage.data_ptr()] = x  # held, so that no other gets its address
        return x

    with LayerCounter() as layers, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(step, loader.in_order())
    return sum(x.untyped_storage().nbytes() for x in kept.values()), layers.most_bytes / (num_clips * T * N * D * 4)


class LivingTensors(TorchDispatchMode):
    """Sums up the memory of the living tensors that operations made, whoever holds them; each memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def has(self, storage: torch.UntypedStorage) -> bool:
        return StorageWeakRef(storage).cdata in self._alive

    def counts(self, func: Any, result: Tensor, args: Any) -> bool:
        """An operation in place, or of a view, makes no memory."""
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        return result.untyped_storage()._cdata not in given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and self.counts(func, made, (args, kwargs)):
                storage = made.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = reference, storage.nbytes()
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self._alive.values()))
        return result


class LayerCounter(LivingTensors):
    """Of those the float32 that float16 or int8 was converted into, whole layers or parts of them."""

    def counts(self, func: Any, result: Tensor, args: Any) -> bool:
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if source is None or result.dtype != torch.float32:
            return False
        return args[0][source].dtype in (torch.float16, torch.int8)


if __name__ == "__main__":
    main()
