"""Real tiny videos, a real tiny CLIP and a real store: what the tests of the pipelines stand on."""

import gzip
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import open_clip
import pytest
import shape_checks
import torch
from hypothesis import settings
from open_clip.tokenizer import default_bpe
from safetensors.torch import save_file

shape_checks.install()
# How long one example takes says how busy the machine is.
settings.register_profile("vcache", deadline=None)
settings.load_profile("vcache")
# For the processes that tests start, as `_few_threads_and_own_home` for this one: the same bits in both, and no fight for cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Workers of pytest-xdist have a terminal of 80 columns, and rich keeps for good what it finds when it is imported.
for _variable in ("COLUMNS", "LINES"):
    os.environ.pop(_variable, None)

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared"

# Small, and all different, so that a swapped axis fails.
TINY_VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 12}  # 17 tokens, 4 heads
TINY_TEXT = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TINY_EMBED = 20


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_synced() -> Iterator[None]:
    """Only a loss of power shows the difference, and power_cut.py has one: on a busy disk the tests would wait for minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(autouse=True)
def _few_threads_and_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's stores, and two cores are not fought over."""
    torch.set_num_threads(1)
    monkeypatch.setenv("VCACHE_HOME", str(tmp_path / "vcache-home"))
    monkeypatch.delenv("VCACHE_DATA", raising=False)


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """write_video(path, seed=0, num_frames=20, height=36, width=50, codec="mpeg4"): a moving noise pattern as a real file."""

    def write(
        path: Path, *, seed: int = 0, num_frames: int = 20, height: int = 36, width: int = 50, codec: str = "mpeg4"
    ) -> Path:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (num_frames, 5, 7, 3), dtype=np.uint8)
        rows, columns = np.arange(height) * 5 // height, np.arange(width) * 7 // width
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.bit_rate = 400_000
            for frame in coarse[:, rows][:, :, columns]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly drawn CLIP of 3 blocks as an open_clip `local-dir:` folder; real weights as far as the loader can tell."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    config = {"embed_dim": TINY_EMBED, "quick_gelu": True, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.25, 0.2, 0.3],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def worded_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny_clip` that can read: of CLIP's vocabulary the bytes and six merges, which a text tower of 2 blocks knows."""
    folder = tmp_path_factory.mktemp("worded-clip")
    text = {"context_length": 11, "vocab_size": 520, "width": 24, "heads": 3, "layers": 2}
    config = {"embed_dim": TINY_EMBED, "quick_gelu": True, "vision_cfg": TINY_VISION, "text_cfg": text}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.3]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[:7]
    (folder / "bpe_tiny.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """train/ and val/ folders of three classes: 4 + 2 videos of each, one of them a single frame long."""
    root = tmp_path_factory.mktemp("videos")
    for i, label in enumerate(("clap hands", "jump", "wave")):
        for split, count in (("train", 4), ("val", 2)):
            for j in range(count):
                frames = 1 if (i, split, j) == (1, "train", 0) else 14 + 5 * j
                write_video(root / split / label / f"{label[0]}{j}.mp4", seed=100 * i + j, num_frames=frames)
    return root


class FlakyServer(ThreadingHTTPServer):
    """Passes requests on to an S3 server, writes them down, and spoils those that `fault` says.

    `fault(method, path, number)` returns None, or "drop" (the connection ends, nothing is passed on), "lose" (it ends before the
    answer), "cut" (in the middle of the answer's body), or a status as "503 SlowDown". `requests` has (method, path with query,
    Range header) of each.
    """

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Flaky)
        self.target = target
        self.fault: Callable[[str, str, int], str | None] = lambda method, path, number: None
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Flaky(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement
    wbufsize = -1
    server: FlakyServer

    def log_message(self, *args: Any) -> None:
        """Not on the screen."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        fault = self.server.fault(self.command, self.path, len(self.server.requests))
        if fault == "drop":
            self.close_connection = True
        elif fault in (None, "cut", "lose"):
            self._pass_on(body, fault)
        else:
            status, code = fault.split()
            self._send(int(status), [], f"<Error><Code>{code}</Code><Message>planted</Message></Error>".encode())

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        upstream = http.client.HTTPConnection(*self.server.target)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        data, own = response.read(), ("connection", "content-length", "date", "server", "transfer-encoding")
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in own]
        size = int(response.getheader("Content-Length") or len(data))
        upstream.close()
        if fault != "lose":
            self._send(response.status, headers, data[: len(data) // 2] if fault else data, size)
        self.close_connection = self.close_connection or fault is not None

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, size: int | None = None) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body) if size is None else size))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FlakyServer]:
    """moto's S3 server in a process of its own, behind the proxy that can spoil requests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        FlakyServer(("127.0.0.1", port)) as proxy,
    ):
        try:
            _wait_for(port)
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            yield proxy
            proxy.shutdown()
        finally:
            process.kill()


def _wait_for(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/data.json", timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("moto's server did not start")


@pytest.fixture
def bucket(s3_server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a fresh bucket, with endpoint and credentials in the environment; requests begin to be counted here."""
    name = "b-" + "".join(letter if letter.isalnum() else "-" for letter in tmp_path.name.lower())[-50:].strip("-")
    for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAVCACHETEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-to-be-seen")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr("vcache.store.object_client.FIRST_WAIT_SECONDS", 0.001)
    urllib.request.urlopen(urllib.request.Request(f"{s3_server.url}/{name}", method="PUT")).close()
    monkeypatch.setattr(s3_server, "fault", lambda method, path, number: None)
    s3_server.requests.clear()
    return name


@pytest.fixture
def s3(s3_server: FlakyServer, bucket: str) -> Any:
    """boto3's client: what is really in the bucket, not as our code sees it."""
    import boto3

    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_server.target[1]}")
