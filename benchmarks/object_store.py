"""What does reading batches from an object store take on top of its requests?

    python benchmarks/object_store.py [--rows 64] [--rounds 5]

Batches of 32 random rows from two shards of one array, over the S3 protocol from moto's server on this machine:

    vcache               one call of get_ranges for each shard and 16 MB, every checksum verified
    get_range            one request for each frame, in 16 threads, unchecked, with the same client (obstore)
    boto3                one ranged GET for each row, in 16 threads, unchecked: the limit that the usual client has

moto answers in Python and is the bottleneck, at a small part of the speed of a real object store or a network: the ratios say
how many requests a reader makes and what they cost the client, and nothing about the speed of S3.
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from obstore import get_range

from vcache.store.layout import CRC_BYTES, ArraySpec
from vcache.store.manifest import Manifest, VideoTable
from vcache.store.object_client import client
from vcache.store.object_path import ObjectPath
from vcache.store.object_reader import THREADS
from vcache.store.reader import FeatureStore
from vcache.store.writer import ShardWriter, create_store, declare_arrays

T, N, D = 8, 50, 768  # ViT-B/32
SPEC = ArraySpec(
    name="tokens/11", dims=("frame", "token", "channel"), shape=(T, N, D), chunk=(1, N, D), dtype="float16"
)
BATCH = 32
STEP = SPEC.chunk_bytes + CRC_BYTES


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of moto's server, which runs in a process of its own; endpoint and credentials go into the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    os.environ["AWS_REGION"] = "us-east-1"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(urllib.request.Request(f"{url}/bench", method="PUT")).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield url
        finally:
            process.kill()


def make_store(num_rows: int) -> FeatureStore:
    path, names = ObjectPath("bench", "bench.zarr"), tuple(map(str, range(num_rows)))
    manifest = Manifest(
        key="0" * 16, spec={}, dataset="b", class_names=("a",), rows_per_shard=num_rows // 2, splits={"train": num_rows}
    )
    create_store(path, manifest, {"train": VideoTable(names, names, np.zeros(num_rows, dtype=np.int64))})
    store, rng = FeatureStore.open(path), np.random.default_rng(0)
    declare_arrays(store, "train", [SPEC])
    for shard in range(2):
        with ShardWriter(store, "train", shard, [SPEC]) as writer:
            for row in store.shard_rows("train", shard):
                writer.write(row, {SPEC.name: rng.normal(size=SPEC.shape).astype(np.float16)})
    return store


def place(store: FeatureStore, row: int) -> tuple[ObjectPath, int]:
    """The object of a row and where the row begins in it."""
    shard, local_row = divmod(row, store.manifest.rows_per_shard)
    path = store.path / "train/view-0" / SPEC.shard_path(shard)
    assert isinstance(path, ObjectPath)
    return path, local_row * T * STEP


def readers(store: FeatureStore, url: str, pool: ThreadPoolExecutor) -> dict[str, Callable[[np.ndarray], object]]:
    import boto3

    s3 = boto3.client("s3", endpoint_url=url)
    out = np.empty((BATCH, *SPEC.shape), dtype=np.float16)

    def one_row(row: int) -> bytes:
        path, start = place(store, row)
        answer = s3.get_object(Bucket=path.bucket, Key=path.key, Range=f"bytes={start}-{start + T * STEP - 1}")
        return answer["Body"].read()

    def one_frame(work: tuple[int, int]) -> Any:
        path, start = place(store, work[0])
        return get_range(client(path.bucket), path.key, start=start + work[1] * STEP, length=STEP)

    return {
        "boto3": lambda rows: list(pool.map(one_row, rows.tolist())),
        "get_range": lambda rows: list(
            pool.map(one_frame, [(row, frame) for row in rows.tolist() for frame in range(T)])
        ),
        "vcache": lambda rows: store.read("train", SPEC.name, rows, out=out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng, size = np.random.default_rng(1), BATCH * SPEC.row_bytes / 1e9
    print(f"{platform.machine()}, load {os.getloadavg()[0]:.1f}; batches of {BATCH} rows, {size:.3f} GB")
    with s3_server() as url, make_store(options.rows) as store, ThreadPoolExecutor(THREADS) as pool:
        ways = readers(store, url, pool)
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(options.rounds + 1):  # the first is a warm-up
            rows = rng.permutation(options.rows)[:BATCH]
            for name, read in ways.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                read(rows)
                if round_number:
                    wall[name].append(time.perf_counter() - began)
                    cpu[name].append(time.process_time() - cpu_began)
    limit = statistics.median(wall["boto3"])
    for name, taken in wall.items():
        median, spread = statistics.median(taken), f"({size / max(taken):.3f}-{size / min(taken):.3f})"
        used = statistics.median(cpu[name]) / size
        print(
            f"  {name:<10}{size / median:6.3f} GB/s {spread}  {used:5.2f} CPU s/GB of the client  ratio {limit / median:.2f}"
        )


if __name__ == "__main__":
    main()
