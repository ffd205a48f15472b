"""`vcache doctor`: looks, measures for some seconds, and says what would be slow and why."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from vcache.pipelines.console import out, print_sentence, size
from vcache.pipelines.stores import vcache_home
from vcache.pipelines.upkeep.diagnosis import Examination, Finding, is_broken
from vcache.pipelines.upkeep.installed import find_installed
from vcache.pipelines.upkeep.machine import Machine, Place, find_machine
from vcache.pipelines.upkeep.probes import probe_backbones, probe_copying, probe_decoders, probe_disk

_COLOURS = {"broken": "bold red", "slow": "yellow", "note": "dim"}


def examine_machine(
    folder: Path | None, *, quick: bool = False, on_stage: Callable[[str], None] = lambda name: None
) -> Examination:
    """Look at the machine; unless `quick`, measure where stores live, and `folder`, too. Leaves nothing behind."""
    on_stage("looking what is installed")
    installed = find_installed()
    broken = {package.name for package in installed.packages if package.error}
    machine = find_machine(folder, look_at_gpus="torch" not in broken)
    if quick or broken:
        return Examination(installed=installed, machine=machine)
    on_stage("decoding a video with each decoder")
    decoders = probe_decoders()
    disks = []
    for path in dict.fromkeys((vcache_home().absolute(), *([folder.absolute()] if folder else []))):
        on_stage(f"writing and reading a file in {path}")
        disks.append(probe_disk(path))
    on_stage("copying in memory")
    return Examination(
        installed=installed,
        machine=machine,
        decoders=decoders,
        disks=tuple(disks),
        copying=probe_copying(),
        backbones=probe_backbones(on_stage),
    )


def describe_examination(seen: Examination, findings: tuple[Finding, ...]) -> dict[str, Any]:
    """For a program."""
    machine = asdict(seen.machine) | {"s3": dict(seen.machine.s3)}
    return {
        "status": "broken" if is_broken(findings) else "ok",
        **asdict(seen.installed),
        "machine": machine,
        "decoders": [asdict(probe) | {"frames_per_second": probe.frames_per_second} for probe in seen.decoders],
        "disks": list(map(asdict, seen.disks)),
        "memory_copy_bytes_per_second": seen.copying,
        "backbones": list(map(asdict, seen.backbones)),
        "findings": list(map(asdict, findings)),
    }


def print_examination(seen: Examination, findings: tuple[Finding, ...]) -> None:
    _section("installed", _software_lines(seen))
    _section("machine", _machine_lines(seen.machine))
    _section("places", [f"{place.what}: {place.path}, {_place_facts(place)}" for place in seen.machine.places])
    if measured := _measured_lines(seen):
        _section("measured", measured)
    out.print("[bold]what would be slow, and why[/bold]")
    for finding in findings:
        out.print(f"  [{_COLOURS[finding.severity]}]{finding.severity}[/]", highlight=False)
        print_sentence(out, f"    {finding.what}" + (f" {finding.do[0].upper()}{finding.do[1:]}" if finding.do else ""))
    if not findings:
        print_sentence(out, "  nothing was found")


def _section(title: str, lines: list[str]) -> None:
    out.print(f"[bold]{escape(title)}[/bold]", highlight=False)
    for line in lines:
        print_sentence(out, f"  {line}")


def _software_lines(seen: Examination) -> list[str]:
    installed = seen.installed
    there = [
        f"{package.name} {package.version}" for package in installed.packages if package.version and not package.error
    ]
    lines = [f"Python {installed.python}, {', '.join(there)}"]
    lines.append(f"torch for {'CUDA ' + installed.torch_cuda if installed.torch_cuda else 'the CPU alone'}")
    lacking = [package for package in installed.packages if package.version is None]
    lines += [f"not installed: {package.name}, needed for {package.needed_for}" for package in lacking]
    if installed.ffmpeg:
        codecs = ", ".join(name if there else f"no {name}" for name, there in installed.codecs.items())
        lines.append(f"FFmpeg of PyAV: libavcodec {installed.ffmpeg.get('libavcodec', '?')}; {codecs}")
    return lines


def _machine_lines(machine: Machine) -> list[str]:
    flags = f"; {', '.join(machine.cpu_flags)}" if machine.cpu_flags else ""
    lines = [f"{machine.cpu}, {machine.cores:g} of {machine.cores_shown} cores{flags}"]
    lines.append(f"memory {size(machine.memory_bytes)}, {size(machine.memory_free_bytes)} free")
    for gpu in machine.gpus:
        bfloat16 = "float16 and bfloat16" if gpu.bfloat16 else "float16, no bfloat16"
        lines.append(f"GPU {gpu.name}, {size(gpu.memory_bytes)}, {bfloat16}")
    if not machine.gpus:
        lines.append("no GPU that torch sees")
    if machine.driver:
        lines.append(
            f"NVIDIA driver {machine.driver}, {'NVDEC' if machine.nvdec else 'no NVDEC'} (vcache decodes on the CPU)"
        )
    if machine.s3:
        lines.append("S3: " + ", ".join(f"{name} {value}" for name, value in machine.s3.items()))
    return lines


def _place_facts(place: Place) -> str:
    return f"{place.file_system}, {size(place.free_bytes)} free{'' if place.exists else ', not there yet'}"


def _measured_lines(seen: Examination) -> list[str]:
    absent = {package.name for package in seen.installed.packages if package.version is None}  # told of already
    lines = [
        f"decoder {probe.name}: {probe.frames_per_second:.0f} frames/s in one process"
        if probe.frames_per_second
        else f"decoder {probe.name}: {probe.error}"
        for probe in seen.decoders
        if probe.name not in absent
    ]
    lines += [
        f"disk of {disk.path}: reads {size(int(disk.read))}/s, writes {size(int(disk.write))}/s"
        if disk.read and disk.write
        else f"disk of {disk.path}: {disk.error}"
        for disk in seen.disks
    ]
    lines += [f"memory: one thread copies {size(int(seen.copying))}/s"] if seen.copying else []
    for probe in seen.backbones:
        rate = f"{probe.frames_per_second:.1f} frames/s" if probe.frames_per_second else f"{probe.error}"
        lines.append(f"{probe.model} on {probe.device} in {probe.precision}: {rate}")
    return lines
