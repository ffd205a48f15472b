"""Where file systems are mounted, which is where a removal has to stop."""

import re
from pathlib import Path


def mount_points(mounts: str | None = None) -> tuple[Path, ...]:
    """Folders at which something is mounted, folders that are seen a second time (bind mounts) too.

    None where Linux does not tell. `mounts` is in the form of /proc/self/mountinfo.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return ()
    return tuple(Path(unescaped(line.split()[4])) for line in mounts.splitlines())


def unescaped(path: str) -> str:
    """Of blanks, tabs, line ends and backslashes, which Linux writes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
