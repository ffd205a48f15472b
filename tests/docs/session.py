"""Runs the commands of a page one after the other in one folder, as a reader would, on small stand-ins."""

import contextlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from pages import Command

from vcache.pipelines.cli import main
from vcache.pipelines.demo import render

TEXT_STAND_INS = {
    # As many videos and epochs as the pages say would take minutes.
    "--train 320 --val 100": "--train 20 --val 10",
    "--train 400 --val 100": "--train 24 --val 10",
    "--set epochs=20": "--set epochs=2",
}
"""What is written otherwise, wherever it stands."""

OPTION_STAND_INS: dict[str, tuple[tuple[str, ...], ...]] = {
    # OpenAI's weights are a download. A page that names a model gets that one.
    "extract": (("--model", "local-dir:pipelines/demo/tiny_clip"),),
    # The model again; and one second of measuring in place of twenty.
    "plan": (("--model", "local-dir:pipelines/demo/tiny_clip"), ("--seconds", "1")),
    "train-head": (("--epochs", "2"), ("--batch-size", "8")),
    "sweep": (("--epochs", "2"), ("--batch-size", "8"), ("--seeds", "1")),
}
"""Options that a command gets besides; of those in LEFT_ALONE only where the page does not give them."""
LEFT_ALONE = {"--model"}


@dataclass
class Session:
    """A folder in which the commands of a page are run."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def run(self, command: Command) -> tuple[int, str]:
        """Exit status, and all that was printed."""
        text = command.text
        for written, stands_in in TEXT_STAND_INS.items():
            text = text.replace(written, stands_in)
        words = shlex.split(text)
        if words[0] == "vcache":
            return self._vcache(_with_options(words[1:]))
        if words[:3] == ["python", "-m", "vcache.pipelines.demo.render"]:
            return _caught(lambda: render.main(words[3:]))
        done = subprocess.run(["bash", "-ec", text], cwd=self.folder, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def as_in_the_root(self, printed: str) -> str:
        """The text with paths from the root of the clone, as a page has them."""
        clone = (self.folder / "pipelines").resolve().parent
        for root in (self.folder, clone):
            printed = printed.replace(f"{root}/", "").replace(str(root), ".")
        return printed

    def _vcache(self, words: list[str]) -> tuple[int, str]:
        self.monkeypatch.setattr(sys, "argv", ["vcache", *words])
        return _caught(main)


def _with_options(words: list[str]) -> list[str]:
    extra: list[str] = []
    for option in OPTION_STAND_INS.get(words[0], ()):
        if option[0] not in words or option[0] not in LEFT_ALONE:
            extra += option
    return [*words, *extra]


def _caught(call: Callable[[], None]) -> tuple[int, str]:
    out = io.StringIO()
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            call()
        except SystemExit as exit:
            status = exit.code or 0
            if isinstance(status, str):
                print(status)
                status = 1
    return int(str(status)), out.getvalue()


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> Session:
    """An empty folder as the root of a clone: the tiny CLIP lies where it lies there."""
    (folder / "pipelines").symlink_to(Path(render.__file__).resolve().parents[1])
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Session(folder, monkeypatch)
