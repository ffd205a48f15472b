"""What do large corpora take? Bytes, files and hours on paper, from the code's own arithmetic and from rates that are stated.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --decode-seconds 0.05 --cores-per-gpu 32 --node-gbs 6 --shared-gbs 100

Nothing is extracted and no machine is measured but for the memory of the tables, in a second. Bytes, shards and files are exact
if no video fails: they come from `array_specs`, `rows_of_a_shard` and `shard_bytes`. Hours are the slowest of three stages.
"""

import argparse
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vcache.extract.backbone import BackboneFacts
from vcache.extract.datasets.base import Video
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import array_specs, rows_of_a_shard
from vcache.store.commits import CommitRecord, StoredFile
from vcache.store.layout import ArraySpec
from vcache.store.manifest import VideoTable
from vcache.store.parts import PartName

FRAMES, FRAMES_IN_BATCH = 8, 256  # of a batch on a GPU (setup.py)
CORPORA = {
    "Kinetics-400": {"train": 240_436, "val": 19_796},
    "Something-Something V2": {"train": 168_913, "val": 24_777},
    "10 million videos": {"train": 10_000_000},
}
CHOICES = (("float16", "qk"), ("int8", "derive"))
GPUS = (1, 8, 64)
# Seconds of looking at a store of so many videos in shards of 64: results.md, "A store of 260,000 videos".
MEASURED_ROWS, CLIENT = (
    260_000,
    {"ls": 0.35, "info": 0.42, "train-head, to the first batch": 0.72, "extract, to the first video": 0.71},
)
CSV_SECONDS = 2.0  # of reading the list of as many videos: CHANGELOG.md


@dataclass(frozen=True)
class Model:
    """A backbone: what its arrays look like, and how much a frame costs."""

    facts: BackboneFacts
    gmacs: float
    """Billions of multiply-adds of a frame, counted by torch's FlopCounterMode (half of its figure)."""


def _facts(name: str, layers: int, width: int, heads: int, patch: int, embed: int) -> BackboneFacts:
    side = 224 // patch
    return BackboneFacts(
        model=name,
        num_layers=layers,
        width=width,
        num_heads=heads,
        head_dim=width // heads,
        patch_size=patch,
        image_size=224,
        grid=(side, side),
        num_tokens=side**2 + 1,
        embed_dim=embed,
        layer_norm_eps=1e-5,
    )


MODELS = (
    Model(_facts("ViT-B/16", 12, 768, 12, 16, 512), 17.563),
    Model(_facts("ViT-L/14", 24, 1024, 16, 14, 768), 81.01),
)


@dataclass(frozen=True)
class Layout:
    """A finished store, counted."""

    num_videos: int
    rows_per_shard: int
    num_bytes: int
    num_shards: int
    num_files: int
    num_inodes: int
    """Shard files, the folders that Zarr's chunk keys make around each, and commit records."""
    record_bytes: int
    """Of all commit records, which whoever opens the store reads."""


def layout(model: Model, splits: dict[str, int], dtype: str, cross_frame: str, rows: int | None = None) -> Layout:
    config = ExtractionConfig(dataset="k400", frames=FRAMES, dtype=dtype, cross_frame=cross_frame)
    specs = array_specs(model.facts, range(model.facts.num_layers - 4, model.facts.num_layers), config)
    rows = rows or rows_of_a_shard(specs, FRAMES_IN_BATCH // FRAMES)
    shards = [min(rows, videos - first) for videos in splits.values() for first in range(0, videos, rows)]
    by_rows = {number: sum(spec.shard_bytes(number, rows) for spec in specs) for number in set(shards)}
    # tokens/8/c/3/0/0/0: a folder for each axis but the last, in which the file is.
    inodes = 1 + sum(1 + len(spec.shape) for spec in specs)
    return Layout(
        num_videos=sum(splits.values()),
        rows_per_shard=rows,
        num_bytes=sum(by_rows[number] for number in shards),
        num_shards=len(shards),
        num_files=len(shards) * len(specs),
        num_inodes=len(shards) * inodes,
        record_bytes=len(shards) * _record_bytes(specs, rows),
    )


def _record_bytes(specs: tuple[ArraySpec, ...], rows: int) -> int:
    files = tuple(
        StoredFile(spec, spec.shard_bytes(rows, rows), 2**31, 2**31) for spec in sorted(specs, key=lambda s: s.name)
    )
    record = CommitRecord(
        split=PartName("train"), view=0, shard=1000, first_row=1000 * rows, num_rows=rows, files=files, failures=()
    )
    return len(record.encode())


@dataclass(frozen=True)
class Hours:
    """How long an extraction takes, and what the others wait for."""

    hours: float
    limit: str


def hours(model: Model, store: Layout, num_gpus: int, options: argparse.Namespace) -> Hours:
    """Stages work side by side, so the slowest of them counts. Writing takes cores from decoding: copies and checksums."""
    gigabytes = store.num_bytes / store.num_videos / 1e9
    cores = num_gpus * options.cores_per_gpu
    nodes = -(-num_gpus // options.gpus_per_node)
    stages = {
        "decode": cores / (options.decode_seconds + options.write_cpu * gigabytes),
        "device": num_gpus * frames_per_second(model, options) / FRAMES,
        "disk (a node's)": nodes * options.node_gbs / gigabytes,
        "disk (shared)": options.shared_gbs / gigabytes,
        # One thread of each process writes (writing.py).
        "disk (writer thread)": num_gpus / options.write_cpu / gigabytes,
    }
    limit = min(stages, key=stages.__getitem__)
    return Hours(store.num_videos / stages[limit] / 3600, limit)


def frames_per_second(model: Model, options: argparse.Namespace) -> float:
    return float(options.utilisation * options.peak_tflops * 1e12 / (2 * model.gmacs * 1e9))


def memory_per_video() -> dict[str, float]:
    """Bytes of a video in the tables of a process, traced over 20,000 with ids and paths as long as Kinetics has them."""
    count = 20_000

    def video(row: int) -> tuple[str, str]:
        name = f"{row:011x}_{row % 300:06d}_{row % 300 + 10:06d}"
        return name, f"train/class {row % 400}/{name}.mp4"

    def dataset() -> object:
        return tuple(Video(*video(row), row % 400, "train") for row in range(count))

    def table() -> object:
        ids, paths = zip(*map(video, range(count)), strict=True)
        return VideoTable(ids, paths, np.arange(count) % 400)

    return {"the dataset's list": traced(dataset) / count, "the store's table": traced(table) / count}


def traced(make: Callable[[], object]) -> int:
    tracemalloc.start()
    made = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return size


def assumptions(options: argparse.Namespace) -> Iterator[str]:
    yield f"- decode: {options.decode_seconds:g} s of one core for a video, {options.cores_per_gpu} cores for each GPU"
    share = f"{options.utilisation:.0%} of {options.peak_tflops:g} TFLOP/s, an H100's dense fp16 peak"
    yield f"- device, ASSUMED, as no GPU was measured: {share}"
    for model in MODELS:
        rate = f"{frames_per_second(model, options):,.0f} frames/s"
        yield f"    - {model.facts.model}: that / (2 x {model.gmacs:g} GMAC a frame) = {rate} of a GPU"
    node = f"{options.node_gbs:g} GB/s of a node, with {options.gpus_per_node} GPUs"
    yield f"- disk, ASSUMED: {node}; {options.shared_gbs:g} GB/s of all nodes"
    yield f"- writing a GB takes {options.write_cpu:g} s of a core (results.md); each GPU's process has one thread that writes"


def cost_table(options: argparse.Namespace) -> Iterator[str]:
    gpus = " | ".join(f"{count} GPU{'s' if count > 1 else ''}: hours, limited by" for count in GPUS)
    yield f"| corpus | model | store | MB a video | TB | rows a shard | shards | files | {gpus} |"
    yield "|---" * (8 + len(GPUS)) + "|"
    for corpus, splits in CORPORA.items():
        for model in MODELS:
            for choice in CHOICES:
                store = layout(model, splits, *choice, options.rows_per_shard)
                times = [hours(model, store, count, options) for count in GPUS]
                yield (
                    f"| {corpus} | {model.facts.model} | {' '.join(choice)} | {store.num_bytes / store.num_videos / 1e6:.2f} | "
                    f"{store.num_bytes / 1e12:.2f} | {store.rows_per_shard} | {store.num_shards:,} | {store.num_files:,} | "
                    + " | ".join(f"{time.hours:.3g}, {time.limit}" for time in times)
                    + " |"
                )


def shard_table() -> Iterator[str]:
    """Of the largest corpus, by rows of a shard."""
    (name, splits), model, choice = list(CORPORA.items())[-1], MODELS[0], CHOICES[0]
    yield f"Of {name}, {model.facts.model}, {' '.join(choice)}, by rows of a shard:"
    yield ""
    yield "| rows a shard | largest file | shards | files | inodes | commit records |"
    yield "|---" * 6 + "|"
    for rows in (None, 64, 256, 1024):
        store = layout(model, splits, *choice, rows)
        config = ExtractionConfig(dataset="k400", frames=FRAMES, dtype=choice[0], cross_frame=choice[1])
        largest = max(
            spec.shard_bytes(store.rows_per_shard, store.rows_per_shard)
            for spec in array_specs(model.facts, (11,), config)
        )
        default = " (the default)" if rows is None else ""
        yield (
            f"| {store.rows_per_shard}{default} | {largest / 1e6:,.0f} MB | {store.num_shards:,} | {store.num_files:,} | "
            f"{store.num_inodes:,} | {store.record_bytes / 1e9:.2f} GB |"
        )


def client_table() -> Iterator[str]:
    videos = CORPORA["10 million videos"]["train"]
    yield "| what a process does before its first video or batch | 260,000, measured | 10 million, in proportion |"
    yield "|---|---|---|"
    for name, seconds in ({"reading the list, a CSV": CSV_SECONDS} | CLIENT).items():
        yield f"| {name} | {seconds:.2f} s | {seconds * videos / MEASURED_ROWS:.0f} s |"
    for name, size in memory_per_video().items():
        whole = f"{size * MEASURED_ROWS / 1e6:.0f} MB | {size * videos / 1e9:.1f} GB"
        yield f"| memory of {name}: {size:.0f} B a video, traced now | {whole} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode-seconds", type=float, default=0.14, help="of one core, for a 10 s 340x256 H.264 clip")
    parser.add_argument("--cores-per-gpu", type=int, default=16)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of the peak that the backbone reaches")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--node-gbs", type=float, default=5.0, help="GB/s that a node writes")
    parser.add_argument("--shared-gbs", type=float, default=20.0, help="GB/s that the file system takes from all nodes")
    parser.add_argument("--write-cpu", type=float, default=0.43, help="core seconds for a GB written (results.md)")
    parser.add_argument("--rows-per-shard", type=int, help="in place of the code's own")
    return parser.parse_args()


def main() -> None:
    options = parse()
    print("\n".join([*assumptions(options), "", *cost_table(options), "", *shard_table(), "", *client_table()]))


if __name__ == "__main__":
    main()
