"""The files of a store: what is in them, and damage to them."""

from pathlib import Path


def tree(path: Path) -> dict[str, bytes]:
    """Every file under `path` with its bytes."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def flip(path: Path, position: int, mask: int = 4) -> None:
    """Change bits of one byte; a negative position counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)
