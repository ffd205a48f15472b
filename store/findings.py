"""What `verify_store` reports: damage and harmless leftovers, each with its place and what to do."""

from dataclasses import dataclass

from vcache.store.object_path import StorePath


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

    Kinds of notes, which take space and do no other harm:
        orphan      a shard file that no commit record names
        temporary   what a killed writer left, or a living one is writing
        unknown     a file that is not part of a store
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

    @property
    def ok(self) -> bool:
        return not self.findings


def redo(record: StorePath) -> str:
    """How to mend what a commit record says is there."""
    return f"Delete {record} and run `vcache extract` again: it redoes that shard only."
