"""What the machine has: cores, memory, GPUs, limits, and the file systems of the places where vcache keeps things."""

import ctypes
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vcache.pipelines.room import nearest_folder
from vcache.pipelines.stores import vcache_home
from vcache.pipelines.upkeep.mounts import unescaped

NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "ceph", "gpfs", "beegfs", "afs", "virtiofs")
"""File systems whose disk is elsewhere; so are those of fuse."""
IN_MEMORY = ("tmpfs", "ramfs")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
_S3 = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One that torch sees."""

    name: str
    memory_bytes: int
    bfloat16: bool


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that vcache uses, there or not."""

    what: str
    path: str
    exists: bool
    file_system: str
    free_bytes: int

    @property
    def on_network(self) -> bool:
        return self.file_system in NETWORK or self.file_system.startswith("fuse")

    @property
    def in_memory(self) -> bool:
        return self.file_system in IN_MEMORY


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware as this process may use it."""

    cpu: str
    cores_shown: int
    cores: float
    """By affinity and by the quota of the container."""
    load: float
    """Processes that wanted a core in the last minute."""
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    memory_free_bytes: int
    gpus: tuple[Gpu, ...]
    driver: str | None
    """Of NVIDIA, which may be there although torch sees no GPU."""
    nvdec: bool
    open_files: int
    """That a process may have."""
    omp_threads: str | None
    """$OMP_NUM_THREADS."""
    places: tuple[Place, ...]
    s3: Mapping[str, str]
    """Settings of AWS_*; of secrets only that they are set."""


def find_machine(folder: Path | None, *, look_at_gpus: bool = True) -> Machine:
    """Look; nothing is measured and nothing written. `folder` is one of the places."""
    memory = _memory()
    return Machine(
        cpu=_cpu_name(),
        cores_shown=os.cpu_count() or 1,
        cores=usable_cores(),
        load=os.getloadavg()[0],
        cpu_flags=_flags(),
        memory_bytes=min(memory.get("MemTotal", 0), _memory_limit() or memory.get("MemTotal", 0)),
        memory_free_bytes=memory.get("MemAvailable", 0),
        gpus=_gpus() if look_at_gpus else (),
        driver=_driver(),
        nvdec=_has_library("libnvcuvid.so.1"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        places=tuple(_place(what, path) for what, path in _places(folder).items()),
        s3=_s3(),
    )


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Those that the affinity allows, or fewer where the container has a quota (cgroup version 2 or 1)."""
    allowed = float(len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return allowed if quota == "max" else min(allowed, int(quota) / int(period))
    with suppress(OSError, ValueError):
        quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return allowed if int(quota) < 0 else min(allowed, int(quota) / int(period))
    return allowed


def file_system_of(path: Path, mounts: str | None = None) -> str:
    """Its type, as "ext4"; "unknown" where Linux does not tell. `mounts` is in the form of /proc/self/mountinfo."""
    path, best, kind = nearest_folder(path).resolve(), Path("/"), "unknown"
    for line in (_read("/proc/self/mountinfo") if mounts is None else mounts).splitlines():
        fields, _, after = line.partition(" - ")
        mount = Path(unescaped(fields.split()[4]))
        if (path == mount or mount in path.parents) and len(mount.parts) >= len(best.parts):
            best, kind = mount, after.split()[0]
    return kind


def _places(folder: Path | None) -> dict[str, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    hub = os.environ.get("HF_HUB_CACHE") or f"{os.environ.get('HF_HOME') or cache / 'huggingface'}/hub"
    places = {
        "stores, $VCACHE_HOME": vcache_home(),
        "checkpoints of the hub": Path(hub),
        "temporary files": Path("/tmp"),
    }
    if data := os.environ.get("VCACHE_DATA"):
        places["datasets, $VCACHE_DATA"] = Path(data)
    if folder is not None:
        places["the folder that was named"] = folder
    return {what: path.expanduser().absolute() for what, path in places.items()}


def _place(what: str, path: Path) -> Place:
    free = shutil.disk_usage(nearest_folder(path)).free
    return Place(what=what, path=str(path), exists=path.exists(), file_system=file_system_of(path), free_bytes=free)


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    return match[1] if match else os.uname().machine


def _flags() -> tuple[str, ...]:
    match = re.search(r"^flags\s*:\s*(.+)$", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    there = set(match[1].split()) if match else set()
    return tuple(flag for flag in _CPU_FLAGS if flag in there)


def _memory() -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), flags=re.MULTILINE)
    return {name: 1024 * int(number) for name, number in found}


def _memory_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(f"/sys/fs/cgroup/{name}").strip()
        if text.isdecimal():
            return int(text)
    return None


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    facts = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(Gpu(name=gpu.name, memory_bytes=gpu.total_memory, bfloat16=gpu.major >= 8) for gpu in facts)


def _driver() -> str | None:
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = subprocess.run(line, capture_output=True, text=True, timeout=5, check=False)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.splitlines()[0].strip()
    return None


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _s3() -> dict[str, str]:
    told = {name: os.environ[name] for name in _S3 if os.environ.get(name)}
    return told | {name: "set" for name in _SECRETS if os.environ.get(name)}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
