"""The arithmetic of `vcache plan`: how large, how long, and from which epoch on a store pays. Nothing is measured here.

Of one video: d, f = seconds to decode it on all threads, to run the backbone; w, r = seconds to write and to read its bytes.

                        the backbone on a device      all on the same cores
    epoch from videos   max(d, f)                     d + f
    extraction          max(d, f + w)                 d + f + w
    epoch from a store  r                             r

Rows are written between two forward passes, while decoding goes on. The store pays from the first epoch n for which
extraction + n epochs from the store take less than n epochs from videos.
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
    """A video, decoded and preprocessed, with all threads at work."""
    forward_seconds: float
    """A video through the backbone, to arrays as they are stored."""
    write_bytes_per_second: float
    read_bytes_per_second: float
    """Not from memory."""
    shared_cores: bool
    """Decoding and the backbone run on the same processor."""
    num_sampled: int = 0
    """Videos that were decoded for it."""
    num_failed: int = 0
    """Videos of the sample that could not be decoded."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to store the features."""

    dtype: str
    cross_frame: str
    asked: bool
    """Whether it is what the command says."""
    video_bytes: int
    """All arrays of one video."""
    total_bytes: int
    """Of a store of its own, to the byte if no video fails."""
    missing_bytes: int
    """Of these, what is still to be written."""
    missing_files: int
    """Shard files."""
    missing_videos: int
    needed_bytes: int
    """Free space that writing them asks for, with the reserve."""

    @property
    def options(self) -> str:
        return f"--dtype {self.dtype} --cross-frame {self.cross_frame}"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What to expect of a choice on a machine; an epoch is every video of the splits once."""

    extraction_seconds: float
    limit: str
    """The slowest part of the extraction: "decode", "forward" or "disk write"."""
    video_epoch_seconds: float
    """Decoding and running the backbone again."""
    store_epoch_seconds: float
    break_even_epochs: int | None
    """The first number of epochs for which the store has saved time; None if it never does."""


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """What an extraction would do, and the choices beside it."""

    dataset: str
    model: str
    store: Path
    store_exists: bool
    layers: tuple[int, ...]
    num_frames: int
    splits: dict[str, int]
    choices: tuple[Choice, ...]
    free_bytes: int
    free_folder: Path
    decode_workers: int
    batch_size: int
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
    decode, forward = rates.decode_seconds, rates.forward_seconds
    # Of videos of which a part is stored, only the rest is written.
    write = choice.missing_bytes / max(1, choice.missing_videos) / rates.write_bytes_per_second
    together = decode + forward + write if rates.shared_cores else max(decode, forward + write)
    extraction = choice.missing_videos * together
    from_videos = num_videos * (decode + forward if rates.shared_cores else max(decode, forward))
    from_store = num_videos * choice.video_bytes / rates.read_bytes_per_second
    parts = {"decode": decode, "forward": forward, "disk write": write}
    return Forecast(
        extraction_seconds=extraction,
        limit=max(parts, key=parts.__getitem__),
        video_epoch_seconds=from_videos,
        store_epoch_seconds=from_store,
        break_even_epochs=break_even_epochs(extraction, from_videos, from_store),
    )


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
    if best is None or best.asked or (times := plan.asked.video_bytes / best.video_bytes) < _WORTH_SAYING:
        return ""
    return f" {best.options} reads {times:.1f} times less."


def _best(plan: ExtractionPlan) -> Choice | None:
    """The smallest choice that fits, pays, and serves the same heads: attention between frames is kept where it was asked."""
    same_heads = [choice for choice in plan.choices if plan.asked.cross_frame == "none" or choice.cross_frame != "none"]
    usable = [choice for choice in same_heads if plan.fits(choice) and _pays(plan, choice)]
    return min(usable, key=lambda choice: choice.video_bytes, default=None)


def _pays(plan: ExtractionPlan, choice: Choice) -> bool:
    expected = plan.forecast(choice)
    return expected is None or expected.break_even_epochs is not None
