"""Before the first shard: the channel statistics that int8 needs, and the error that the chosen dtype makes, on a sample.

The sample is the first videos that decode, in an order that is shuffled once and for all, so that it is the same at any resume
point and with any number of workers. Of int8, four of five videos give the statistics and the fifth measures. Both are recorded
once per array: a later run measures only what it adds.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from vcache.extract.datasets.base import Video
from vcache.extract.video import VideoError
from vcache.extract.views import PreparedClip
from vcache.heads.query_key import QueryKeyProjection
from vcache.pipelines.batches import COMPUTED, ClipExtractor
from vcache.pipelines.derivation import input_array
from vcache.pipelines.precision import dequantised, encoded
from vcache.pipelines.precision_error import MAX_ERROR, Error, ErrorSums, check_error, maps_moved
from vcache.store.constants import Constant, write_constants
from vcache.store.errors import CorruptStore
from vcache.store.layout import ArraySpec
from vcache.store.quantise import ChannelMoments, constant_names
from vcache.store.reader import FeatureStore
from vcache.store.writer import record_facts

_SAMPLE, _HELD_OUT = 40, 5  # every fifth
_FLOAT_SAMPLE = 4  # rounding is alike on all videos


class CalibrationError(ValueError):
    """There is no video to take statistics of."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Channel means and deviations by name of the constant, and measured errors by name of the array (see `ErrorSums`)."""

    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    errors: Mapping[str, Error] = field(default_factory=dict)


def stored_calibration(store: FeatureStore) -> Calibration:
    """What is recorded in a store. A constant whose files are lost is left out: it is made again."""
    constants: dict[str, np.ndarray] = {}
    for name in store.manifest.constants:
        try:
            constants[name] = store.constant(name)
        except CorruptStore:
            continue
    return Calibration(constants=constants, errors=store.manifest.facts.get("errors", {}))


def record_calibration(store: FeatureStore, new: Calibration) -> None:
    """Write it, constants first: a run that dies in between measures again."""
    write_constants(store, {name: Constant(("channel",), values) for name, values in new.constants.items()})
    if new.errors:
        record_facts(store, {"errors": {**store.manifest.facts.get("errors", {}), **new.errors}})


def calibrate(
    extractor: ClipExtractor,
    arrays: Iterable[ArraySpec],
    known: Calibration,
    *,
    derived: Iterable[int] = (),
    max_error: float = MAX_ERROR,
) -> Calibration:
    """What is not known yet of these arrays; nothing is written. float32 has no error and is not looked at.

    Args:
        derived: layers whose queries and keys are to be made of what enters the block, so that the maps can be compared.

    Raises:
        PrecisionRefused: an array would lose more than is allowed; names it.
        CalibrationError: int8 needs statistics, and no video can be decoded.
    """
    specs = {spec.name: spec for spec in arrays if spec.name.split("/")[0] in COMPUTED and spec.dtype != "float32"}
    lacking = [name for name in specs if _needs_statistics(specs[name], known)]
    unmeasured = {name: spec for name, spec in specs.items() if name not in known.errors}
    if not lacking and not unmeasured:
        return Calibration()
    # Also where the statistics are known, int8 is measured on the videos that were not used for them.
    int8 = any(spec.dtype == "int8" for spec in specs.values())
    clips = itertools.islice(_decodable(extractor), _SAMPLE if int8 else _FLOAT_SAMPLE)
    constants, held_out = _statistics(extractor, clips, lacking) if int8 else ({}, list(clips))
    projections = _projections(extractor, derived)
    errors = _measure(extractor, held_out, unmeasured, {**known.constants, **constants}, projections)
    for name, error in errors.items():
        check_error(unmeasured[name], error, max_error)
    return Calibration(constants=constants, errors=errors)


def _needs_statistics(spec: ArraySpec, known: Calibration) -> bool:
    return spec.dtype == "int8" and not known.constants.keys() >= set(constant_names(spec.name))


def _decodable(extractor: ClipExtractor) -> Iterator[PreparedClip]:
    """Clips of the first split, then of the others: each shuffled, as a list is often sorted by class."""
    dataset = extractor.dataset
    splits = [dataset.split(split) for split in dataset.splits]
    order = [videos[row] for videos in splits for row in np.random.default_rng(0).permutation(len(videos))]
    with ThreadPoolExecutor(extractor.num_threads, thread_name_prefix="calibrate") as pool:
        for start in range(0, len(order), extractor.num_threads):
            prepared = pool.map(lambda video: _prepared(extractor, video), order[start : start + extractor.num_threads])
            yield from (clip for clip in prepared if clip is not None)


def _prepared(extractor: ClipExtractor, video: Video) -> PreparedClip | None:
    try:
        return extractor.prepare(video)
    except VideoError:
        return None


def _statistics(
    extractor: ClipExtractor, clips: Iterable[PreparedClip], names: list[str]
) -> tuple[dict[str, np.ndarray], list[PreparedClip]]:
    """Constants of these arrays, and the clips that are not used for constants; if there are so few, the last that is."""
    moments: dict[str, ChannelMoments] = {name: ChannelMoments() for name in names}
    held_out: list[PreparedClip] = []
    last = None
    for number, clip in enumerate(clips, start=1):
        if number % _HELD_OUT == 0:
            held_out.append(clip)
            continue
        last, features = clip, extractor.features([clip], names) if names else {}
        for name in names:
            moments[name].add(features[name].float().cpu().numpy())
    if last is None:
        raise CalibrationError("none of the videos can be decoded, so there is nothing to calibrate --dtype int8 with.")
    constants: dict[str, np.ndarray] = {}
    for name in names:
        constants |= dict(zip(constant_names(name), moments[name].constants(), strict=True))
    return constants, held_out or [last]


def _projections(extractor: ClipExtractor, layers: Iterable[int]) -> dict[str, QueryKeyProjection]:
    """What makes queries and keys, by the array that it reads."""
    backbone, facts = extractor.backbone, extractor.backbone.facts
    return {
        input_array(layer): QueryKeyProjection(
            *backbone.query_key_weights(layer), facts.num_heads, facts.layer_norm_eps
        )
        for layer in layers
    }


def _measure(
    extractor: ClipExtractor,
    clips: list[PreparedClip],
    specs: Mapping[str, ArraySpec],
    constants: Mapping[str, np.ndarray],
    projections: Mapping[str, QueryKeyProjection],
) -> dict[str, Error]:
    """The error of each array over all the clips; nothing where there is no clip."""
    device = extractor.backbone.device
    on_device = {name: torch.tensor(values, device=device) for name, values in constants.items()}
    sums = {name: ErrorSums(spec) for name, spec in specs.items()}
    for clip in clips:  # one by one, so that the batch size of the extraction changes nothing
        exact = {name: x.float() for name, x in extractor.features([clip], specs).items()}
        back = {
            name: dequantised(encoded(name, exact[name], spec.dtype, on_device), name, on_device).float()
            for name, spec in specs.items()
        }
        moved = maps_moved(exact, back, projections)
        for name in specs:
            sums[name].add(exact[name], back[name], moved.get(name))
    return {name: sums[name].result() for name in specs} if clips else {}
