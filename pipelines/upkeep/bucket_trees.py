"""A store in a bucket that is to go. Objects have neither folders to rename nor locks: its zarr.json is deleted first, so that
nothing opens what a kill leaves, and the same command deletes the rest."""

from dataclasses import dataclass

from vcache.pipelines.upkeep.recognising import is_store
from vcache.pipelines.upkeep.trees import RemovalError
from vcache.store.layout import METADATA
from vcache.store.object_path import ObjectPath

_COMMITS = "_commit/"


@dataclass(frozen=True, kw_only=True)
class ObjectTree:
    """The objects of a store, when they were listed."""

    path: ObjectPath
    files: dict[str, int]
    """Bytes of each object by its whole key."""

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def is_whole(self) -> bool:
        """Whether it opens; else it is what an interrupted removal, or creation, left."""
        return f"{self.path.key}/{METADATA}" in self.files


def list_objects(path: ObjectPath) -> ObjectTree:
    """
    Raises:
        RemovalError: there is nothing, or something that is no store and no remains of one.
        StoreUnavailable: the bucket cannot be asked.
    """
    import obstore

    if not path.key:
        raise RemovalError(f"{path} is a whole bucket, and only stores are removed. Name one:  s3://BUCKET/STORE.zarr")
    batches = path.ask("listed", lambda client: list(obstore.list(client, path.key, chunk_size=1000)))
    tree = ObjectTree(path=path, files={meta["path"]: meta["size"] for batch in batches for meta in batch})
    if not tree.files:
        raise RemovalError(f"there is nothing at {path}. The stores beside it are listed by:  vcache ls {path.parent}")
    if not any(key.startswith(f"{path.key}/{_COMMITS}") for key in tree.files):
        raise RemovalError(f"{path} is no store of vcache, so it is left alone: it has no commit records.")
    if tree.is_whole and not is_store(path):
        raise RemovalError(f"{path} is no store of vcache, so it is left alone: its {METADATA} is of something else.")
    return tree


def remove_objects(tree: ObjectTree, first: str) -> None:
    """Delete the listed objects and no others, `first` before the rest."""
    import obstore

    head = f"{tree.path.key}/{first}"
    for keys in ([head] if head in tree.files else [], [key for key in tree.files if key != head]):
        if keys:
            tree.path.ask("deleted", lambda client, keys=keys: obstore.delete(client, keys))  # type: ignore[misc]
