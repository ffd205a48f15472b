"""The arithmetic of `vcache plan`: how large, how long, and from which epoch on a store pays. Nothing is measured here.

Of one video, in seconds: d to decode it once and to prepare its views, with all decode processes at work; f for the forward
passes of all its views through all models; w to write its bytes and r to read those of one view; d1, f1 are d and f of one
view. A view costs a forward pass and no second decode. c(x) is what x takes of the cores: decoding of as many as there are
processes, writing its checksums and copies.

                        the backbone on a device    all on the same cores
    extraction          max(d, f, w)                max(c(d) + f + c(w), d, w)
    epoch from videos   max(d1, f1)                 max(c(d1) + f1, d1)
    epoch from a store  r                           r

Decoding, the backbone and the writer are at work on different videos at the same time (stages.py), so that the slowest counts,
unless they share the cores. The store pays from the first epoch n for which extraction + n epochs from the store take less
than n epochs from videos. Start-up, and the 40 videos that int8 is calibrated with, are left out.
"""

from dataclasses import dataclass
from pathlib import Path

from vcache.pipelines.console import duration, size

# Another choice is worth a word if it reads this much less.
_WORTH_SAYING = 1.5


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine was measured to do."""

    decode_seconds: float
    """A video, decoded once and all its views prepared, with all decode processes at work."""
    view_decode_seconds: float
    """The same with one view prepared."""
    forward_seconds: tuple[float, ...]
    """A clip through each of the models, to arrays as they are stored."""
    write_bytes_per_second: float
    read_bytes_per_second: float
    """Not from memory."""
    shared_cores: bool
    """Decoding and the backbone run on the same processor."""
    decode_cores: float = 1.0
    """Share of the cores that decoding takes at its rate."""
    write_cores: float = 0.0
    """Share of the cores that writing takes at its rate."""
    num_sampled: int = 0
    """Videos that were decoded for it."""
    num_failed: int = 0
    """Videos of the sample that could not be decoded."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to store the features, of all models of the command."""

    dtype: str
    cross_frame: str
    asked: bool
    """Whether it is what the command says."""
    video_bytes: int
    """All arrays of all views of one video, of the split that has most."""
    view_bytes: int
    """All arrays of one view, which is what an epoch reads of a video."""
    total_bytes: int
    """Of stores of their own: the shard files to the byte if no video fails, and the frozen weights that "derive" needs."""
    missing_bytes: int
    """Of these, what is still to be written."""
    missing_files: int
    """Shard files."""
    missing_videos: int
    """To be decoded, each once for all views and models."""
    missing_clips: tuple[int, ...]
    """To go through each of the models: a clip of each view, and what fills the last batch of a shard."""
    needed_bytes: int
    """Free space that writing them asks for, with the reserve."""

    @property
    def options(self) -> str:
        return f"--dtype {self.dtype} --cross-frame {self.cross_frame}"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to expect of a choice on a machine; an epoch is one view of every video of the splits."""

    extraction_seconds: float
    limit: str
    """What the others wait for, as the progress line says it: "decode", "device" or "disk"."""
    video_seconds: dict[str, float]
    """What each of the three takes for one video of the extraction."""
    video_epoch_seconds: float
    """Decoding and running the backbone again."""
    store_epoch_seconds: float
    break_even_epochs: int | None
    """The first number of epochs for which the store has saved time; None if it never does."""


@dataclass(frozen=True, kw_only=True)
class PlannedStore:
    """One store that the command writes or extends."""

    path: Path
    is_there: bool
    model: str
    layers: tuple[int, ...]
    """Absolute."""
    stem: bool = False
    """Whether what enters block 0 is stored, too."""
    batch_size: int
    """Clips of a forward pass."""
    to_retry: int
    """Videos that failed before and are to be extracted again; no number of the plan counts them."""


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """What an extraction would do, and the choices beside it."""

    dataset: str
    stores: tuple[PlannedStore, ...]
    """One of each model."""
    num_frames: int
    splits: dict[str, int]
    """Videos of each."""
    views: dict[str, int]
    """Views of each video of a split."""
    part: tuple[int, int] | None
    """(3, 16): what is missing is that of the third of 16 processes; the free space is looked at for all of them."""
    choices: tuple[Choice, ...]
    free_bytes: int
    free_folder: Path
    decoder: str
    decode_workers: int
    device: str
    rates: Rates | None
    """None if nothing was measured."""

    @property
    def num_videos(self) -> int:
        return sum(self.splits.values())

    @property
    def asked(self) -> Choice:
        return next(choice for choice in self.choices if choice.asked)

    def fits(self, choice: Choice) -> bool:
        return choice.needed_bytes <= self.free_bytes

    def forecast(self, choice: Choice) -> Forecast | None:
        """None if nothing was measured."""
        return forecast(choice, self.rates, self.num_videos) if self.rates else None


def forecast(choice: Choice, rates: Rates, num_videos: int) -> Forecast:
    """Seconds of the extraction and of an epoch, and the number of epochs from which on the store saves time."""
    videos = max(1, choice.missing_videos)
    clips = zip(choice.missing_clips, rates.forward_seconds, strict=True)
    decode, forward = rates.decode_seconds, sum(number * seconds for number, seconds in clips) / videos
    # Of videos of which a part is stored, only the rest is written.
    write = choice.missing_bytes / videos / rates.write_bytes_per_second
    computing = _together(decode, forward, write * rates.write_cores, rates)
    extraction = choice.missing_videos * max(computing, write)
    from_videos = num_videos * _together(rates.view_decode_seconds, sum(rates.forward_seconds), 0.0, rates)
    from_store = num_videos * choice.view_bytes / rates.read_bytes_per_second
    return Forecast(
        extraction_seconds=extraction,
        limit="disk" if write > computing else "decode" if decode > forward else "device",
        video_seconds={"decode": decode, "device": forward, "disk": write},
        video_epoch_seconds=from_videos,
        store_epoch_seconds=from_store,
        break_even_epochs=break_even_epochs(extraction, from_videos, from_store),
    )


def _together(decode: float, forward: float, write_cores: float, rates: Rates) -> float:
    """Seconds in which a video is decoded and computed, where others are at the same time."""
    if not rates.shared_cores:
        return max(decode, forward)
    return max(decode, rates.decode_cores * decode + forward + write_cores)


def break_even_epochs(extraction: float, from_videos: float, from_store: float) -> int | None:
    """The smallest n >= 1 with extraction + n * from_store < n * from_videos; None if there is none."""
    saved = from_videos - from_store
    return int(extraction // saved) + 1 if saved > 0 else None


def recommendation(plan: ExtractionPlan) -> str:
    """One sentence or two: whether to do what was asked, and what to ask for instead."""
    asked = plan.asked
    if not plan.fits(asked):
        needed = f"It does not fit: {size(asked.needed_bytes)} are needed and {size(plan.free_bytes)} are free."
        return f"{needed} {_instead(plan, 'fits') or 'No choice here fits: name another disk with --store.'}"
    expected = plan.forecast(asked)
    if expected is None:
        return "It fits." if asked.missing_bytes else "All of it is stored: there is nothing to extract."
    epochs = (
        f"{duration(expected.store_epoch_seconds)} from the store, {duration(expected.video_epoch_seconds)} from videos"
    )
    if expected.break_even_epochs is None:
        other = (
            _instead(plan, "pays") or "No choice here does: train from the videos, or put the store on a faster disk."
        )
        return f"It does not pay: an epoch takes {epochs}. {other}"
    if not asked.missing_bytes:
        return f"All of it is stored: an epoch takes {epochs}."
    return f"It pays from epoch {expected.break_even_epochs} on: an epoch takes {epochs}.{_smaller(plan)}"


def _instead(plan: ExtractionPlan, what: str) -> str:
    """The choice to ask for where the one that was asked for will not do; empty if none will."""
    best = _best(plan)
    return f"{best.options} {what}, with {size(best.video_bytes)} a video." if best else ""


def _smaller(plan: ExtractionPlan) -> str:
    best = _best(plan)
    if best is None or best.asked or (times := plan.asked.view_bytes / best.view_bytes) < _WORTH_SAYING:
        return ""
    return f" {best.options} reads {times:.1f} times less."


def _best(plan: ExtractionPlan) -> Choice | None:
    """The smallest choice that fits, pays, and serves the same heads: attention between frames is kept where it was asked."""
    same_heads = [choice for choice in plan.choices if plan.asked.cross_frame == "none" or choice.cross_frame != "none"]
    usable = [choice for choice in same_heads if plan.fits(choice) and _pays(plan, choice)]
    return min(usable, key=lambda choice: choice.view_bytes, default=None)


def _pays(plan: ExtractionPlan, choice: Choice) -> bool:
    expected = plan.forecast(choice)
    return expected is None or expected.break_even_epochs is not None
