"""Extractions by one program, for `peers.py`: a process imports what the program needs, and each job is a fork of it.

    python benchmarks/peer_ways.py WAY CHECKOUT        then the path of a JOB.json on each line of its input

So each job has a process that has done nothing yet, and the clock starts after the imports: loading the model is in it, loading
the libraries is not. Each line of its output is JSON: seconds, CPU seconds, and the exit status; what is printed goes to JOB.log.
"""

import importlib
import json
import os
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vcache's command line does, before torch is loaded

import numpy as np
import torch

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to extract. Every `every`-th frame of the videos is `frames` frames of each."""

    csv: str
    videos: tuple[str, ...]
    frames: int
    every: int
    model: str
    weights: str
    """safetensors of the state dict; beside it `.pth` is the same for torch.load."""
    out: str
    """Folder, or the store of vcache; made here."""
    exact: bool = False
    """vcache alone: resize as open_clip's own transform does, and store float32."""


def clip_video_encode(job: Job) -> Work:
    """The whole of it, as its command line calls it, with its defaults."""
    package = importlib.import_module("clip_video_encode.clip_video_encode")
    out = made(job)
    return lambda: package.clip_video_encode(
        list(job.videos), str(out), take_every_nth=job.every, model_name=job.model, pretrained=job.weights
    )


def clip_video_encode_encoding(job: Job) -> Work:
    """Its model and encode_chunk alone, of frames decoded and resized by vcache before the clock starts."""
    simplemapper, handle_chunk = (
        importlib.import_module(f"clip_video_encode.{name}") for name in ("simplemapper", "handle_chunk")
    )
    frames = [our_pixels(video, job) for video in job.videos]
    places = {i: (job.frames * i, job.frames * (i + 1), f"{i}.mp4") for i in range(len(frames))}
    files, ids = NumpyFiles(made(job)), [str(i) for i in range(len(frames))]

    def work() -> None:
        mapper = simplemapper.FrameMapper(job.model, job.weights, "cpu")
        handle_chunk.encode_chunk(frames, places, files, mapper, {}, ids, False, "cpu")

    return work


class NumpyFiles:
    """clip-video-encode's FileWriter, without fsspec: one .npy for a video."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, values: np.ndarray, key: str, metadata: object = None) -> None:
        np.save(self.folder / f"{key}.npy", values)


def our_pixels(video: str, job: Job) -> np.ndarray:
    """The frames of a video from its first on, resized as vcache does: (frames, 224, 224, 3) uint8."""
    import open_clip

    from vcache.extract.decode import decode_video
    from vcache.extract.preprocess import Preprocessing
    from vcache.extract.sampling import ClipRule, StridedSampling
    from vcache.extract.video import DecodeRequest

    preprocess = Preprocessing(image_size=224, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    rule = ClipRule(sampling=StridedSampling(num_frames=job.frames, stride_frames=job.every))
    frames = decode_video(DecodeRequest(path=Path(video), clips=(rule,))).clip(0)
    return preprocess.pixels(frames).permute(0, 2, 3, 1).contiguous().numpy()


def video_features(job: Job) -> Work:
    """Its main() for the CLIP extractor with custom weights, saving .npy; run in the folder of a copy of the checkout."""
    main = importlib.import_module("main").main
    omegaconf = importlib.import_module("omegaconf")
    out = made(job)
    (out / "videos.txt").write_text("\n".join(job.videos))
    options = {
        "feature_type": "clip",
        "model_name": "custom",
        "device": "cpu",
        "batch_size": 8,
        "on_extraction": "save_numpy",
        "file_with_video_paths": str(out / "videos.txt"),
        "output_path": str(out),
        "tmp_path": str(out / "tmp"),
    }
    if job.every > 1:
        options["extraction_total"] = job.frames  # all frames without it
    return lambda: main(omegaconf.OmegaConf.create(options))


def vcache_embeddings(job: Job) -> Work:
    return _vcache(job, layers="none", cross_frame="none")


def vcache_tokens(job: Job) -> Work:
    return _vcache(job, layers="-4:", cross_frame="qk")


def _vcache(job: Job, *, layers: str, cross_frame: str) -> Work:
    from vcache.pipelines.extraction import run_extraction
    from vcache.pipelines.request import ExtractionConfig

    config = ExtractionConfig(
        dataset=job.csv,
        layers=layers,
        cross_frame=cross_frame,  # type: ignore[arg-type]
        frames=job.frames,
        stride=job.every,
        model=job.model,
        pretrained=job.weights,
        store=Path(job.out),
        device="cpu",
        decode_workers=os.cpu_count() or 1,
        preprocess="exact" if job.exact else "fast",
        dtype="float32" if job.exact else "float16",
    )
    return lambda: run_extraction(config)


def made(job: Job) -> Path:
    folder = Path(job.out)
    folder.mkdir(parents=True)
    return folder


WAYS: dict[str, Callable[[Job], Work]] = {
    "clip_video_encode_encoding": clip_video_encode_encoding,
    "clip_video_encode": clip_video_encode,
    "video_features": video_features,
    "vcache_embeddings": vcache_embeddings,
    "vcache_tokens": vcache_tokens,
}


_OURS = ("vcache.pipelines.extraction", "vcache.pipelines.request", "vcache.store.reader")
IMPORTS: dict[str, tuple[str, ...]] = {
    "clip_video_encode_encoding": (
        "clip_video_encode.simplemapper",
        "clip_video_encode.handle_chunk",
        "vcache.extract.decode",
        "vcache.extract.preprocess",
    ),
    "clip_video_encode": ("clip_video_encode.clip_video_encode",),
    "video_features": ("main", "models.clip.extract_clip", "omegaconf"),
    "vcache_embeddings": _OURS,
    "vcache_tokens": _OURS,
}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def import_for(way: str, checkout: str) -> None:
    """All that the way imports, so that its forks find it."""
    sys.path.insert(0, checkout)
    if way == "clip_video_encode_encoding":  # without the package's __init__, which imports the reader
        package = types.ModuleType("clip_video_encode")
        package.__path__ = [str(Path(checkout) / "clip_video_encode")]
        sys.modules["clip_video_encode"] = package
    for name in IMPORTS[way]:
        importlib.import_module(name)


def child(way: str, path: Path) -> None:
    """One job, timed; to JOB.log what it prints, and to JOB.said its times."""
    log = os.open(path.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(os.cpu_count() or 1)
    values = json.loads(path.read_text())
    work = WAYS[way](Job(**{**values, "videos": tuple(values["videos"])}))
    before, start = cpu_seconds(), time.perf_counter()
    work()
    said = {"seconds": time.perf_counter() - start, "cpu_before": before}
    path.with_suffix(".said").write_text(json.dumps(said))


def main() -> None:
    way, checkout = sys.argv[1:]
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by the imports is no answer
    import_for(way, checkout)
    for line in sys.stdin:
        path = Path(line.strip())
        if not (pid := os.fork()):
            sys.stdin.close()
            child(way, path)
            return
        _, status, used = os.wait4(pid, 0)  # with the processes that the job started and waited for
        answer = {"status": os.waitstatus_to_exitcode(status), "seconds": 0.0, "cpu": 0.0}
        if not answer["status"]:
            said = json.loads(path.with_suffix(".said").read_text())
            answer |= {"seconds": said["seconds"], "cpu": used.ru_utime + used.ru_stime - said["cpu_before"]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
