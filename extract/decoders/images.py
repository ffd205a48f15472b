"""Folders of frames, as lists of rawframes name them: img_00001.jpg, img_00002.jpg, ... through Pillow.

A folder is checked by its names, and only the images that are wanted are opened. Frame i is the image of the i-th number,
whether they begin at 0, at 1 or, for a piece of a longer video, anywhere. A list that says how many frames there are asks for
the segment of so many: a folder with fewer is refused, and of one with more the first are taken.
"""

import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError, features

from vcache.extract.decoders import Decoder
from vcache.extract.video import Damage, DecodedVideo, DecodeRequest, VideoError, distinct_frames

_NAME = re.compile(r"(?P<prefix>.*?)(?P<number>\d+)\.(jpe?g|png|webp|bmp)", re.IGNORECASE)
_PREFIXES_OF_FRAMES = ("img_", "image_", "frame_")
"""Of folders that hold optical flow beside the frames, as flow_x_00001.jpg."""


class ImagesDecoder(Decoder):
    """Pillow, one image after the other."""

    def check_available(self) -> None:
        """Nothing to do: Pillow is a dependency of the package, and imported above."""

    def versions(self) -> dict[str, str]:
        """Pillow and the JPEG library in it."""
        jpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg") or "none"
        return {"decoder": "images", "pillow": PIL.__version__, "libjpeg": jpeg}

    def decode(self, request: DecodeRequest) -> DecodedVideo:
        """Read the wanted frames of a folder."""
        damage = Damage(allow_partial=request.allow_partial)
        try:
            return _decode(request, _list_frames(request.path, damage), damage)
        except VideoError as error:
            if damage.first is None:
                raise
            raise damage.first from error


decoder = ImagesDecoder()


def _list_frames(folder: Path, damage: Damage) -> list[Path]:
    """The images in the order of their numbers, all with the same prefix and none missing."""
    try:
        found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    except NotADirectoryError as error:
        raise VideoError("not_video", "decoder 'images' reads folders of frames, and this is a file") from error
    except OSError as error:
        raise VideoError("missing", f"the folder cannot be read: {error.strerror or error}") from error
    if not found:
        raise VideoError("no_frames", "the folder holds no numbered images, as img_00001.jpg")
    sequences: defaultdict[str, list[tuple[int, Path]]] = defaultdict(list)
    for match, path in found:
        sequences[match["prefix"]].append((int(match["number"]), path))
    frames = sorted(sequences[_prefix_of_frames(list(sequences))])
    _check_numbers([number for number, _ in frames], damage)
    return [path for _, path in frames]


def _prefix_of_frames(prefixes: list[str]) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    known = [prefix for prefix in prefixes if prefix.lower() in _PREFIXES_OF_FRAMES]
    if len(known) == 1:
        return known[0]
    names = ", ".join(sorted(f"{prefix}*" for prefix in prefixes)[:5])
    raise VideoError("not_video", f"the folder holds images of {len(prefixes)} names: {names}")


def _check_numbers(numbers: list[int], damage: Damage) -> None:
    """Report the first number that is there twice, or that should be."""
    for before, number in pairwise(numbers):
        if number == before:
            raise VideoError("frame_count", f"frame {number} is there twice")
        if number > before + 1:
            count = f"{len(numbers)} frames from {numbers[0]} to {numbers[-1]}"
            damage.report(VideoError("frame_count", f"frame {before + 1} is missing: there are {count}"))


def _decode(request: DecodeRequest, paths: list[Path], damage: Damage) -> DecodedVideo:
    """Read the wanted frames; where parts are allowed, without the images that cannot be read."""
    if request.segment is not None and request.segment.unit == "seconds":
        raise VideoError("decode_error", "a folder of frames has no times; give the segment in frames")
    while paths:
        segment, clips = _of_what_is_left(request, len(paths), damage).resolve(len(paths), range(len(paths)))
        numbers = distinct_frames(clips)
        images: list[np.ndarray] = []
        for number in numbers:
            try:
                images.append(_read(paths[number]))
            except VideoError as error:
                damage.report(error)
                paths = [*paths[:number], *paths[number + 1 :]]
                break
        else:
            return DecodedVideo(
                frames=_stack(images), numbers=numbers, clips=clips, num_video_frames=len(paths), fps=None,
                first_frame=segment.start, damage=damage.first,
            )  # fmt: skip
    raise VideoError("no_frames", "none of the images can be read")


def _of_what_is_left(request: DecodeRequest, num_frames: int, damage: Damage) -> DecodeRequest:
    """Of a damaged folder the segment ends with the last image: a list that says how many there are counts the lost ones."""
    segment = request.segment
    if damage.first is None or segment is None or not segment.start < num_frames < segment.stop:
        return request
    return replace(request, segment=replace(segment, stop=num_frames))


def _read(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        if path.stat().st_size == 0:
            raise VideoError("truncated", f"{path.name} has no bytes")
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise VideoError("decode_error", f"{path.name} is no image that Pillow knows") from error
    # Of the disk, or Pillow's for what is damaged, ends early, or claims to be enormous.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kind = "truncated" if "truncated" in str(error).lower() else "decode_error"
        raise VideoError(kind, f"{path.name}: {getattr(error, 'strerror', None) or error}") from error


def _stack(images: list[np.ndarray]) -> UInt8[np.ndarray, "F H W 3"]:
    if len(sizes := {image.shape[:2] for image in images}) > 1:
        told = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
        raise VideoError("decode_error", f"the frames differ in size: {told}")
    return np.stack(images)
