"""The commands with `--store s3://bucket/path`, end to end against moto's S3 server."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from logged import metrics_of
from viewed import viewed_store

from vcache.pipelines.runs import Run

Vcache = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def extract(video_folder: Path, tiny_clip: Path) -> str:
    return f"extract {video_folder} --layers -2: --frames 5 --stride 3 --dtype float32 --model local-dir:{tiny_clip}"


def test_extract_train_eval_info_verify_and_ls_of_a_bucket(
    vcache: Vcache, extract: str, bucket: str, s3: Any, tmp_path: Path
) -> None:
    store = f"s3://{bucket}/features/tiny.zarr"
    status, out, err = vcache(f"{extract} --store {store}")
    assert status == 0, err
    assert out.startswith(f"{store}  (key ")
    assert "18 extracted now, 0 already there" in out
    assert "0 extracted now, 18 already there" in vcache(f"{extract} --store {store}")[1]
    local = tmp_path / "local.zarr"
    assert vcache(f"{extract} --store {local}")[0] == 0
    assert bucket_tree(s3, bucket, "features/tiny.zarr/") == local_tree(local)

    run = tmp_path / "run"
    status, _, err = vcache(f"train-head evl --epochs 1 --set layers=-2: --store {store} --out {run}")
    assert status == 0, err
    assert Run.open(run).config["store"] == store
    assert vcache(f"train-head evl --epochs 1 --set layers=-2: --store {local} --out {tmp_path / 'local'}")[0] == 0
    assert metrics_of(run) == metrics_of(tmp_path / "local")
    metrics = json.loads(vcache(f"eval {run} --json")[1])
    assert metrics["num_videos"] == 6
    assert metrics == json.loads(vcache(f"eval {run} --store {local} --json")[1])

    info = json.loads(vcache(f"info {store} --json")[1])
    assert (info["path"], info["splits"]["val"]["arrays"]["tokens/2"]["stored"]) == (store, 6)
    assert vcache(f"info {store}")[1].startswith(store)
    assert f"{store} is whole: 18 rows (0 failed) in 2 shards" in vcache(f"verify {store}")[1]
    (row,) = json.loads(vcache(f"ls s3://{bucket}/features --json")[1])
    assert (row["path"], row["layers"]) == (store, [1, 2])
    assert "tiny.zarr" in vcache(f"ls s3://{bucket}/features")[1]
    assert f"no stores in s3://{bucket}/none" in vcache(f"ls s3://{bucket}/none")[1]


def test_several_views_are_read_from_a_bucket_as_from_a_folder(
    vcache: Vcache, bucket: str, s3: Any, tmp_path: Path
) -> None:
    local, store = tmp_path / "views.zarr", f"s3://{bucket}/views.zarr"
    viewed_store(local).close()
    for file in (file for file in local.rglob("*") if file.is_file()):
        s3.upload_file(str(file), bucket, f"views.zarr/{file.relative_to(local).as_posix()}")
    runs = [tmp_path / "remote", tmp_path / "local"]
    for run, where in zip(runs, (store, local), strict=True):
        status, _, err = vcache(
            f"train-head linear --epochs 2 --batch-size 5 --shuffle full --store {where} --out {run}"
        )
        assert (status, "12 videos in 3 views" in err) == (0, True), err
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    evaluated = [json.loads(vcache(f"eval {run} --no-save --json")[1]) for run in runs]
    assert [said.pop("run") for said in evaluated] == [str(run) for run in runs]
    assert evaluated[0] == evaluated[1]
    assert evaluated[0]["views"] == "3x1"
    assert (
        "view 6 of split 'train' of views.zarr holds no features"
        in vcache(f"train-head linear --views 4 --store {store} --out {tmp_path / 'none'}")[2]
    )


def bucket_tree(s3: Any, bucket: str, prefix: str) -> dict[str, bytes]:
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    objects = {key.removeprefix(prefix): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}
    return {name: data for name, data in objects.items() if name != "zarr.json"}  # it has the time of creation


def local_tree(path: Path) -> dict[str, bytes]:
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name not in ("zarr.json", "_commit/writer.lock")}


def test_the_printed_command_that_adds_layers_names_the_url(
    vcache: Vcache, video_folder: Path, tiny_clip: Path, bucket: str, tmp_path: Path
) -> None:
    store = f"s3://{bucket}/a b.zarr"
    made = f"--frames 4 --stride 2 --model local-dir:{tiny_clip} --cross-frame none --store {shlex.quote(store)}"
    assert vcache(f"extract {video_folder} --layers -1 {made}")[0] == 0
    train = f"train-head evl --epochs 1 --set layers=-2: --store {shlex.quote(store)} --out {tmp_path / 'run'}"
    status, _, err = vcache(train)
    assert status == 1
    command = next(line for line in err.splitlines() if "with:  vcache extract" in line).split("with:  vcache ")[1]
    assert command.endswith(f"--store {shlex.quote(store)}")
    assert vcache(command)[0] == 0
    assert vcache(train)[0] == 0


def test_verify_of_a_bucket_finds_damage_and_what_it_says_mends_it(
    vcache: Vcache, extract: str, bucket: str, s3: Any
) -> None:
    store = f"s3://{bucket}/s.zarr"
    assert vcache(f"{extract} --store {store}")[0] == 0
    key = "s.zarr/train/view-0/tokens/2/c/0/0/0/0"
    data = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.put_object(Bucket=bucket, Key=key, Body=data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    status, out, _ = vcache(f"verify {store} --json")
    assert status == 1
    (finding,) = json.loads(out)["findings"]
    assert (finding["kind"], finding["path"], finding["rows"]) == ("chunk", f"s3://{bucket}/{key}", [0])
    record = finding["message"].split("Delete ")[1].split(" and run")[0]
    s3.delete_object(Bucket=bucket, Key=record.removeprefix(f"s3://{bucket}/"))
    assert vcache(f"{extract} --store {store}")[0] == 0
    assert vcache(f"verify {store}")[0] == 0
    assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == data


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("info s3://{bucket}/none.zarr", "there is no store at s3://{bucket}/none.zarr"),
        ("train-head evl --store s3://{bucket}/none.zarr", "vcache extract --store s3://{bucket}/none.zarr"),
        ("verify s3://never-made/s.zarr", "there is no bucket 'never-made'"),
        ("ls s3://never-made", "there is no bucket 'never-made'"),
        (
            "repair s3://{bucket}/none.zarr",
            "cannot be mended in place: only local files can. Copy the store to a local",
        ),
        ("plan {videos} --store s3://{bucket}/s.zarr", "neither the room in a bucket"),
        ("info gs://{bucket}/s.zarr", "stores are folders or s3://BUCKET/PATH"),
        ("info s3://ID:never-to-be-seen@{bucket}/s.zarr", "credentials do not belong in a URL"),
    ],
)
def test_errors_of_a_bucket_are_a_sentence(
    vcache: Vcache, video_folder: Path, bucket: str, line: str, words: str
) -> None:
    status, out, err = vcache(line.format(bucket=bucket, videos=video_folder))
    assert status == 1
    assert words.format(bucket=bucket) in err
    assert "Traceback" not in err
    assert "not an error vcache foresaw" not in err
    assert "never-to-be-seen" not in out + err
