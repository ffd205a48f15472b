"""What `verify_store` reports: damage and harmless leftovers, each with its place and what to do."""

import shlex
from dataclasses import dataclass

from vcache.store.object_path import StorePath

DEEP_KINDS = ("spec", "differs", "unchecked")
"""Findings about the videos and the backbone, not about the bytes of the store."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, and where. Fields that do not apply are None, or empty.

    Kinds of damage:
        manifest    the zarr.json of the store
        table       the table of videos of a part, or two parts of a split that share a video
        constant    an array of the whole store is missing, damaged or not the one that the manifest names
        record      a commit record is damaged, or contradicts the manifest, the video table or another record
        metadata    the zarr.json of an array or group is missing, damaged, or not what was committed
        missing     a committed shard file is not there
        unreadable  the operating system fails to read a file
        size        a shard file is longer or shorter than committed
        index       the index of a shard file is damaged, is not the committed one, or does not fit the rows
        chunk       the data of `rows` do not match their checksum
        exchanged   every chunk matches its checksum, but they are not those that were committed: a whole shard was
                    exchanged for another
        not_finite  the data of `rows` hold NaN or infinity

    Kinds of what `vcache verify --deep` finds, and no repair can mend:
        spec        the weights, or another field of the key, are not those that the store was made with
        differs     the features of `rows` are not what their videos give
        unchecked   nothing could be extracted again, so nothing was checked

    Kinds of notes, which take space and do no other harm:
        orphan      a shard file that no commit record names
        temporary   what a killed writer left, or a living one is writing
        unknown     a file that is not part of a store
        versions    libraries or decoder are of another version than the store was made with (--deep)
        gone        the video of `rows` cannot be read any more (--deep)
    """

    kind: str
    message: str
    """What is wrong and what to do."""
    path: StorePath
    split: str | None = None
    """The part: "train", or "train+1" if the split has grown. Shards and rows are those of the part."""
    view: int | None = None
    shard: int | None = None
    array: str | None = None
    rows: tuple[int, ...] = ()
    """Empty if the finding is not about single rows."""
    video_ids: tuple[str, ...] = ()
    """Of `rows`; empty also if the video table is damaged."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify_store` found and how much it looked at."""

    findings: tuple[Finding, ...]
    """Damage."""
    notes: tuple[Finding, ...]
    """Harmless leftovers."""
    num_shards: int
    """Committed shards of all parts and views; a shard of many arrays counts once."""
    num_files: int
    num_bytes: int
    """Size of the committed shard files."""
    num_rows: int
    """Rows of the committed shards, failed ones too."""
    num_failures: int
    """Those of `num_rows` that failed in some pass."""
    num_partial: int = 0
    """Those of `num_rows` that some pass stored although their video is damaged."""

    @property
    def ok(self) -> bool:
        return not self.findings


def mend_command(store: StorePath | str, record: StorePath | str | None = None) -> str:
    """How to mend what is damaged in the store at this path; `record` is the commit record of the damaged shard."""
    if not str(store).startswith("s3://"):
        return f"Mend it with:  vcache repair {shlex.quote(str(store))}"
    if record is not None:
        return f"Delete {record} and run `vcache extract` again: it redoes that shard only."
    return "Copy the store to a local folder, run `vcache repair` on it there, and copy what changed back."
