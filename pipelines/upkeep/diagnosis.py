"""What is broken, what would be slow and why, and what to do, read off the facts alone: nothing is looked up or measured here."""

from collections.abc import Iterator
from dataclasses import dataclass

from vcache.pipelines.console import duration, size
from vcache.pipelines.upkeep.installed import Installed
from vcache.pipelines.upkeep.machine import Machine, Place
from vcache.pipelines.upkeep.probes import BackboneProbe, DecoderProbe, DiskProbe

K400_VIDEOS = 240_436
"""Training videos of Kinetics-400 that are commonly found (benchmarks/scaling.py)."""
K400_EPOCH_BYTES = K400_VIDEOS * 4 * 8 * 197 * 768 * 2
"""The tokens of the last four layers of ViT-B/16, 8 frames, float16."""
_LOW_SPACE = 20e9
_FEW_FILES = 1024
_SLOW_EPOCH_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All that the doctor found; what was not measured is None or empty."""

    installed: Installed
    machine: Machine
    decoders: tuple[DecoderProbe, ...] = ()
    disks: tuple[DiskProbe, ...] = ()
    backbones: tuple[BackboneProbe, ...] = ()
    copying: float | None = None
    """Bytes per second."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence on what is wrong or slow."""

    severity: str
    """ "broken": vcache cannot work; "slow"; or "note"."""
    what: str
    do: str
    """What to do about it; "" if nothing."""


def diagnose(seen: Examination) -> tuple[Finding, ...]:
    """What is broken first."""
    order = ("broken", "slow", "note")
    found = [
        *_software(seen),
        *_gpu(seen),
        *_cpu(seen.machine),
        *_decoding(seen),
        *_disks(seen),
        *_places(seen.machine),
    ]
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def is_broken(findings: tuple[Finding, ...]) -> bool:
    return any(finding.severity == "broken" for finding in findings)


def _software(seen: Examination) -> Iterator[Finding]:
    for package in seen.installed.packages:
        if package.error is not None:
            yield Finding(
                severity="broken",
                what=f"{package.name} does not load: {package.error}",
                do=f"install it anew with:  pip install --force-reinstall {package.name}",
            )
    if lacking := [name for name, there in seen.installed.codecs.items() if not there]:
        yield Finding(
            severity="note",
            what=f"the FFmpeg in PyAV does not decode {', '.join(lacking)}: such videos will be recorded as failed.",
            do="install PyAV from PyPI, whose wheels have an FFmpeg with all of them:  pip install --force-reinstall av",
        )


def _gpu(seen: Examination) -> Iterator[Finding]:
    machine = seen.machine
    if machine.gpus:
        return
    if machine.driver is not None:
        built = seen.installed.torch_cuda
        why = (
            "was built without CUDA"
            if built is None
            else f"is for CUDA {built}, which driver {machine.driver} may not run"
        )
        yield Finding(
            severity="slow",
            what=f"there is an NVIDIA driver, and torch sees no GPU: it {why}.",
            do="install the torch that fits the driver: https://pytorch.org/get-started/locally",
        )
        return
    rate = max((probe.frames_per_second or 0.0 for probe in seen.backbones), default=0.0)
    model = next((probe.model for probe in seen.backbones if probe.frames_per_second == rate), "")
    told = f": {model} runs at {rate:.1f} frames/s, which is {rate / 8:.2g} clips of 8 frames a second" if rate else ""
    yield Finding(
        severity="slow",
        what=f"there is no GPU, so the backbone limits an extraction{told}.",
        do="extract on a machine with a GPU and copy the store, or begin with a small model or part of the videos; heads train "
        "from a store without one.",
    )


def _cpu(machine: Machine) -> Iterator[Finding]:
    if machine.load > 1.5 * machine.cores:
        yield Finding(
            severity="slow",
            what=f"{machine.load:.0f} processes want the {machine.cores:g} cores: rates of now are below what it can do.",
            do="run vcache doctor again when it is idle.",
        )
    if machine.cores < machine.cores_shown:
        yield Finding(
            severity="note",
            what=f"{machine.cores_shown} cores are shown, and this process may use {machine.cores:g} of them.",
            do="rates here are those of the cores that may be used; a container gets more with --cpus, a Slurm job with "
            "--cpus-per-task.",
        )
    if machine.omp_threads == "1" and machine.cores >= 4 and not machine.gpus:
        yield Finding(
            severity="slow",
            what=f"OMP_NUM_THREADS is 1, so heads and the backbone use one of {machine.cores:g} cores.",
            do="unset OMP_NUM_THREADS, unless several processes share this machine.",
        )
    if machine.open_files < _FEW_FILES:
        yield Finding(
            severity="slow",
            what=f"a process may open {machine.open_files} files; vcache keeps up to 256 shards open, and needs some for itself.",
            do="raise it with:  ulimit -n 4096",
        )


def _decoding(seen: Examination) -> Iterator[Finding]:
    if not seen.decoders:
        return
    rates = {probe.name: probe.videos_per_second for probe in seen.decoders if probe.videos_per_second is not None}
    if not rates:
        errors = "; ".join(f"{probe.name}: {probe.error}" for probe in seen.decoders)
        yield Finding(
            severity="broken",
            what=f"no decoder works. {errors}.",
            do="install PyAV anew with:  pip install --force-reinstall av",
        )
        return
    each = rates.get("pyav", max(rates.values()))
    workers = max(1, int(seen.machine.cores))
    whole = K400_VIDEOS / (each * workers)
    yield Finding(
        severity="slow" if whole > 6 * _SLOW_EPOCH_SECONDS else "note",
        what=f"one process decodes {each:.1f} videos/s of 10 s, {workers} decode about {each * workers:.1f}: the "
        f"{K400_VIDEOS:,} videos of Kinetics-400 take {duration(whole)} or more.",
        do="extract once, on the machine with most cores; several can share the work with --part I/N.",
    )


def _disks(seen: Examination) -> Iterator[Finding]:
    for disk in seen.disks:
        if disk.read is None or disk.write is None:
            yield Finding(
                severity="slow",
                what=f"the disk of {disk.path} cannot be measured: {disk.error}",
                do="name another folder for stores with $VCACHE_HOME, or with --store.",
            )
            continue
        epoch = K400_EPOCH_BYTES / disk.read
        yield Finding(
            severity="slow" if epoch > _SLOW_EPOCH_SECONDS else "note",
            what=f"{disk.path} reads {size(int(disk.read))}/s and writes {size(int(disk.write))}/s: an epoch of Kinetics-400 "
            f"from 4 layers of ViT-B/16 in float16 ({size(K400_EPOCH_BYTES)}) is read in {duration(epoch)}.",
            do="--dtype int8 halves that, fewer layers or frames take less; several heads in one `vcache sweep` share a read; or "
            "put the store on a faster disk."
            if epoch > _SLOW_EPOCH_SECONDS
            else "",
        )


def _places(machine: Machine) -> Iterator[Finding]:
    for place in machine.places:
        if place.on_network:
            yield Finding(
                severity="slow",
                what=f"{place.path} ({place.what}) is on a network file system, {place.file_system}: others share its rate.",
                do="measure it at the hour when you train, or copy the store to a local disk.",
            )
        if place.in_memory:
            yield Finding(
                severity="note",
                what=f"{place.path} ({place.what}) is in memory, {place.file_system}: what lies there takes memory, and is gone "
                "after a restart.",
                do=_elsewhere(place),
            )
        if place.free_bytes < _LOW_SPACE:
            yield Finding(
                severity="slow",
                what=f"{place.path} ({place.what}) has {size(place.free_bytes)} free.",
                do="see what goes with:  vcache gc   and what an extraction takes with:  vcache plan",
            )


def _elsewhere(place: Place) -> str:
    if place.what.startswith("temporary"):
        return "set TMPDIR to a folder on a disk: stores in buckets are written there first."
    return "keep stores on a disk, with $VCACHE_HOME or --store."
