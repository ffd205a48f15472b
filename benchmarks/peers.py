"""Extraction beside the peers' own code: the same videos, the same weights, as many frames of each, on the CPU.

    python benchmarks/peers.py --clip-video-encode CHECKOUT --video-features CHECKOUT [--clips FOLDER] [--videos 16]
    python benchmarks/peers.py ... --agreement         compares the embeddings of one video's frames, and times nothing

Their code is imported from checkouts (clip-video-encode b5df2c7, video_features a2f61b7); none of it is here. What they need
beyond this package is not among its requirements, and is best kept apart from it:

    pip install --no-deps --target SITE opencv-python-headless video2numpy yt_dlp webdataset braceexpand pyarrow omegaconf \\
        antlr4-python3-runtime==4.9.3
    PYTHONPATH=SITE python benchmarks/peers.py ...     and ffmpeg in PATH, for video_features

Without them, clip-video-encode's encoding alone is run: its model and encode_chunk, of frames that were decoded and resized
before the clock starts. Each way is a process of its own; rounds are interleaved. CPU seconds count the processes that it starts.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import open_clip
import torch
from clip_copies import copies
from peer_ways import Job
from safetensors.torch import save_file

from vcache.pipelines.demo.render import render_world
from vcache.store.reader import FeatureStore

MODEL = "ViT-B-32-quickgelu"
"""video_features has OpenAI's network alone, which open_clip calls this."""
FRAMES = 8
CVE_NEEDS = ("cv2", "video2numpy", "yt_dlp", "webdataset", "braceexpand", "pyarrow")
VF_NEEDS = ("cv2", "omegaconf")
TITLES = {
    "clip_video_encode_encoding": "clip-video-encode, its encoding alone",
    "clip_video_encode": "clip-video-encode, whole",
    "video_features": "video_features, whole",
    "vcache_embeddings": "vcache, whole, embeddings (`--layers none`)",
    "vcache_tokens": "vcache, whole, 4 layers with Q/K",
}
BASE = "vcache_embeddings"


@dataclass(frozen=True)
class Times:
    seconds: float
    cpu: float


@dataclass
class Bench:
    """The ways that can run here, and what they took."""

    folder: Path
    csv: Path
    checkouts: dict[str, Path]
    ways: tuple[str, ...]
    times: dict[str, list[Times]] = field(default_factory=dict)
    one_video: dict[str, Times] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [line.split(",")[0] for line in self.csv.read_text().splitlines()[1:]]
        self.videos = tuple(str(self.csv.parent / name) for name in names)
        self.every = common_step(self.videos)
        self.weights = save_weights(self.folder)
        self.runs = 0

    def job(self, videos: int, **options: object) -> Job:
        """The first so many videos; a new folder for what comes out."""
        self.runs += 1
        lines = self.csv.read_text().splitlines()[: 1 + videos]
        csv = self.csv.with_name(f"first{videos}.csv")
        csv.write_text("\n".join(lines) + "\n")
        out = self.folder / f"out-{self.runs}"
        job = Job(csv=str(csv), videos=self.videos[:videos], frames=FRAMES, every=self.every, model=MODEL,
                  weights=str(self.weights), out=str(out))  # fmt: skip
        return replace(job, **options)  # type: ignore[arg-type]

    def run(self, way: str, job: Job) -> Times:
        """One way, in a process of its own; what it wrote is checked to be all of it."""
        written = self.folder / f"job-{self.runs}.json"
        written.write_text(json.dumps(asdict(job)))
        process = self.process(way)
        assert process.stdin and process.stdout
        process.stdin.write(f"{written}\n")
        process.stdin.flush()
        said = json.loads(process.stdout.readline() or '{"status": "its process ended"}')
        log = written.with_suffix(".log")
        printed = log.read_text()[-3000:] if log.exists() else ""
        if said["status"]:
            raise SystemExit(f"{TITLES[way]} failed ({said['status']}):\n{printed}")
        counts = [len(rows) for rows in embeddings(way, job)]
        if counts != [job.frames] * len(job.videos):
            raise SystemExit(f"{TITLES[way]} gave frames {counts}, not {job.frames} of each of {len(job.videos)}:\n"
                             f"{printed}")  # fmt: skip
        times = Times(said["seconds"], said["cpu"])
        print(f"{way}, {len(job.videos)} videos: {times.seconds:.1f} s, {times.cpu:.1f} CPU s, "
              f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)  # fmt: skip
        return times

    def process(self, way: str) -> subprocess.Popen[str]:
        """Where a way is imported; its jobs are forks of it."""
        if way not in self.processes:
            cwd = self.checkouts.get(way, self.folder)
            command = [sys.executable, str(Path(__file__).with_name("peer_ways.py").resolve()), way, str(cwd)]
            pipe = subprocess.PIPE
            self.processes[way] = subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=pipe, text=True)
        return self.processes[way]

    def end(self) -> None:
        for process in self.processes.values():
            assert process.stdin
            process.stdin.close()
            process.wait()

    def round(self) -> None:
        for way in self.ways:
            job = self.job(len(self.videos))
            self.times.setdefault(way, []).append(self.run(way, job))
            shutil.rmtree(job.out)

    def single(self) -> None:
        """One video each: nearly all of it is loading the model, starting and ending."""
        for way in self.ways:
            self.one_video[way] = self.run(way, self.job(1))

    def report(self) -> None:
        medians = {way: statistics.median(each.cpu for each in times) for way, times in self.times.items()}
        seconds = {way: statistics.median(each.seconds for each in times) for way, times in self.times.items()}
        print("| | s | CPU s | of ours, s | of ours, CPU s | one video, s |\n|---|---|---|---|---|---|")
        for way, times in self.times.items():
            wall, cpu = ([getattr(each, name) for each in times] for name in ("seconds", "cpu"))
            spread = [f"{statistics.median(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in (wall, cpu)]
            ratios = f"{seconds[way] / seconds[BASE]:.2f} | {medians[way] / medians[BASE]:.2f}"
            print(f"| {TITLES[way]} | {spread[0]} | {spread[1]} | {ratios} | {self.one_video[way].seconds:.1f} |")


def frame_count(video: str) -> int:
    with av.open(video) as opened:
        return opened.streams.video[0].frames


def common_step(videos: tuple[str, ...]) -> int:
    """The step that takes FRAMES frames of every video, since clip-video-encode has one step for all."""
    counts = {video: frame_count(video) for video in videos}
    step = -(-max(counts.values()) // FRAMES)
    if min(counts.values()) <= (FRAMES - 1) * step:
        listed = ", ".join(sorted({f"{Path(video).name} {count}" for video, count in counts.items()}))
        raise SystemExit(
            f"no step takes {FRAMES} frames of every video: {listed}. Give --clips videos of nearly one length."
        )
    return step


def save_weights(folder: Path) -> Path:
    """Random weights that float16 holds, as video_features rounds them to it; with `.pth` beside them for torch.load."""
    torch.manual_seed(0)
    state = {name: each.half().float() for name, each in open_clip.create_model(MODEL).state_dict().items()}
    path = folder / "weights.safetensors"
    save_file(state, path)
    torch.save(state, path.with_suffix(".pth"))
    return path


def embeddings(way: str, job: Job) -> list[np.ndarray]:
    """What a way wrote: (frames, width) for each video."""
    out = Path(job.out)
    if way.startswith("vcache"):
        with FeatureStore.open(out) as store:
            return list(store.read("train", "embed", range(len(job.videos))).astype(np.float64))
    if way == "video_features":
        return [np.load(out / "clip" / "custom" / f"{Path(video).stem}_clip.npy") for video in job.videos]
    return [np.load(out / f"{i}.npy").astype(np.float64) for i in range(len(job.videos))]


def runnable(checkouts: dict[str, Path], folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The checkouts by way, with what they need here, and the ways; says what is left out."""
    found, ways = {}, []
    if checkout := checkouts.get("clip_video_encode"):
        found = {"clip_video_encode": checkout, "clip_video_encode_encoding": checkout}
        ways = ["clip_video_encode_encoding"]
        if lacking := missing(CVE_NEEDS):
            print(f"clip-video-encode as a whole cannot run here, without {lacking}")
        else:
            ways.append("clip_video_encode")
    if checkout := checkouts.get("video_features"):
        lacking = missing(VF_NEEDS) or ("" if shutil.which("ffmpeg") else "ffmpeg in PATH")
        if lacking:
            print(f"video_features cannot run here, without {lacking}")
        else:
            found["video_features"] = with_weights(checkout, folder)
            ways.append("video_features")
    return found, (*ways, "vcache_embeddings", "vcache_tokens")


def missing(names: tuple[str, ...]) -> str:
    return ", ".join(name for name in names if importlib.util.find_spec(name) is None)


def with_weights(checkout: Path, folder: Path) -> Path:
    """A copy of the checkout's code, in which the custom weights of its CLIP lie where it looks for them."""
    copy = folder / "video_features"
    for name in ("models", "utils", "configs"):
        shutil.copytree(checkout / name, copy / name)
    shutil.copy(checkout / "main.py", copy)
    place = copy / "models" / "clip" / "checkpoints" / "CLIP-custom.pth"
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(folder / "weights.pth")
    return copy


def agreement(bench: Bench) -> None:
    """Every frame of the first video through each way, against vcache's with its exact resize and float32."""
    count = frame_count(bench.videos[0])
    every = {"frames": count, "every": 1}
    job = bench.job(1, **every, exact=True)
    bench.run(BASE, job)
    exact = embeddings(BASE, job)[0]
    spread = np.linalg.norm(exact - exact.mean(0), axis=1).mean()
    name = Path(bench.videos[0]).resolve().name
    print(f"all {count} frames of {name}, against vcache --preprocess exact --dtype float32")
    print("| | cosine, median | lowest | apart, of the frames' spread, median | largest |\n|---|---|---|---|---|")
    for way in bench.ways[:-1]:
        job = bench.job(1, **every)
        bench.run(way, job)
        found = embeddings(way, job)[0]
        cosine = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
        apart = np.linalg.norm(found - exact, axis=1) / spread
        print(
            f"| {TITLES[way]} | {np.median(cosine):.6f} | {cosine.min():.6f} | {np.median(apart):.4f} | {apart.max():.4f} |"
        )


def measure(bench: Bench, rounds: int) -> None:
    before = os.getloadavg()[0]
    bench.single()
    for _ in range(rounds):
        bench.round()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load before {before:.1f}")
    print(f"{len(bench.videos)} videos of {FRAMES} frames (every {bench.every}), {MODEL}, loading the model included; "
          f"median of {rounds} (min-max)")  # fmt: skip
    bench.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip-video-encode", type=Path, metavar="CHECKOUT")
    parser.add_argument("--video-features", type=Path, metavar="CHECKOUT")
    parser.add_argument("--clips", type=Path, help="Take the .mp4 of this folder in turns, not rendered videos.")
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--agreement", action="store_true", help="Compare embeddings, and time nothing.")
    args = parser.parse_args()
    given = {"clip_video_encode": args.clip_video_encode, "video_features": args.video_features}
    checkouts = {name: path.resolve() for name, path in given.items() if path}
    if not checkouts:
        parser.error("give a checkout of a peer: --clip-video-encode, --video-features or both")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = folder / "videos"
        videos.mkdir()
        csv = copies(videos, args.clips, args.videos) if args.clips else render_world(videos, train=args.videos, val=0)
        found, ways = runnable(checkouts, folder)
        bench = Bench(folder, csv, found, ways)
        try:
            agreement(bench) if args.agreement else measure(bench, args.rounds)
        finally:
            bench.end()


if __name__ == "__main__":
    main()
