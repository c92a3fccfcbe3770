import os
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.data.sources import shard_files
from mpp.data.sources.base import SourceError
from mpp.data.sources.names import Ignored
from mpp.data.sources.opening import open_source
from mpp.data.sources.tar_index import TarIndex, index_tar, write_sidecar
from tests.data.sources.reading import all_read, refused, write_shards, write_tar


def test_sidecar(tmp_path, own_cache, monkeypatch):
    spec = f"shards:{write_shards(tmp_path, 2)}/*"
    shard = tmp_path / "s-000.tar"
    expected = all_read(open_source(f"shards:{tmp_path}/*.tar"))
    shutil.rmtree(own_cache)
    sidecars = [write_sidecar(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert sidecars == [tmp_path / "s-000.tar.index", tmp_path / "s-001.tar.index"]
    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "index_tar", None)
        assert all_read(open_source(spec)) == expected
    assert not own_cache.exists()
    whole = sidecars[0].read_bytes()
    for damage in (b"", b"nonsense", whole[:40], whole[:-1], whole[:70] + b"x" + whole[71:], b"mpp idx9" + whole[8:]):
        sidecars[0].write_bytes(damage)
        assert all_read(open_source(spec)) == expected
    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "index_tar", None)
        sidecars[0].write_bytes(b"mpp idx2" + whole[8:])  # as an earlier version wrote it
        shutil.rmtree(own_cache)
        assert all_read(open_source(spec)) == expected
    sidecars[0].write_bytes(whole)
    write_tar(shard, [(f"{i}.jpg", b"x" * 5000) for i in range(20)])  # of another size: the sidecar is stale
    assert open_source(f"shards:{shard}").read(19) == (b"x" * 5000, None)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "s-000.tar", "s-001.tar", "s-000.tar.index", "s-001.tar.index"
    }  # fmt: skip
    write_tar(shard, [("a.jpg", b"a"), ("a.cls", b"1")])
    write_sidecar(shard)
    write_tar(shard, [("a.jpg", b"a"), ("a.cls", b"2")])  # of the same size, and newer than its sidecar
    os.utime(f"{shard}.index", (2, 2))
    assert open_source(f"shards:{shard}").read(0) == (b"a", 2)
    shard.write_bytes(b"nonsense" * 200)
    with pytest.raises(SourceError, match=r"s-000\.tar is not a complete tar file"):
        write_sidecar(shard)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(-2, 2**24 - 1))),
    st.tuples(*[st.integers(0, 2**60)] * 2) | st.just((0, 0)),
    st.sampled_from(["", "a/b.0.jpg", "\udcff.png"]),
)
def test_an_index_survives_being_kept(rows, counts, example):
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
    blocks, sizes = columns[:, 0].astype(np.uint32), columns[:, 1].astype(np.uint32)
    index = TarIndex(blocks, sizes, columns[:, 2].astype(np.int32), Ignored(*counts, example), 2**42)
    data = index.to_bytes()
    back = TarIndex.from_bytes(data, 2**42)
    assert back is not None
    assert (back.ignored, back.tar_size) == (index.ignored, 2**42)
    for name in ("blocks", "sizes", "labels"):
        assert getattr(back, name).dtype == getattr(index, name).dtype
        assert getattr(back, name).tolist() == getattr(index, name).tolist()
    assert TarIndex.from_bytes(data, 2**42 + 1) is None
    assert TarIndex.from_bytes(data + b"\0", 2**42) is None
    before = TarIndex.from_bytes(b"mpp idx2" + data[8:], 2**42)
    assert (before is None) == (counts != (0, 0))


@pytest.mark.parametrize("row", [(2, 10, 2**24), (2, 10, -3), (2, 10, -(2**31)), (2, 4097, 0), (11, 0, 0)])
@pytest.mark.usefixtures("own_cache")
def test_an_index_that_says_what_cannot_be_is_made_again(row, tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), ("a.cls", b"1"), ("b.jpg", b"b")])
    size = shard.stat().st_size
    columns = [np.array([value], dtype) for value, dtype in zip(row, (np.uint32, np.uint32, np.int32), strict=True)]
    false = TarIndex(*columns, Ignored(), 10 * 512).to_bytes()
    assert TarIndex.from_bytes(false, 10 * 512) is None
    columns[0] += size // 512 - 10
    (tmp_path / "a.tar.index").write_bytes(TarIndex(*columns, Ignored(), size).to_bytes())
    assert all_read(open_source(f"shards:{shard}")) == [(b"a", 1), (b"b", None)]


def with_header(whole, start, **fields):
    """The tar with other fields in the header at `start`, and the checksum that fits."""
    header = bytearray(whole[start : start + 512])
    for name, value in fields.items():
        at = {"size": 124, "type": 156, "uid": 108, "mtime": 136}[name]
        header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return whole[:start] + bytes(header) + whole[start + 512 :]


@pytest.mark.parametrize(
    "fields",
    [
        {"size": b"\xff" * 12},  # -1
        {"size": b"\xff" * 10 + b"\0\0"},  # back to the header before
        {"size": b"\x80" + b"\x7f" * 11},  # past all that a file can be
        {"size": b"\x80" + b"\0" * 6 + b"\x20" + b"\0" * 4, "type": b"x"},  # a name of 128 GiB
        {"size": b"\xff" * 12, "type": b"L"},
    ],
)
@pytest.mark.parametrize("start", [0, 2 * 1024])
def test_damaged_headers_are_one_line(fields, start, tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"13 path=a/b\n") for i in range(4)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(with_header(whole, start, **fields))
    text = refused(f"shards:{tmp_path}/a.tar")
    assert re.search(r"a\.tar is not a complete tar file \(.+\); make it again$", text)


def test_a_damaged_header_is_no_end(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"x") for i in range(4)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2048] + b"y" + whole[2049:])
    assert "no header at byte 2048" in refused(f"shards:{tmp_path}/a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: 4 * 1024])  # without the zeros at the end, as some programs write it
    assert len(open_source(f"shards:{tmp_path}/a.tar")) == 4


def test_any_damage_is_one_line_or_none(tmp_path):
    random = np.random.default_rng(0)
    members = [(f"{'long/' * 40}{i}.{end}", b"7") for i in range(3) for end in ("jpg", "json")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    texts = list[str]()
    for _ in range(200):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        start = 512 * int(random.integers(0, 12))
        data[start + random.integers(0, 512, 3)] = random.integers(0, 256, 3)
        if random.random() < 0.8:  # a checksum that fits, so that the fields are believed
            data = np.frombuffer(with_header(data.tobytes(), start), dtype=np.uint8)
        (tmp_path / "a.tar").write_bytes(data.tobytes())
        try:
            index_tar(tmp_path / "a.tar")
        except SourceError as error:
            texts.append(str(error))
    assert 20 < len(texts) < 200
    assert all(text.isprintable() and "is not a complete tar file" in text for text in texts)
