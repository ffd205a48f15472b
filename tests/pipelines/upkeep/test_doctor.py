"""`vcache doctor` on machines that are not this one, by their facts alone, and once on this one."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import pytest

from vcache.pipelines.upkeep import doctor, machine, probes
from vcache.pipelines.upkeep.diagnosis import K400_EPOCH_BYTES, Examination, diagnose, is_broken
from vcache.pipelines.upkeep.installed import Installed, Package
from vcache.pipelines.upkeep.machine import Gpu, Machine, Place
from vcache.pipelines.upkeep.probes import BackboneProbe, DecoderProbe, DiskProbe

Vcache = Callable[..., tuple[int, str, str]]

DISK = Place(what="stores", path="/data", exists=True, file_system="ext4", free_bytes=10**12)
MACHINE = Machine(
    cpu="A processor",
    cores_shown=16,
    cores=16.0,
    load=0.5,
    cpu_flags=("avx512f",),
    memory_bytes=64 * 10**9,
    memory_free_bytes=50 * 10**9,
    gpus=(Gpu(name="A GPU", memory_bytes=80 * 10**9, bfloat16=True),),
    driver="550.1",
    nvdec=True,
    open_files=65536,
    omp_threads=None,
    places=(DISK,),
    s3={},
)
INSTALLED = Installed(
    python="3.11",
    packages=(Package(name="torch", version="2.9", needed_for="everything"),),
    torch_cuda="12.8",
    ffmpeg={"libavcodec": "62"},
    codecs={"h264": True},
)
FAST = Examination(
    installed=INSTALLED,
    machine=MACHINE,
    decoders=(DecoderProbe(name="decord", videos_per_second=2.0), DecoderProbe(name="pyav", videos_per_second=20.0)),
    disks=(DiskProbe(path="/data", write=2e9, read=6e9),),
    backbones=(BackboneProbe(model="small", device="cuda", precision="float16", frames_per_second=4e3),),
)


def told(seen: Examination, severity: str) -> str:
    return "\n".join(f"{finding.what} {finding.do}" for finding in diagnose(seen) if finding.severity == severity)


def test_a_machine_with_all_it_needs_has_nothing_slow() -> None:
    assert told(FAST, "slow") == told(FAST, "broken") == ""
    assert "20.0 videos/s of 10 s, 16 decode about 320.0" in told(
        FAST, "note"
    )  # by the default decoder, not by the first


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"gpus": (), "driver": None}, "no GPU, so the backbone limits an extraction: small runs at 4000.0 frames/s"),
        ({"gpus": ()}, "torch sees no GPU: it is for CUDA 12.8, which driver 550.1 may not run"),
        (
            {"omp_threads": "1", "gpus": (), "driver": None},
            "OMP_NUM_THREADS is 1, so heads and the backbone use one of 16",
        ),
        ({"open_files": 256}, "may open 256 files"),
        ({"load": 40.0}, "40 processes want the 16 cores"),
        ({"places": (replace(DISK, file_system="nfs4"),)}, "/data (stores) is on a network file system, nfs4"),
        ({"places": (replace(DISK, file_system="fuse.sshfs"),)}, "fuse.sshfs"),
        ({"places": (replace(DISK, free_bytes=3 * 10**9),)}, "has 3.0 GB free"),
    ],
)
def test_what_a_machine_lacks_is_said_in_words(facts: dict[str, object], said: str) -> None:
    assert said in told(replace(FAST, machine=replace(MACHINE, **facts)), "slow")  # type: ignore[arg-type]


def test_a_container_with_fewer_cores_than_it_shows_is_told_of() -> None:
    seen = replace(FAST, machine=replace(MACHINE, cores=2.5))
    assert "16 cores are shown, and this process may use 2.5 of them" in told(seen, "note")


def test_a_slow_disk_is_told_by_what_an_epoch_takes() -> None:
    slow = replace(FAST, disks=(DiskProbe(path="/data", write=5e7, read=8e7),))
    assert f"{K400_EPOCH_BYTES / 8e7 / 3600:.1f} h" in told(slow, "slow")  # 8.1 h
    assert "--dtype int8" in told(slow, "slow")
    assert "reads 80.0 MB/s" in told(slow, "slow")
    full = replace(FAST, disks=(DiskProbe(path="/data", write=None, read=None, error="it is full"),))
    assert "cannot be measured: it is full" in told(full, "slow")


def test_without_a_decoder_or_a_package_it_is_broken() -> None:
    none = tuple(replace(probe, videos_per_second=None, error="no library") for probe in FAST.decoders)
    assert "no decoder works. decord: no library; pyav: no library" in told(replace(FAST, decoders=none), "broken")
    one = (*none[:1], FAST.decoders[1])
    assert not is_broken(diagnose(replace(FAST, decoders=one)))
    package = Package(name="zarr", version="3", needed_for="everything", error="ImportError: gone")
    seen = replace(FAST, installed=replace(INSTALLED, packages=(package,)))
    assert "zarr does not load: ImportError: gone install it anew with:  pip install" in told(seen, "broken")
    assert is_broken(diagnose(seen))


def test_quotas_of_both_versions_of_cgroups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert machine.usable_cores(tmp_path) == 8.0
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1\n", 8.0), ("250000\n", 2.5)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert machine.usable_cores(tmp_path) == cores
    for quota, cores in (("max 100000\n", 8.0), ("150000 100000\n", 1.5), ("9900000 100000\n", 8.0)):
        (tmp_path / "cpu.max").write_text(quota)
        assert machine.usable_cores(tmp_path) == cores


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    (tmp_path / "in" / "side").mkdir(parents=True)
    lines = [(Path("/"), "ext4"), (tmp_path, "xfs"), (tmp_path / "in", "nfs4"), (tmp_path / "i", "tmpfs")]
    mounts = "\n".join(f"1 0 8:1 / {path} rw - {kind} source rw" for path, kind in lines)
    told = {name: machine.file_system_of(tmp_path / name, mounts) for name in ("", "in/side", "in/not/there", "out")}
    assert told == {"": "xfs", "in/side": "nfs4", "in/not/there": "nfs4", "out": "xfs"}


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://there")
    told = machine.find_machine(None).s3
    assert (told["AWS_SECRET_ACCESS_KEY"], told["AWS_ENDPOINT_URL"]) == ("set", "http://there")


def test_the_video_that_decoders_are_tried_on_is_h264_with_all_its_frames(tmp_path: Path) -> None:
    with av.open(str(probes.make_video(tmp_path / "v.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 340, 256)
        assert sum(1 for _ in container.decode(video=0)) == probes.VIDEO_FRAMES


def test_this_machine_as_json_and_on_80_columns(
    vcache: Vcache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = BackboneProbe(model="small", device="cpu", precision="float32", frames_per_second=3.0)
    monkeypatch.setattr(doctor, "probe_backbones", lambda on_stage: (backbone,))
    monkeypatch.setattr(doctor, "probe_disk", lambda path: probes.DiskProbe(path=str(path), write=1e9, read=2e9))
    monkeypatch.setattr(probes, "VIDEO_FRAMES", 20)
    status, out, err = vcache(f"doctor {tmp_path} --json")
    assert status == 0, err
    told = json.loads(out)
    assert told["status"] == "ok"
    assert {probe["name"]: probe["error"] for probe in told["decoders"]}["pyav"] is None
    assert told["codecs"] == {"h264": True, "hevc": True, "vp9": True, "av1": True, "mpeg4": True}
    assert {disk["path"] for disk in told["disks"]} == {os.environ["VCACHE_HOME"], str(tmp_path)}
    assert {"cores", "memory_bytes", "gpus", "places", "open_files"} <= told["machine"].keys()
    assert list(tmp_path.iterdir()) == []
    status, out, _ = vcache("doctor --quick", columns=80)
    assert (status, "decoder pyav" in out) == (0, False)
    assert "what would be slow, and why" in out
    assert vcache(f"doctor {tmp_path}/nowhere")[0] == 2


def test_without_a_decoder_the_exit_status_says_so(vcache: Vcache, monkeypatch: pytest.MonkeyPatch) -> None:
    none = (DecoderProbe(name="pyav", videos_per_second=None, error="no library"),)
    monkeypatch.setattr(doctor, "probe_decoders", lambda: none)
    monkeypatch.setattr(doctor, "probe_disk", lambda path: probes.DiskProbe(path=str(path), write=1e9, read=2e9))
    monkeypatch.setattr(doctor, "probe_backbones", lambda on_stage: ())
    status, out, _ = vcache("doctor")
    assert (status, "no decoder works. pyav: no library" in out) == (1, True)
