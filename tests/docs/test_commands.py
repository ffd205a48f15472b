"""Every command line of the README and of the tutorial is run, in the order of the page and in one folder."""

import re
import shutil
from pathlib import Path

import pytest
from pages import Command, commands
from session import Session, prepare

from vcache.pipelines.demo.motions import MOTIONS
from vcache.pipelines.demo.render import render_world

RUN = ("README.md", "docs/tutorial.md")
NOT_RUN = {
    "pip install .": "would install the package over the one under test; .ci/run does it for the wheel",
    "make demo": "tests/pipelines/demo/test_run.py runs what it runs",
    "make test": "is this test among others",
    "make check": "has a step of its own in .ci/run",
    "make test-slow": "takes minutes",
}

RESULTS = {
    rf"\b(?:{'|'.join(MOTIONS)})\b".replace(" ", "[ _]"): "CLASS",
    r"limited by \w+ [\d.]+%(?: \(.*?\))?": "limited by ONE",
    r"; the best was [\d.]+% after epoch \d+": "",
    # Sweeps have one seed here.
    r", mean ± standard deviation over seeds": "",
    r"(?:\* |\*\*)?([\d.]+)(?: ± [\d.]+)?(?:\*\*)?(?= +[│|])": r"\1",
    r"(?<=\d)-(?=\d+\.\d)": " ",
}
"""What comes out otherwise where videos and epochs are few, and what stands for it on both sides."""
DIFFERS = {
    "CLASS N N%": "a class without a mistake, as there are after 15 epochs",
}
"""Lines, as `masked` has them, that a page may show though they are not printed here, and why."""


def make_videos(folder: Path) -> None:
    """What the README takes for granted: my-videos, a video that is new, and two classes of a Kinetics-400."""
    csv = render_world(folder / "vcache-demo" / "world", train=20, val=10)
    shutil.copytree(csv.parent, folder / "my-videos")
    shutil.copy(csv.parent / "val" / "moves_left" / "00001.mp4", folder / "new-video.mp4")
    rows: dict[str, list[str]] = {"train": [], "val": []}
    for index, video in enumerate(sorted((folder / "my-videos").glob("*/moves_*/*.mp4"))):
        split, name = video.parts[-3], f"{index:011d}_000000_000010"
        (folder / "data" / "k400" / split).mkdir(parents=True, exist_ok=True)
        (folder / "data" / "k400" / split / f"{name}.mp4").hardlink_to(video)
        rows[split].append(f"{video.parent.name.replace('_', ' ')},{index:011d},0,10,{split}\n")
    for split, lines in rows.items():
        header = "label,youtube_id,time_start,time_end,split\n"
        (folder / "data" / "k400" / f"{split}.csv").write_text(header + "".join(lines))


@pytest.mark.timeout(900)  # half a minute of one core, which others may be using
@pytest.mark.parametrize("page", RUN)
def test_every_line_ends_as_the_page_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = prepare(tmp_path, monkeypatch, {"VCACHE_DATA": str(tmp_path / "data")})
    if page == "README.md":
        make_videos(tmp_path)
    lines = [command for command in commands(page) if command.text not in NOT_RUN]
    assert len(lines) > 10
    for command in lines:
        check(session, command)


def check(session: Session, command: Command) -> None:
    """A line whose output on the page is an error ends with 1, any other with 0; what is shown is what is printed."""
    status, printed = session.run(command)
    expected = 1 if command.output.startswith("error: ") else 0
    assert status == expected, f"{command}\nended with {status}:\n{printed}"
    shown = [line for line in masked(command.output) if not line.startswith("[...")]
    there = masked(session.as_in_the_root(printed))
    missing = [line for line in shown if line not in there and line not in DIFFERS]
    assert missing == [], f"{command}\nshows what is not printed: {missing}\nbut:\n{printed}"


def masked(text: str) -> list[str]:
    """Lines without what differs with data and machine: numbers with their units, plurals, bars, blanks, classes, what limits."""
    for pattern, stands_in in RESULTS.items():
        text = re.sub(pattern, stands_in, text)
    numbers = re.sub(
        r"(?<![\w.])(?<!\w-)[-+]?\d+(?:[.,]\d+)*(?:e-\d+)?(?: ?(?:ms|min|[kMGT]?B|s)\b(?:/s)?)?", "N", text
    )
    plain = re.sub(r"\b(N \w+?)s?\b", r"\1", numbers)
    lines = [re.sub(r"[\s━─╸█▉▊▋▌▍▎▏]+", " ", line).strip() for line in plain.splitlines()]
    return [line for line in lines if line]


def test_what_is_not_run_is_on_a_page() -> None:
    shown = {command.text for page in RUN for command in commands(page)}
    assert set(NOT_RUN) - shown == set()


def test_a_line_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = prepare(tmp_path, monkeypatch, {})
    with pytest.raises(AssertionError, match="ended with 1"):
        check(session, Command("page.md", 1, "vcache info no-such.zarr"))
    with pytest.raises(AssertionError, match="ended with 3"):
        check(session, Command("page.md", 1, "exit 3"))
    with pytest.raises(AssertionError, match="shows what is not printed"):
        check(session, Command("page.md", 1, "echo 12 videos", output="12 clips"))
    with pytest.raises(AssertionError, match="not printed: .'N clip'"):
        check(session, Command("page.md", 1, "seq 4; echo 12 videos", output="1\n2\n3\n4\n12 clips"))
    check(session, Command("page.md", 1, "echo 12 videos", output="11 videos"))
