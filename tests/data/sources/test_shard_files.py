import gzip
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpp.data.sources import shard_files
from mpp.data.sources.descriptors import Descriptors
from mpp.data.sources.opening import open_source
from mpp.errors import ConfigError
from tests.data.sources.reading import all_read, refused, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


def in_cache(cache):
    return [path.name for path in cache.iterdir() if path.is_file() and path.suffix != ".lock"]


def test_gzip_is_unpacked_once(tmp_path, own_cache, monkeypatch):
    plain = all_read(open_source(f"shards:{write_shards(tmp_path, 2)}/*.tar"))
    for path in sorted(tmp_path.glob("*.tar")):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert all_read(open_source(f"shards:{tmp_path}/*.tar.gz")) == plain
    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "_unpack", None)
        assert all_read(open_source(f"shards:{tmp_path}/*.tar.gz")) == plain
    for unpacked in own_cache.glob("*.tar"):
        unpacked.write_bytes(unpacked.read_bytes()[:1024])
    assert all_read(open_source(f"shards:{tmp_path}/*.tar.gz")) == plain


def test_the_index_is_stored_and_distrusted(tmp_path, own_cache, monkeypatch):
    spec = f"shards:{write_shards(tmp_path, 1)}/s-000.tar"
    first = all_read(open_source(spec))
    (stored,) = own_cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "index_tar", None)
        assert all_read(open_source(spec)) == first
    stored.write_bytes(b"nonsense")
    assert all_read(open_source(spec)) == first
    write_tar(tmp_path / "s-000.tar", [("new.jpg", b"new"), ("new.cls", b"0")])
    assert all_read(open_source(spec)) == [(b"new", 0)]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "file" / "cache"))
    assert len(open_source(f"shards:{write_shards(tmp_path, 1)}/s-000.tar")) == 4
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    text = refused(f"shards:{tmp_path}/s.tar.gz")
    assert "cannot unpack s.tar.gz" in text
    assert "set MPP_CACHE" in text


def test_a_failed_unpacking_leaves_nothing(tmp_path, own_cache):
    noise = np.random.default_rng(0).bytes(100_000)
    whole = gzip.compress(write_tar(tmp_path / "a.tar", [("a.jpg", noise)]).read_bytes())
    for damaged in (whole[:50_000], whole[:-4] + b"\0\0\0\0", whole[:30_000] + b"\xff" * 500 + whole[30_500:]):
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        assert "a.tar.gz is not a complete gzip file" in refused(f"shards:{tmp_path}/a.tar.gz")
    assert in_cache(own_cache) == []


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(shard_files, "_MOST_SMALL", 2**20)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(2**23)))
    text = refused(f"shards:{tmp_path}/a.tar.gz")
    assert "a.tar.gz has 8.18 kB and unpacks to more than 1.05 MB, which images do not; if it is right, gunzip" in text
    assert in_cache(own_cache) == []
    monkeypatch.setattr(shard_files, "_MOST_SMALL", 2**24)
    assert "no image in 1 shard" in refused(f"shards:{tmp_path}/a.tar.gz")


def test_room_is_looked_for_before_unpacking(tmp_path, own_cache, monkeypatch):
    noise = np.random.default_rng(0).bytes(100_000)
    whole = gzip.compress(write_tar(tmp_path / "a.tar", [("a.jpg", noise)]).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(whole)
    # One that says less than it has ends in the middle, with room to spare on the disk.
    (tmp_path / "b.tar.gz").write_bytes(whole + gzip.compress(bytes(10**6)) + gzip.compress(b""))
    usage = shutil.disk_usage(tmp_path)

    def refusal(name, limit, free):
        monkeypatch.setenv("MPP_CACHE_LIMIT", limit)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        text = refused(f"shards:{tmp_path}/{name}")
        assert in_cache(own_cache) == []
        assert f"cannot unpack {name} into" in text
        return text

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "write_whole", None)  # not even begun
        text = refusal("a.tar.gz", "none", 100_000)
    assert "a.tar.gz, unpacked, takes 102 kB" in text
    assert "has room for 95 kB); set MPP_CACHE to a folder with room, or gunzip the shards" in text
    text = refusal("b.tar.gz", "none", 200_000)
    assert "(it unpacks to more than 190 kB, for which there is room); set MPP_CACHE" in text
    assert "of the 50 kB that MPP_CACHE_LIMIT allows" in refusal("a.tar.gz", "50kB", usage.free)
    monkeypatch.setenv("MPP_CACHE_LIMIT", "some")
    with pytest.raises(ConfigError, match=r"MPP_CACHE_LIMIT 'some' is no size; write e\.g\. 200GB, 50%"):
        open_source(f"shards:{tmp_path}/a.tar.gz")


KILLED = """
import os, sys
from mpp.data.sources import shard_files
from mpp.data.sources.shards import open_shards
write = shard_files.write_whole
shard_files.write_whole = lambda path, function: write(path, lambda file: (function(file), os.kill(os.getpid(), 9)))
open_shards("shards:x", sys.argv[1])
"""


def test_leftovers_of_a_killed_unpacking_are_removed(tmp_path, own_cache):
    path = write_shards(tmp_path, 1) / "s.tar.gz"
    path.write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -9
    (left,) = in_cache(own_cache)
    os.utime(own_cache / left, (0, 0))  # what is new may belong to one that has yet to lock it
    assert len(open_source(f"shards:{path}")) == 4
    assert sorted(name.partition(".")[2] for name in in_cache(own_cache)) == ["index", "tar"]


def test_a_shard_that_shrinks_gives_an_error_for_its_images(tmp_path):
    source = open_source(f"shards:{write_shards(tmp_path, 1)}/s-000.tar")
    os.truncate(tmp_path / "s-000.tar", 600)
    assert source.read(0)[0] == b"image 0000"
    with pytest.raises(OSError, match="changed since indexing"):
        source.read(3)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_descriptors_are_few_and_stay_at_home(tmp_path):
    source = open_source(f"shards:{write_shards(tmp_path, 5, 2)}/*.tar")
    source._open = Descriptors(os.O_RDONLY, limit=2)
    before = descriptors()
    expected = all_read(source)
    assert all_read(source) == expected
    copy = pickle.loads(pickle.dumps(source))
    assert all_read(copy) == expected
    assert descriptors() == before + 4
    del source, copy
    assert descriptors() == before


def test_without_a_limit_of_the_system_descriptors_have_their_own(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert Descriptors(os.O_RDONLY, limit=64)._limit == 64
