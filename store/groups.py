"""Writing the zarr.json of groups: those between a store and its arrays, and the store's own, which holds the manifest."""

from vcache.store.files import sync_folder, write_durably
from vcache.store.layout import METADATA, encode_metadata, group_metadata
from vcache.store.manifest import ATTRIBUTE, Manifest
from vcache.store.object_path import StorePath


def encode_manifest(manifest: Manifest) -> bytes:
    return encode_metadata(group_metadata({ATTRIBUTE: manifest.to_json()}))


def write_manifest(store: StorePath, manifest: Manifest) -> None:
    """Replace the manifest of a store: at any moment there is the old one or the new one."""
    write_durably(store / METADATA, encode_manifest(manifest))


def make_groups(folder: StorePath, top: StorePath) -> None:
    """Make `folder` and the folders between it and `top` Zarr groups; `top` is one already."""
    if folder == top:
        return
    make_groups(folder.parent, top)
    folder.mkdir(exist_ok=True)
    if not (folder / METADATA).exists():
        write_durably(folder / METADATA, encode_metadata(group_metadata()))
        sync_folder(folder.parent)
