"""The folder of all stores, for whoever may not load zarr."""

import os
from pathlib import Path


def vcache_home() -> Path:
    """`$VCACHE_HOME`, else `$XDG_CACHE_HOME/vcache`, else `~/.cache/vcache`. Not created here."""
    if home := os.environ.get("VCACHE_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vcache"
