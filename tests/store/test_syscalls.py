"""What the kernel is asked for, and in which order, as strace sees it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CALLS = {"fsync": "fsync", "rename": "/^rename"}  # renameat, where there is no rename
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import scenario
from conftest import World
scenario.run(World(), Path(sys.argv[2]))
"""
_SYNC = re.compile(r"(?:fsync|fdatasync)\(\d+<([^>]*)>\)\s*= 0")
_RENAME = re.compile(r"rename(?:at2?)?\((?:AT_FDCWD[^,]*, )?\"([^\"]*)\", (?:AT_FDCWD[^,]*, )?\"([^\"]*)\".*\)\s*= 0")


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """("sync", path) and ("rename", source, target), in the order of the calls of a whole run."""
    folder = tmp_path_factory.mktemp("traced")
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    trace = [
        "strace",
        "-f",
        "-y",
        "-s",
        "999",
        "-e",
        "trace=fsync,fdatasync,rename,renameat,renameat2",
        "-o",
        folder / "log",
    ]
    command = [*trace, sys.executable, "-c", RUN, str(Path(__file__).parent), str(folder / "s.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ)
    if done.returncode:
        pytest.skip(f"strace cannot trace here: {done.stderr[-300:]}")
    return [step for call in finished((folder / "log").read_text().splitlines()) if (step := parse(call))]


def finished(lines):
    """The calls of all threads in the order in which they ended: a call that others come between is two lines of the log."""
    begun = {}
    for line in lines:
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>").rstrip()
        elif resumed := re.match(r"<\.\.\. \w+ resumed>", call):
            yield begun.pop(thread) + call[resumed.end() :]
        else:
            yield call


def parse(line):
    if match := _SYNC.match(line):
        return "sync", match[1]
    if match := _RENAME.match(line):
        return "rename", match[1], match[2]
    return None


def test_nothing_gets_its_name_before_its_bytes_are_synced(steps):
    renames = [step for step in steps if step[0] == "rename" and step[1].endswith(".tmp")]
    assert len(renames) > 20
    for step in renames:
        at = steps.index(step)
        assert ("sync", step[1]) in steps[:at], step
        folder = str(Path(step[2]).parent)
        assert ("sync", folder) in steps[at:], step


def test_a_record_comes_after_the_folders_of_its_shard_files(steps):
    records = [at for at, step in enumerate(steps) if step[0] == "rename" and re.search(r"_commit/\w+/\w", step[2])]
    assert len(records) == 5  # two shards in two passes, and one of val
    before = 0
    for at in records:
        files = [step[2] for step in steps[before:at] if step[0] == "rename" and re.search(r"/view-\d/.*/c/", step[2])]
        assert files
        for file in files:
            later = steps[steps.index(next(s for s in steps if s[-1] == file and s[0] == "rename")) : at]
            assert ("sync", str(Path(file).parent)) in later
            assert ("sync", file.split("/s.zarr/")[0] + "/s.zarr") in later
        before = at


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("error", ["error=EIO", "error=ENOSPC", "signal=KILL"])
def test_faults_that_the_kernel_itself_gives(steps, tmp_path, call, error):
    """Every seventh call of a kind fails, or kills the process; then the run is repeated without."""
    import scenario
    from conftest import World

    scenario.run(World(), tmp_path / "calm" / "s.zarr")
    calm = World().tree(tmp_path / "calm")
    number = sum(step[0] == {"fsync": "sync"}.get(call, call) for step in steps)
    for when in range(1, number, 7):
        path = tmp_path / str(when) / "s.zarr"
        inject = [
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            f"trace={CALLS[call]}",
            "-e",
            f"inject={CALLS[call]}:{error}:when={when}",
        ]
        command = [*inject, sys.executable, "-c", RUN, str(Path(__file__).parent), str(path)]
        assert subprocess.run(command, capture_output=True).returncode
        scenario.check_old_or_complete(World(), path, set())
        scenario.run(World(), path)
        assert World().tree(path.parent) == calm
