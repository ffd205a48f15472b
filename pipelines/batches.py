"""One model: a video to the images of a view, and fixed batches of clips to the arrays of a store.

A batch always has the same number of clips, and a row always the same place in it (shards.py). The last bit of a sum may depend
on how many rows a matrix has and on where in it a row lies (seen on two cores for clips that were alone), and on nothing else
of the other clips. So the bits of a row depend neither on which other videos failed, nor on the end of a shard, nor on resuming.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vcache.extract.backbone import FrozenBackbone, Taps
from vcache.extract.datasets.base import Video, VideoDataset
from vcache.extract.preprocess import Preprocessing
from vcache.extract.sampling import FrameRule, Sampling
from vcache.extract.video import DecodeRequest
from vcache.extract.views import EvaluationView, PreparedClip, View
from vcache.heads.cross_frame import cross_frame_maps
from vcache.pipelines.decoding import Decode, decode_here
from vcache.pipelines.precision import encoded
from vcache.store.layout import ArraySpec
from vcache.store.quantise import source_name

RowArrays = dict[str, np.ndarray]
"""The arrays of one row by name, in the dtypes of the store."""


COMPUTED = ("tokens", "block_input", "q", "k", "cls", "embed", "maps")
"""Kinds of arrays that the backbone computes; the others say how a view was made, or scale an int8 array."""


@dataclass(frozen=True)
class EncodedBatch:
    """The arrays of a batch, on their way to the host."""

    slots: Sequence[PreparedClip | None]
    names: frozenset[str]
    arrays: Mapping[str, torch.Tensor]
    """In the memory of the host, complete once `wait` has returned."""
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until the device has done the batch and its arrays are in the memory of the host."""
        if self.copied is not None:
            self.copied.synchronize()

    def rows(self) -> list[RowArrays | None]:
        """Slot by slot, None where there is no clip. Views into the memory of the batch."""
        self.wait()
        values = {name: array.numpy() for name, array in self.arrays.items()}
        return [None if clip is None else self._row(values, b, clip) for b, clip in enumerate(self.slots)]

    def _row(self, values: Mapping[str, np.ndarray], slot: int, clip: PreparedClip) -> RowArrays:
        record = {name: array for name, array in clip.record.items() if name in self.names}
        return {name: array[slot] for name, array in values.items()} | record


class ClipExtractor:
    """What one model makes of videos. `prepare` and `prepared` are safe in several threads, the rest is for one."""

    def __init__(
        self,
        dataset: VideoDataset,
        sampling: Sampling,
        preprocessing: Preprocessing,
        backbone: FrozenBackbone,
        *,
        num_threads: int,
        batch_size: int,
        decode: Decode = decode_here,
        allow_partial: bool = False,
        decoder: str = "pyav",
    ) -> None:
        """
        Args:
            num_threads: how many videos may be decoded at once.
            allow_partial: take what a damaged video gives.
            decoder: one of `list_decoders()`, for every video.
        """
        self.dataset, self.sampling, self.preprocessing, self.backbone = dataset, sampling, preprocessing, backbone
        self.num_threads, self.batch_size, self.decode = num_threads, batch_size, decode
        self.decoder, self.allow_partial = decoder, allow_partial
        self.constants: Mapping[str, torch.Tensor] = {}
        """What int8 is made with (precision.py)."""
        self._copies = torch.cuda.Stream(backbone.device) if backbone.device.type == "cuda" else None

    def prepare(self, video: Video, view: View | None = None) -> PreparedClip:
        """Decode and preprocess one view of a video (view 0 if none is named); VideoError if it cannot be used."""
        view = view or EvaluationView()
        decoded = self.decode(self.request(video, (view.clip_rule(self.sampling, video.video_id),)))
        return view.prepare(decoded, 0, self.preprocessing, video.video_id)

    def request(self, video: Video, rules: tuple[FrameRule, ...]) -> DecodeRequest:
        """What to decode of a video for clips by these rules."""
        return DecodeRequest(
            path=self.dataset.root / video.path,
            clips=rules,
            segment=video.segment,
            allow_partial=self.allow_partial,
            decoder=self.decoder,
        )

    def forward(self, clips: Sequence[PreparedClip], arrays: Iterable[ArraySpec]) -> list[RowArrays]:
        """The arrays of each of these clips, computed as one batch of just them."""
        return [row for row in self.start(clips, arrays).rows() if row is not None]

    def start(self, slots: Sequence[PreparedClip | None], arrays: Iterable[ArraySpec]) -> EncodedBatch:
        """Begin with a batch; an empty slot is filled with a copy of the first clip, whose features are thrown away.

        On a CPU the batch is done when this returns. On a GPU it is computed and copied back while the caller goes on.

        Raises:
            ValueError: all slots are empty.
        """
        clips = [clip for clip in slots if clip is not None]
        if not clips:
            raise ValueError("a batch needs a clip")
        specs = {spec.name: spec for spec in arrays}
        # Scales may be asked for without what they scale: a repair writes single arrays.
        dtypes = {
            source_name(name): spec.dtype if name == source_name(name) else "int8" for name, spec in specs.items()
        }
        computed = {name for name in dtypes if name.split("/")[0] in COMPUTED}
        stored: dict[str, torch.Tensor] = {}
        filled = [clip or clips[0] for clip in slots]
        for name, feature in self.features(filled, computed).items() if computed else ():
            stored |= encoded(name, feature, dtypes[name], self.constants)
        wanted = {
            name: stored[name].contiguous().view(len(slots), *specs[name].shape) for name in specs if name in stored
        }
        arrays_on_host, copied = (wanted, None) if self._copies is None else self._to_host(wanted, self._copies)
        return EncodedBatch(tuple(slots), frozenset(specs), arrays_on_host, copied)

    def features(self, clips: Sequence[PreparedClip], names: Collection[str]) -> dict[str, torch.Tensor]:
        """Those of the named arrays that the backbone computes, in its precision and on its device.

        Frame by frame, (B*T, *shape of a frame), but maps, which are clip by clip: (B, T-1, 2, P, P).
        """
        images = self.preprocessing.normalise(self._to_device(clips))  # (B*T, 3, S, S)
        return frame_features(self.backbone, images, len(images) // len(clips), names)

    def _to_device(self, clips: Sequence[PreparedClip]) -> torch.Tensor:
        """The pixels of all clips, uint8: a fourth of the bytes that normalised images would have."""
        images = [clip.images for clip in clips]
        if self._copies is None:
            return torch.cat(images)
        num_frames = sum(len(image) for image in images)
        # torch keeps pinned memory for the next batch, and hands it out again only when the copy is done.
        pinned = torch.empty((num_frames, *images[0].shape[1:]), dtype=torch.uint8, pin_memory=True)
        return torch.cat(images, out=pinned).to(self.backbone.device, non_blocking=True)

    def _to_host(
        self, arrays: Mapping[str, torch.Tensor], copies: torch.cuda.Stream
    ) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
        """Copies into pinned memory on a stream of their own, so that the next batch need not wait for them."""
        on_host: dict[str, torch.Tensor] = {}
        copies.wait_stream(torch.cuda.current_stream(self.backbone.device))
        with torch.cuda.stream(copies):
            for name, array in arrays.items():
                on_host[name] = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
                on_host[name].copy_(array, non_blocking=True)
                array.record_stream(copies)  # its memory is not for others before the copy is done
        copied = torch.cuda.Event()
        copied.record(copies)
        return on_host, copied


def frame_features(
    backbone: FrozenBackbone, images: torch.Tensor, num_frames: int, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """`ClipExtractor.features` of normalised images (B*T, 3, S, S), `num_frames` of each clip."""
    layers = {kind: _layers(names, kind) for kind in ("tokens", "cls", "q", "k", "maps", "block_input")}
    taps = backbone(
        images,
        tokens=sorted({*layers["tokens"], *layers["cls"]}),
        qk=sorted({*layers["q"], *layers["k"], *layers["maps"]}),
        inputs=layers["block_input"],
    )
    computed = _by_array_name(taps) | _maps(taps, layers["maps"], num_frames)
    return {name: computed[name] for name in names if name in computed}


def _layers(names: Iterable[str], kind: str) -> tuple[int, ...]:
    return tuple(int(name.split("/")[1]) for name in names if name.startswith(f"{kind}/"))


def _by_array_name(taps: Taps) -> dict[str, torch.Tensor]:
    named = {"embed": taps.embed}
    named |= {f"tokens/{layer}": tokens for layer, tokens in taps.tokens.items()}
    named |= {f"cls/{layer}": tokens[:, 0] for layer, tokens in taps.tokens.items()}
    named |= {f"block_input/{layer}": tokens for layer, tokens in taps.inputs.items()}
    named |= {f"q/{layer}": q for layer, q in taps.q.items()}
    return named | {f"k/{layer}": k for layer, k in taps.k.items()}


def _maps(taps: Taps, layers: Iterable[int], num_frames: int) -> dict[str, torch.Tensor]:
    """The cross-frame maps of whole clips, where the backbone saw only frames."""

    def clips(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, num_frames))  # (B, T, H, N, d)

    return {f"maps/{layer}": cross_frame_maps(clips(taps.q[layer]), clips(taps.k[layer])) for layer in layers}
