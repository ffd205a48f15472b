"""Real processes that hang, crash and are killed: each costs its own video, and none is left behind."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.extract import shared_frames
from vcache.extract.decode import decode_video
from vcache.extract.decoders import DecoderError
from vcache.extract.messages import GarbledMessage, receive_message, send_message
from vcache.extract.sampling import ClipRule, TSNSampling
from vcache.extract.shared_frames import SharedFrames
from vcache.extract.video import KINDS, DecodedVideo, DecodeRequest, Segment, VideoError
from vcache.extract.worker import DecodeProcessError, deadline_seconds
from vcache.extract.workers import DecodePool

HERE = Path(__file__).parent
MISBEHAVING = "misbehaving:decode"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def request(path: Path | str, num_frames: int = 5) -> DecodeRequest:
    return DecodeRequest(path=Path(path), clips=(ClipRule(sampling=TSNSampling(num_frames=num_frames)),))


def ask(pool: DecodePool, what: str) -> str:
    """The answer of a deed that says something."""
    with pytest.raises(VideoError) as caught:
        pool.decode(request(f"do.{what}"))
    assert caught.value.kind == "missing", caught.value
    return caught.value.reason


def is_gone(pid: int) -> bool:
    """No such process, or one that is dead and waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def started(kept: frozenset[int] = frozenset()) -> frozenset[int]:
    """Processes that this one has started, without the kept ones."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pids |= set(map(int, (task / "children").read_text().split()))
    return frozenset(pid for pid in pids - kept if not is_gone(pid))


def shared_bytes() -> list[int]:
    """Sizes of the buffers that this process holds."""
    sizes = []
    for descriptor in tuple(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            if "vcache-frames" in str(descriptor.readlink()):
                sizes.append(descriptor.stat().st_size)
    return sizes


@pytest.fixture
def others() -> frozenset[int]:
    """What other tests have left running."""
    return started()


@pytest.fixture(scope="module")
def helpers() -> Iterator[None]:
    """Decode processes import what the parent can: misbehaving.py lies beside this file."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def shared_pool(helpers: None) -> Iterator[DecodePool]:
    """One process for the tests that leave it whole, and for those that end it."""
    with DecodePool(1, decoder=MISBEHAVING, deadline_seconds=20.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{i}.mp4", seed=i, num_frames=7 + i, width=50 + 2 * i) for i in range(6)]


def assert_equal(video: DecodedVideo, expected: DecodedVideo) -> None:
    np.testing.assert_array_equal(video.frames, expected.frames)
    assert video.frames.flags.c_contiguous and video.frames.flags.writeable and video.frames.dtype == np.uint8
    for field in dataclasses.fields(video):
        if field.name != "frames":
            assert repr(getattr(video, field.name)) == repr(getattr(expected, field.name))


def test_a_pool_gives_what_the_decoder_gives_in_process(videos: list[Path]) -> None:
    with DecodePool(1) as pool:
        decoded = [pool.decode(request(path)) for path in videos]
        with pytest.raises(VideoError) as caught:
            pool.decode(request("nowhere.mp4"))
    for path, video in zip(
        videos, decoded, strict=True
    ):  # compared at the end: the first is not overwritten by the last
        assert_equal(video, decode_video(request(path)))
    with pytest.raises(VideoError) as expected:
        decode_video(request("nowhere.mp4"))
    assert str(caught.value) == str(expected.value)


def test_all_fields_of_request_and_answer_pass_through(shared_pool: DecodePool, videos: list[Path]) -> None:
    whole, cut = videos[5], videos[5].with_name("cut.avi")
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    segment = dataclasses.replace(request(whole, num_frames=3), segment=Segment(4, 9, "frames"))
    partial = dataclasses.replace(request(cut, num_frames=2), allow_partial=True)
    for each in (segment, partial):
        assert_equal(shared_pool.decode(each), decode_video(each))
    assert shared_pool.decode(segment).first_frame == 4
    damage = shared_pool.decode(partial).damage
    assert damage is not None and str(damage) == str(decode_video(partial).damage)
    with pytest.raises(VideoError, match="^truncated"):
        shared_pool.decode(request(cut))


def test_a_decode_process_loads_neither_torch_nor_zarr(shared_pool: DecodePool, videos: list[Path]) -> None:
    shared_pool.decode(request(videos[0]))
    named = "av-numpy-torch-torchvision-open_clip-zarr-pytest-multiprocessing"
    assert ask(shared_pool, f"modules.{named}") == "av numpy"


def test_short_memory_costs_the_decode_process_first_and_a_crash_writes_no_core(shared_pool: DecodePool) -> None:
    assert ask(shared_pool, "oom_score.") == "500"
    assert ask(shared_pool, "core_limit.").split()[:2] == ["0", "0"]


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("segfault.", "the decode process died (SIGSEGV); tried twice"),
        ("kill.", "the decode process died (SIGKILL, maybe by the kernel for want of memory); tried twice"),
        ("exit.3", "the decode process died (exit status 3); tried twice"),
        ("sys_exit.4", "the decode process died (exit status 4); tried twice"),
        ("abort.invalid", "the decode process died (SIGABRT: free(): invalid pointer); tried twice"),
        ("garbage.5", "the decode process sent what is not an answer; tried twice"),
        ("garbage.100", "the decode process sent what is not an answer; tried twice"),
    ],
)
def test_a_decode_process_that_dies_costs_one_video(
    shared_pool: DecodePool, videos: list[Path], deed: str, reason: str
) -> None:
    with pytest.raises(VideoError) as caught:
        shared_pool.decode(request(f"do.{deed}"))
    assert (caught.value.kind, caught.value.reason) == ("worker_crash", reason)
    assert caught.value.kind in KINDS
    assert_equal(shared_pool.decode(request(videos[0])), decode_video(request(videos[0])))


def test_a_crash_that_does_not_come_again_costs_no_video(shared_pool: DecodePool, tmp_path: Path) -> None:
    video = shared_pool.decode(request(tmp_path / "do.first_time_segfault.mark"))
    assert (tmp_path / "mark").exists()
    assert video.frames.shape == (1, 4, 1000, 3)


@pytest.mark.parametrize("deed", ["sleep.1000", "stop.", "fifo"])
def test_a_decode_process_that_hangs_costs_one_video_and_stalls_no_other(
    helpers: None, others: frozenset[int], videos: list[Path], tmp_path: Path, deed: str
) -> None:
    path = tmp_path / f"do.{deed}"
    if deed == "fifo":
        path = tmp_path / "clip.mp4"
        os.mkfifo(path)
    with (
        DecodePool(2, decoder=MISBEHAVING, deadline_seconds=0.8) as pool,
        concurrent.futures.ThreadPoolExecutor(1) as thread,
    ):
        start = time.monotonic()
        hung = thread.submit(pool.decode, request(path))
        count = 0
        while not hung.done():
            pool.decode(request(videos[count % len(videos)]))
            count += 1
        assert time.monotonic() - start < 15
        error = hung.exception()
        assert isinstance(error, VideoError) and error.kind in KINDS
        assert (error.kind, error.reason) == ("timeout", "no answer within 0.8 s; tried twice")
        assert count >= 10
        assert len(started(others)) <= 2


def test_without_a_deadline_a_large_file_gets_more_time() -> None:
    assert deadline_seconds(0) == deadline_seconds(1_500_000) == 30
    assert deadline_seconds(20_000_000) == 400
    assert deadline_seconds(20_000_000, is_segment=True) == 40


def test_a_segment_is_given_the_time_of_a_segment(videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(size_bytes: int, *, is_segment: bool) -> float:
        asked.append((size_bytes, is_segment))
        return 20.0

    monkeypatch.setattr("vcache.extract.worker.deadline_seconds", recorded)
    whole = request(videos[5], num_frames=3)
    with DecodePool(1) as pool:
        for each in (whole, dataclasses.replace(whole, segment=Segment(4, 9, "frames"))):
            pool.decode(each)
    size_bytes = videos[5].stat().st_size
    assert asked == [(size_bytes, False), (size_bytes, True)]


def test_an_exception_costs_no_process(shared_pool: DecodePool) -> None:
    pid = ask(shared_pool, "pid.")
    with pytest.raises(ValueError, match="^odd") as caught:
        shared_pool.decode(request("do.value_error.odd"))
    assert "misbehaving.py" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="^NeedsTwo: odd and 2$"):
        shared_pool.decode(request("do.needs_two.odd"))
    with pytest.raises(VideoError, match="^decode_error: MemoryError: Unable to allocate"):
        shared_pool.decode(request("do.memory."))
    with pytest.raises(AttributeError, match="'NoneType'"):
        shared_pool.decode(request("do.nothing."))
    assert ask(shared_pool, "pid.") == pid


def test_what_a_decode_process_prints_never_stops_it(shared_pool: DecodePool) -> None:
    assert shared_pool.decode(request("do.loud.300")).frames.shape == (1, 4, 1000, 3)  # 2.4 MB, a pipe holds 64 kB


def test_a_decode_process_that_dies_at_rest_costs_nothing(shared_pool: DecodePool) -> None:
    pid = int(ask(shared_pool, "pid."))
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: is_gone(pid))
    assert int(ask(shared_pool, "pid.")) != pid
    assert is_gone(pid)


def test_a_decode_process_is_replaced_after_its_share_of_videos(helpers: None) -> None:
    with DecodePool(1, decoder=MISBEHAVING, recycle_after=3) as pool:
        pids = [int(ask(pool, "pid.")) for _ in range(7)]
        assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 3, 3, 6]
        assert all(is_gone(pid) for pid in pids[:6])


def test_a_decode_process_that_cannot_start_says_why_and_blames_no_video(others: frozenset[int]) -> None:
    with DecodePool(1, decoder="nowhere_at_all:decode") as pool:
        with pytest.raises(DecodeProcessError, match="exit status 1(.|\n)*No module named 'nowhere_at_all'"):
            pool.decode(request("clip.mp4"))
        assert not started(others)


def test_a_decoder_that_is_not_there_is_named(others: frozenset[int], videos: list[Path]) -> None:
    with DecodePool(1, decoder="pyavv") as pool:
        with pytest.raises(DecoderError, match="'pyavv' is not known.*Did you mean 'pyav'"):
            pool.decode(request(videos[0]))
        assert not started(others)
    with DecodePool(1) as pool:
        with pytest.raises(DecoderError, match="'cv2' is not known"):
            pool.decode(dataclasses.replace(request(videos[0]), decoder="cv2"))
        assert_equal(pool.decode(request(videos[0])), decode_video(request(videos[0])))


def test_many_threads_share_few_processes(others: frozenset[int], videos: list[Path]) -> None:
    requests = [request(videos[i % len(videos)], num_frames=1 + i % 7) for i in range(80)]
    most = 0
    with DecodePool(2) as pool, concurrent.futures.ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(pool.decode, each) for each in requests]
        while not all(future.done() for future in futures):
            most = max(most, len(started(others)))
        for each, future in zip(requests, futures, strict=True):
            assert_equal(future.result(), decode_video(each))
    assert most == 2
    assert not started(others)


def test_a_process_outlives_the_thread_that_needed_it_first(helpers: None) -> None:
    pids: list[str] = []
    with DecodePool(1, decoder=MISBEHAVING) as pool:
        thread = threading.Thread(target=lambda: pids.append(ask(pool, "pid.")))
        thread.start()
        thread.join()
        time.sleep(0.1)
        assert ask(pool, "pid.") == pids[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_closing_ends_what_is_being_decoded(helpers: None, others: frozenset[int], workers: int) -> None:
    pool = DecodePool(workers, decoder=MISBEHAVING)
    with concurrent.futures.ThreadPoolExecutor(3) as threads, pool:
        ask(pool, "pid.")
        futures = [threads.submit(pool.decode, request("do.sleep.1000")) for _ in range(3)]
        assert wait_until(lambda: len(started(others)) == workers)
        start = time.monotonic()
        pool.close()
        for future in futures:
            with pytest.raises(RuntimeError, match="^the decode pool is closed$"):
                future.result(timeout=10)
        assert time.monotonic() - start < 5
    assert not started(others)
    with pytest.raises(RuntimeError, match="closed"):
        pool.decode(request("do.frames.1"))
    pool.close()


def test_a_forgotten_pool_ends_its_processes(helpers: None) -> None:
    pool = DecodePool(1, decoder=MISBEHAVING)
    pid = int(ask(pool, "pid."))
    del pool
    gc.collect()
    assert wait_until(lambda: is_gone(pid))


def test_descriptors_and_memory_stay_flat_over_many_videos(helpers: None, videos: list[Path]) -> None:
    def taken() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(list(Path("/proc/self/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")

    with DecodePool(1, decoder=MISBEHAVING, recycle_after=100) as pool:
        for i in range(310):
            pool.decode(request(videos[i % len(videos)] if i % 2 else "do.frames.300"))  # 0.9 MB
            if i == 10:
                descriptors, rss_bytes = taken()
        assert taken()[0] == descriptors
        assert taken()[1] < rss_bytes + 20 * 2**20  # all videos together are 140 MB


def test_the_shared_memory_of_a_large_video_goes_back(helpers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_frames, "KEPT_BYTES", 600_000)
    with DecodePool(1, decoder=MISBEHAVING) as pool:
        sizes = []
        for rows in (100, 500, 30):
            video = pool.decode(request(f"do.frames.{rows}"))
            expected = (np.arange(rows * 3000) * 7 + rows).astype(np.uint8)
            np.testing.assert_array_equal(video.frames.reshape(-1), expected)
            sizes.append(max(shared_bytes()))
    assert sizes == [300_000, 600_000, 600_000]


SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from vcache.extract.sampling import ClipRule, TSNSampling
from vcache.extract.video import DecodeRequest, VideoError
from vcache.extract.workers import DecodePool

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell is started without one

def request(name):
    return DecodeRequest(path=Path(name), clips=(ClipRule(sampling=TSNSampling(num_frames=2)),))

def pid(pool):
    try:
        pool.decode(request("do.pid."))
    except VideoError as error:
        return error.reason
"""


def start_script(lines: str) -> subprocess.Popen[str]:
    """A script without a __main__ guard, in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + lines],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )


BUSY = """
pool = DecodePool(2, decoder="misbehaving:decode")
idle = pid(pool)
threading.Thread(target=pool.decode, args=(request("do.sleep.1000"),), daemon=True).start()
other = pid(pool)
print(idle, other, flush=True)
"""


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGTERM, -signal.SIGTERM, ""),
        (signal.SIGINT, -signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_no_decode_process_outlives_a_parent_that_is_ended(number: signal.Signals, status: int, message: str) -> None:
    with start_script(BUSY + "pool.decode(request('do.sleep.1000'))") as script:
        assert script.stdout is not None and script.stderr is not None
        pids = [int(pid) for pid in script.stdout.readline().split()]
        assert len(set(pids)) == 2 and not any(map(is_gone, pids))
        time.sleep(0.1)
        os.killpg(script.pid, number)
        start = time.monotonic()
        assert script.wait(20) == status
        assert wait_until(lambda: all(map(is_gone, pids)))
        assert time.monotonic() - start < 5
        errors = script.stderr.read()
    assert errors.splitlines()[-1:] == ([message] if message else [])
    assert errors.count("Traceback") == bool(message)


def test_no_decode_process_outlives_an_interpreter_that_ends(helpers: None) -> None:
    with start_script(BUSY) as script:
        out, errors = script.communicate(timeout=60)
    assert (script.returncode, errors) == (0, "")
    pids = [int(pid) for pid in out.split()]
    assert len(pids) == 2 and wait_until(lambda: all(map(is_gone, pids)))


def test_a_pool_works_in_a_daemonic_process_and_belongs_to_one_process() -> None:
    """Workers of dask are daemonic: multiprocessing would refuse to start a process in them."""
    lines = """
import multiprocessing
pool = DecodePool(1, decoder="misbehaving:decode")
mine = pid(pool)
def child():
    try:
        pid(pool)
    except RuntimeError as error:
        print(error)
    with DecodePool(1, decoder="misbehaving:decode") as own:
        print(pid(own).isdigit(), flush=True)
process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
process.start()
process.join()
print(process.exitcode, pid(pool) == mine)
"""
    with start_script(lines) as script:
        out, errors = script.communicate(timeout=60)
    assert (out.splitlines(), errors) == (
        ["the decode pool belongs to the process that made it; make one after the fork", "True", "0 True"],
        "",
    )


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^num_workers \(0\) must be at least 1$"):
        DecodePool(0)
    with pytest.raises(ValueError, match=r"^recycle_after \(-1\) must be at least 1$"):
        DecodePool(1, recycle_after=-1)
    with pytest.raises(ValueError, match=r"^deadline_seconds \(0\) must be above 0$"):
        DecodePool(1, deadline_seconds=0.0)


@given(st.lists(st.tuples(st.integers(0, 4), *[st.integers(1, 9)] * 2), min_size=1, max_size=6), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_frames_come_out_of_shared_memory_as_they_went_in(shapes: list[tuple[int, int, int]], kept: int) -> None:
    rng = np.random.default_rng(kept)
    buffer = SharedFrames.create()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_frames, "KEPT_BYTES", kept)
            put, taken = [], []
            for shape in shapes:
                put.append(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
                buffer.put(put[-1])
                taken.append(buffer.take(put[-1].shape))
                buffer.trim()
                assert buffer.size_bytes <= kept
        for before, after in zip(put, taken, strict=True):
            np.testing.assert_array_equal(before, after)
        with pytest.raises(ValueError, match="were announced"):
            buffer.take((kept + 1, 1, 1, 3))
    finally:
        buffer.close()


def test_shared_memory_without_memfd_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    frames = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    buffer = SharedFrames.create()
    buffer.put(frames)
    assert os.readlink(f"/proc/self/fd/{buffer.fileno()}").startswith(str(tmp_path))  # noqa: PTH115
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(buffer.take(frames.shape), frames)
    buffer.close()


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.close()
        with pytest.raises((GarbledMessage, EOFError)):
            receive_message(ours)


@given(st.binary(min_size=1, max_size=60))
def test_a_message_of_the_right_form_with_damaged_content_is_refused_or_an_object(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"vcd1" + len(data).to_bytes(4, "little") + b"\xff" + data[1:])
        with pytest.raises(GarbledMessage):  # no pickle begins with 0xff
            receive_message(ours)


def test_messages_arrive_whole_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    messages = [("size", 5), ("error", ValueError("x" * 300_000)), {"a": [1, 2]}]
    with ours, theirs:
        thread = threading.Thread(target=lambda: [send_message(theirs, message) for message in messages])
        thread.start()
        assert [repr(receive_message(ours)) for _ in messages] == [repr(message) for message in messages]
        thread.join()
