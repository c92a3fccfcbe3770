import os
import sys
from typing import ClassVar

import pytest

pytest.importorskip("fsspec")

from mpp.data.sources import remote
from mpp.data.sources.base import SourceAway, SourceError
from mpp.data.sources.tar_index import write_sidecar
from mpp.errors import Unreachable, install
from tests.data.sources.reading import (
    all_read,
    opened,
    read_by_workers,
    read_many,
    refused,
    states,
    write_pictures,
    write_shards,
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def s3():
    """A server that speaks S3, with a bucket; yields a client of it."""
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
        client.close()
    running.stop()


@pytest.mark.slow
def test_s3(s3, tmp_path, encode, monkeypatch):
    folder = write_shards(tmp_path / "shards")
    write_pictures(folder, encode)
    write_sidecar(folder / "s-001.tar")
    for path in folder.iterdir():
        s3.upload_file(str(path), "bucket", f"deep/er/{path.name}")
    expected = all_read(opened(f"{folder}/s-*.tar"))
    pattern = "s3://bucket/deep/er/s-{000..002}.tar"
    for same in ("s3://bucket/deep/er/s-*", "s3://bucket/deep/**/s-00?.tar", pattern):
        source = opened(same)
        assert read_many(source, range(12)) == expected
    assert source.location(0) == "s3://bucket/deep/er/s-000.tar, byte 512"
    for missing in ("bucket/deep/x-*.tar", "bucket/deep/er/s-{000..003}.tar", "nobucket/*.tar"):
        assert "matches no file" in refused(f"shards:s3://{missing}")
    pictures = opened("s3://bucket/deep/er/p.tar")
    pictures.read(0)
    assert read_by_workers(pictures) == list(range(12))
    before = states(source, True)
    s3.upload_file(str(folder / "s-001.tar"), "bucket", "deep/er/s-000.tar")
    # By the other name of the setting.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(remote, "_made", {})
    changed = opened(pattern)
    assert [a == b for a, b in zip(states(changed, True), before, strict=True)] == [False, True, True]
    assert changed.read(0) == expected[4]


@pytest.mark.slow
def test_s3_without_credentials(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(remote, "_made", {})
    text = refused("shards:s3://bucket/a.tar")
    assert "Unable to locate credentials" in text
    assert "check the URL and the credentials" in text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Three shards on a file system in memory, not asynchronous, that goes by Hugging Face's protocol; as they read."""
    memory = pytest.importorskip("fsspec.implementations.memory")

    class Hub(memory.MemoryFileSystem):
        protocol = "hf"
        store: ClassVar = {}
        pseudo_dirs: ClassVar = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hf://").strip("/")

    system = Hub()
    for path in write_shards(tmp_path).glob("*.tar"):
        system.pipe_file(f"/datasets/me/{path.name}", path.read_bytes())
    monkeypatch.setattr(remote, "_made", {(os.getpid(), "hf", remote.TIMEOUT): system})
    return all_read(opened(f"{tmp_path}/*.tar"))


def test_file_systems_that_are_not_asynchronous(hub):
    assert read_many(opened("hf://datasets/me/s-*.tar"), range(12)) == hub
    assert "hf://datasets/me/none.tar matches no file" in refused("shards:hf://datasets/me/none.tar")


@pytest.mark.parametrize(
    ("error", "opening", "reading"),
    [
        (ConnectionError("the metadata server is away"), SourceAway, Unreachable),
        (PermissionError("invalid_grant"), SourceError, PermissionError),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_login_that_fails(error, opening, reading, monkeypatch):
    def fail(*_):
        raise error

    source = opened("hf://datasets/me/s-*.tar")
    monkeypatch.setattr(remote, "_file_system", fail)
    found = read_many(source, [0, 5])
    assert [type(one) for one in found] == [reading] * 2
    assert str(found[0]).endswith(f"/datasets/me/s-000.tar, byte 512: {error}")
    with pytest.raises(SourceError, match=f"{error}; check the credentials") as caught:
        opened("hf://datasets/me/s-*.tar")
    assert type(caught.value) is opening


@pytest.mark.parametrize(
    ("protocol", "package"), [("gs", "gcsfs"), ("hf", "huggingface_hub"), ("s3", "s3fs"), ("http", "aiohttp")]
)
def test_missing_packages(protocol, package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(remote, "_made", {})
    registry = pytest.importorskip("fsspec.registry")
    for name in (protocol, "gcs", "s3a"):
        monkeypatch.delitem(registry._registry, name, raising=False)
    assert refused(f"shards:{protocol}://bucket/a.tar").endswith(f"; {install('remote')}")
