"""Real layouts in miniature. No video is opened by a dataset, so that empty files do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vcache.extract.datasets.base import DatasetError
from vcache.extract.datasets.registry import load_dataset

LayOut = Callable[[dict[str, object]], Path]


@pytest.fixture
def lay_out(tmp_path: Path) -> LayOut:
    """lay_out({path: content}) -> root: None is an empty file, a list its lines, bytes are bytes, a .json any value."""

    def write(files: dict[str, object]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".json") and not isinstance(content, bytes):
                path.write_text(json.dumps(content))
            elif isinstance(content, list):
                path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
            else:
                path.write_bytes(content if isinstance(content, bytes) else b"")
        return tmp_path

    return write


@pytest.fixture
def refused() -> Callable[..., None]:
    """refused(name or path, root, file, line, words): loading raises DatasetError with exactly this place and these words."""

    def check(name: str, root: Path | None, file: Path | None, line: int | None, words: str) -> None:
        with pytest.raises(DatasetError) as caught:
            load_dataset(name, root=root)
        assert (caught.value.file, caught.value.line) == (file, line), str(caught.value)
        assert words in str(caught.value)

    return check
