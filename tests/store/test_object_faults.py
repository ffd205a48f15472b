"""An object store that fails now and then is asked again; one that goes on failing, or refuses, is an error in words."""

import numpy as np
import pytest
from botocore.exceptions import ClientError

from vcache.store.errors import CorruptStore, StoreUnavailable
from vcache.store.object_path import ObjectPath, store_path
from vcache.store.reader import FeatureStore
from vcache.store.verify import verify_store

FAULTS = ["drop", "cut", "500 InternalError", "503 SlowDown"]


@pytest.fixture
def path(bucket):
    return store_path(f"s3://{bucket}/s.zarr")


@pytest.fixture
def few_retries(monkeypatch):
    monkeypatch.setattr("vcache.store.object_client.MAX_RETRIES", 3)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_is_written_read_and_verified_through_a_connection_that_spoils_every_fourth_request(
    world, path, s3_server, monkeypatch, fault
):
    monkeypatch.setattr(s3_server, "fault", lambda method, target, number: fault if number % 4 == 0 else None)
    store = world.build(path)
    with FeatureStore.open(path) as opened:
        for spec in world.all:
            expected = np.stack([world.value(spec, row) for row in (6, 0, 3)])
            np.testing.assert_array_equal(opened.read("train", spec.name, [6, 0, 3]), expected)
    verification = verify_store(store)
    assert verification.ok
    assert verification.notes == ()


def test_a_record_whose_answer_is_lost_is_not_taken_for_that_of_another_writer(world, path, s3_server, monkeypatch):
    """The first PUT arrives, its answer does not; the second finds the record there."""
    store = world.create(path)
    lost = []

    def lose_the_answer(method, target, number):
        if method == "PUT" and "-view-0-0.json" in target and not lost:
            lost.append(target)
            return "lose"
        return None

    monkeypatch.setattr(s3_server, "fault", lose_the_answer)
    world.fill(store, world.all, shards=[0])
    assert len(lost) == 1
    assert sum("-view-0-0.json" in target for method, target, _ in s3_server.requests if method == "PUT") == 2
    assert FeatureStore.open(path).committed_arrays("train", 0) == {spec.name for spec in world.all}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_keeps_failing_is_an_error_that_names_the_object_after_a_bounded_number_of_requests(
    world, path, s3_server, monkeypatch, few_retries, fault
):
    world.build(path)
    with FeatureStore.open(path) as store:
        store.read("train", "cls/8", [0])
        s3_server.requests.clear()
        monkeypatch.setattr(s3_server, "fault", lambda *request: fault)
        with pytest.raises(StoreUnavailable) as caught:
            store.read("train", "tokens/8", [0])
    message = str(caught.value)
    assert f"{path}/train/view-0/tokens/8/c/0/0/0/0 cannot be read: " in message
    assert "after 3 retries" in message or fault == "cut"
    assert "503 Service Unavailable, SlowDown" in message or fault != "503 SlowDown"
    assert f"AWS_ENDPOINT_URL ({s3_server.url})" in message
    assert "\n" not in message
    assert len(s3_server.requests) == 4
    assert "never-to-be-seen" not in message + repr(caught.value.__cause__)


def test_an_unreachable_store_is_no_damage(world, path, s3_server, monkeypatch, few_retries):
    """`verify` must not advise to delete what it could not ask for."""
    store = world.build(path)
    for part in ("/zarr.json", "/train/label/", "/_commit/", "/tokens/8/c/1", "prefix=s.zarr"):
        with monkeypatch.context() as patch:
            patch.setattr(
                s3_server, "fault", lambda method, target, _, part=part: "503 SlowDown" if part in target else None
            )
            with pytest.raises(StoreUnavailable, match="503"):
                verify_store(store)
    assert verify_store(store).ok


def test_a_write_that_fails_for_good_commits_nothing_and_can_be_done_again(
    world, path, s3_server, monkeypatch, few_retries
):
    store = world.create(path)
    for part in ("/cls/8/c/0", "-view-0-0.json"):
        with monkeypatch.context() as patch:
            patch.setattr(
                s3_server,
                "fault",
                lambda method, target, _, part=part: "drop" if part in target and method == "PUT" else None,
            )
            with pytest.raises(StoreUnavailable, match="cannot be written"):
                world.fill(store, world.all, shards=[0])
        store = FeatureStore.open(path)
        assert store.committed_arrays("train", 0) == frozenset()
    world.fill(store, world.all, shards=[0])
    assert verify_store(store).ok


def test_no_such_bucket(bucket):
    for ask in (lambda path: FeatureStore.open(path), lambda path: path.exists(), lambda path: path.write_bytes(b"x")):
        with pytest.raises(
            StoreUnavailable, match=r"there is no bucket 'never-made' at http.*aws s3 mb s3://never-made"
        ):
            ask(ObjectPath("never-made", "s.zarr"))


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_access_denied(path, s3_server, monkeypatch, code):
    monkeypatch.setattr(s3_server, "fault", lambda *request: f"403 {code}")
    with pytest.raises(
        StoreUnavailable, match=rf"access to bucket .* is denied \(403 Forbidden, {code}.*AWS_ACCESS_KEY_ID"
    ):
        FeatureStore.open(path)
    assert len(s3_server.requests) == 1  # asking again would not help


def test_no_credentials(path, monkeypatch, few_retries):
    """The metadata service of cloud machines, which is asked last, is played by a port that nobody listens at."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        StoreUnavailable, match=r"no credentials for bucket .*Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ):
        FeatureStore.open(path)


def test_nobody_at_the_endpoint(path, monkeypatch, few_retries):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@127.0.0.1:9")
    with pytest.raises(
        StoreUnavailable, match=r"cannot be read: .*Check the network, AWS_ENDPOINT_URL \(http://127"
    ) as caught:
        FeatureStore.open(path)
    assert "password" not in str(caught.value)


def test_plain_http_can_be_forbidden(path, monkeypatch):
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(StoreUnavailable, match="is not encrypted. Allow it with AWS_ALLOW_HTTP=true"):
        FeatureStore.open(path)


def test_the_server_of_these_tests_checks_preconditions(bucket, s3):
    """Else the tests of two writers would say nothing."""
    s3.put_object(Bucket=bucket, Key="k", Body=b"one", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.put_object(Bucket=bucket, Key="k", Body=b"two", IfNoneMatch="*")


def test_damage_stays_damage(world, path, s3):
    """And is not asked for again: the bytes are wrong at rest."""
    world.build(path)
    key = (path / "train/view-0" / world.tokens.shard_path(0)).key
    data = bytearray(s3.get_object(Bucket=path.bucket, Key=key)["Body"].read())
    data[3] ^= 1
    s3.put_object(Bucket=path.bucket, Key=key, Body=bytes(data))
    with FeatureStore.open(path) as store, pytest.raises(CorruptStore, match="do not match their checksum"):
        store.read("train", "tokens/8", [0])
