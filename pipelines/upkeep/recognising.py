"""Whether a folder is a store of vcache, of any version and in any state: what is not recognised is never removed."""

import json
from typing import Any

from vcache.store.layout import METADATA
from vcache.store.manifest import ATTRIBUTE
from vcache.store.object_path import StorePath


def manifest_told(path: StorePath) -> dict[str, Any] | None:
    """What the zarr.json of a store says, damaged or not; None if it is not one of ours."""
    try:
        told = json.loads((path / METADATA).read_bytes())["attributes"][ATTRIBUTE]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return told if isinstance(told, dict) and "format_version" in told else None


def is_store(path: StorePath) -> bool:
    """Whether there is a zarr.json of one of our stores."""
    return manifest_told(path) is not None
