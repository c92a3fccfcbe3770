import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.sources import local_shards
from mpp.sources.base import SourceError
from mpp.sources.opening import open_source
from mpp.sources.tar_index import TarIndex, write_sidecar
from tests.sources.test_shards import all_read, write_shards, write_tar


def test_sidecar(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    spec = f"shards:{write_shards(tmp_path, 2)}/*"
    shard = tmp_path / "s-000.tar"
    expected = all_read(open_source(f"shards:{tmp_path}/*.tar"))
    shutil.rmtree(tmp_path / "cache")
    sidecars = [write_sidecar(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert sidecars == [tmp_path / "s-000.tar.index", tmp_path / "s-001.tar.index"]
    with monkeypatch.context() as patch:
        patch.setattr(local_shards, "index_tar", None)
        assert all_read(open_source(spec)) == expected
    assert not (tmp_path / "cache").exists()
    whole = sidecars[0].read_bytes()
    for damage in (b"", b"nonsense", whole[:40], whole[:-1], whole[:70] + b"x" + whole[71:], b"mpp idx9" + whole[8:]):
        sidecars[0].write_bytes(damage)
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
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(-1, 2**24))),
    st.tuples(*[st.integers(0, 2**60)] * 3),
)
def test_an_index_survives_being_kept(rows, counts):
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
    blocks, sizes = columns[:, 0].astype(np.uint32), columns[:, 1].astype(np.uint32)
    index = TarIndex(blocks, sizes, columns[:, 2].astype(np.int32), *counts)
    data = index.to_bytes()
    back = TarIndex.from_bytes(data, counts[2])
    assert back is not None
    assert [back.ignored, back.refused, back.tar_size] == list(counts)
    for name in ("blocks", "sizes", "labels"):
        assert getattr(back, name).dtype == getattr(index, name).dtype
        assert getattr(back, name).tolist() == getattr(index, name).tolist()
    assert TarIndex.from_bytes(data, counts[2] + 1) is None
    assert TarIndex.from_bytes(data + b"\0", counts[2]) is None
