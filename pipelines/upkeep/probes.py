"""What `vcache doctor` measures, each for a second or two: decoders on a video made on the spot, disks, memory, the backbone."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    import av
    import torch

VIDEO_FRAMES, VIDEO_WIDTH, VIDEO_HEIGHT = 300, 340, 256
"""Ten seconds at 30 frames/s with a short side of 256: a video of Kinetics as it is usually kept."""
ROW_BYTES = 8 * 197 * 768 * 2
"""A layer of a clip: 8 frames of ViT-B/16 in float16."""
SMALL_MODEL, DEFAULT_MODEL = "ViT-B-32-quickgelu", "ViT-B-16-quickgelu"
_COPIED_BYTES = 128 * 2**20
_MOST_SECONDS = 4.0
_DEFAULT_COSTS = 4.0  # times the small one: 196 patches a frame in place of 49


@dataclass(frozen=True, kw_only=True)
class DecoderProbe:
    """Whether a decoder works, and how fast one process of it is."""

    name: str
    videos_per_second: float | None
    error: str | None = None

    @property
    def frames_per_second(self) -> float | None:
        return None if self.videos_per_second is None else self.videos_per_second * VIDEO_FRAMES


@dataclass(frozen=True, kw_only=True)
class DiskProbe:
    """Bytes per second written and synced, and read cold, in a folder."""

    path: str
    write: float | None
    read: float | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class BackboneProbe:
    """Frames per second of an image tower with random weights on the device that `--device auto` means."""

    model: str
    device: str
    precision: str
    frames_per_second: float | None
    error: str | None = None


def probe_decoders(folder: Path | None = None) -> tuple[DecoderProbe, ...]:
    """Each decoder for video files, on the same one."""
    from vcache.extract.decoders import list_decoders

    names = [name for name in list_decoders() if name != "images"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            video = make_video(Path(place, "video.mp4"))
        except Exception as error:  # an FFmpeg without an encoder, a full disk
            return tuple(DecoderProbe(name=name, videos_per_second=None, error=_line(error)) for name in names)
        return tuple(_probe_decoder(name, video) for name in names)


def make_video(path: Path) -> Path:
    """Moving bars in H.264, the usual way from a camera to Kinetics; or in MPEG-4 where FFmpeg has no encoder for that."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = cast("av.VideoStream", container.add_stream(codec, rate=Fraction(30)))
        stream.width, stream.height, stream.pix_fmt = VIDEO_WIDTH, VIDEO_HEIGHT, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (VIDEO_HEIGHT, 2 * VIDEO_WIDTH, 3), dtype=np.uint8)
        noise = noise.reshape(VIDEO_HEIGHT // 32, 32, -1, 3).repeat(32, axis=0)[:, 0][:VIDEO_HEIGHT]
        for number in range(VIDEO_FRAMES):
            image = np.ascontiguousarray(noise[:, number : number + VIDEO_WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def _probe_decoder(name: str, video: Path) -> DecoderProbe:
    from vcache.extract.decode import decode_clip
    from vcache.extract.decoders import get_decoder
    from vcache.extract.sampling import TSNSampling

    try:
        get_decoder(name)  # loads the library
        began = time.perf_counter()
        decode_clip(video, TSNSampling(num_frames=8), decoder=name)
        return DecoderProbe(name=name, videos_per_second=1 / (time.perf_counter() - began))
    except Exception as error:  # not installed, or whatever a broken library raises
        return DecoderProbe(name=name, videos_per_second=None, error=_line(error))


def probe_disk(folder: Path, *, seconds: float = 2.0) -> DiskProbe:
    """In the nearest folder that is there, with a file of at most an eighth of the free space that is gone afterwards."""
    from vcache.pipelines.measuring import MeasuringError, measure_disk

    try:
        rates = measure_disk(folder, ROW_BYTES, seconds=seconds)
    except (MeasuringError, OSError) as error:
        return DiskProbe(path=str(folder), write=None, read=None, error=_line(error))
    return DiskProbe(path=str(folder), write=rates.write_bytes_per_second, read=rates.read_bytes_per_second)


def probe_copying() -> float:
    """Bytes per second that one thread copies in memory; a copy reads and writes each."""
    source = np.ones(_COPIED_BYTES, np.uint8)
    target = np.empty_like(source)
    target[:] = source  # the first time its pages are made
    began, copies = time.perf_counter(), 0
    while not copies or time.perf_counter() - began < 0.3:
        target[:] = source
        copies += 1
    return copies * _COPIED_BYTES / (time.perf_counter() - began)


def probe_backbones(on_stage: Callable[[str], None] = lambda name: None) -> tuple[BackboneProbe, ...]:
    """A small model, and the default one unless it would take too long."""
    on_stage(f"running {SMALL_MODEL}")
    began = time.perf_counter()
    small = _probe_backbone(SMALL_MODEL)
    if small.frames_per_second is None or _DEFAULT_COSTS * (time.perf_counter() - began) > 2 * _MOST_SECONDS:
        return (small,)
    on_stage(f"running {DEFAULT_MODEL}")
    return (small, _probe_backbone(DEFAULT_MODEL))


def _probe_backbone(model: str) -> BackboneProbe:
    import torch

    from vcache.pipelines.device import select_device

    device = select_device("auto")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    facts = {"model": model, "device": str(device), "precision": str(dtype).removeprefix("torch.")}
    try:
        rate = _frames_per_second(model, device, dtype)
    except Exception as error:  # out of memory, a driver that does not fit
        return BackboneProbe(**facts, frames_per_second=None, error=_line(error))
    return BackboneProbe(**facts, frames_per_second=rate)


def _frames_per_second(model: str, device: "torch.device", dtype: "torch.dtype") -> float:
    import torch
    from open_clip.factory import get_model_config
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    config = get_model_config(model)
    with torch.device(device), torch.inference_mode():
        vision = CLIPVisionCfg(**config["vision_cfg"])
        tower = _build_vision_tower(config["embed_dim"], vision, quick_gelu=True).to(dtype).eval()
        batch = torch.zeros(64 if device.type == "cuda" else 8, 3, 224, 224, dtype=dtype)
        began = time.perf_counter()
        tower(batch[:1]).cpu()
        if (once := time.perf_counter() - began) > 0.5:
            return 1 / once  # slow enough not to ask for a batch
        frames, began = 0, time.perf_counter()
        while not frames or time.perf_counter() - began < 1.0:
            tower(batch).cpu()  # waits for the device
            frames += len(batch)
        return frames / (time.perf_counter() - began)


def _line(error: Exception) -> str:
    """The first line of it."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:240]
