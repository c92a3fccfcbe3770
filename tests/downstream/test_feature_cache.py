"""Cached features are the features, and nothing that happens to the files ends a run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.downstream.feature_cache import Features, cached_features, weights_hash

KEY = {"weights": "abc", "images": "def", "size": [224, 224], "pool": "mean"}


class Encoder:
    """Features that differ in every call, and a count of the calls."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.calls = 0
        self.dtype = dtype

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        rng = np.random.default_rng(self.calls)
        features = np.asfortranarray(rng.normal(size=(5, 3)).astype(self.dtype))
        features.flat[0], features.flat[1] = np.nan, -0.0
        return features, np.array([9, 3, 1, 7, 2], dtype=np.int32)


def same(one: Features, other: Features) -> bool:
    bits = [[(part.dtype, part.shape, part.tobytes()) for part in features] for features in (one, other)]
    return bits[0] == bits[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where features are cached."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))
    return tmp_path / "features"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_same_bits_fresh_and_cached(dtype: Any, folder: Path) -> None:
    encoder = Encoder(dtype)
    fresh = cached_features(KEY, encoder)
    cached = cached_features(dict(reversed(KEY.items())), encoder)
    assert encoder.calls == 1
    assert same(fresh, cached)
    features, indices = cached
    assert fresh[0].flags.c_contiguous == features.flags.c_contiguous is True  # or BLAS may sum in another order
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(features, Encoder(dtype)()[0].astype(np.float32))
    assert indices.tolist() == [9, 3, 1, 7, 2]
    (path,) = folder.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # colleagues may share the folder
    none = np.empty((0, 0), dtype=np.float32), np.empty(0, dtype=np.int64)
    assert same(cached_features({"none": 1}, lambda: none), none)
    assert same(cached_features({"none": 1}, lambda: 1 / 0), none)
    cached_features(KEY | {"size": 224}, encoder)
    assert encoder.calls == 2


def test_damaged_files_are_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder()
    cached_features(KEY, encoder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    with np.load(path) as arrays:
        good = dict(arrays)
    flipped = bytearray(whole)
    flipped[whole.index(good["features"].tobytes()) + 17] ^= 1
    damaged: list[bytes | dict[str, Any]] = [b"", b"no archive", whole[:-30], whole[: len(whole) // 2], bytes(flipped)]
    damaged += [{"features": good["features"]}, {**good, "key": np.array("{}")}]
    damaged += [{**good, "features": good["features"].astype(float)}, {**good, "indices": good["indices"][:2]}]
    damaged += [{**good, "indices": np.array([None] * 5)}]  # would have to be unpickled
    for content in damaged:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)
        calls = encoder.calls
        fresh = cached_features(KEY, encoder)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"note: the cached features {path} cannot be used (")
        assert line.endswith("); they are computed again")
        assert same(cached_features(KEY, encoder), fresh)
        assert encoder.calls == calls + 1
    assert capsys.readouterr().err == ""
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_or_has_no_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder()
    folder.touch()
    cached_features(KEY, encoder)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"note: cannot keep features in {folder} (")
    assert last.endswith("set MPP_CACHE to a folder with room")
    folder.unlink()
    monkeypatch.setenv("MPP_CACHE_LIMIT", "99B")
    cached_features(KEY, encoder)
    said = capsys.readouterr().err
    assert said.startswith(f"note: cannot keep features in {folder} (an array of features takes 100 bytes, of ")
    assert not list(folder.parent.glob("features/*"))
    monkeypatch.setenv("MPP_CACHE_LIMIT", "10kB")
    cached_features(KEY, encoder)
    (first,) = folder.iterdir()
    os.utime(first, (0, 0))
    cached_features(KEY, encoder)
    assert encoder.calls == 3
    assert first.stat().st_mtime > 0  # used again, so that it is not the first to go


def test_all_ranks_extract_where_one_lacks_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        cached_features(KEY, encoder)
        assert not folder.exists()  # another process of this machine writes
        patch.setenv("LOCAL_RANK", "0")
        cached_features(KEY, encoder)
        patch.setattr("mpp.downstream.feature_cache.dist.any_rank", lambda flag: True)
        latest = cached_features(KEY, encoder)
        assert encoder.calls == 3
    assert same(cached_features(KEY, encoder), latest)  # as the others have cached, too
    assert encoder.calls == 3


def state(**changed: Tensor) -> dict[str, Tensor]:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(4, dtype=torch.bfloat16)}
    return tensors | {"d": torch.zeros(0, 3), "e": torch.tensor([True, False])} | changed


def test_weights_hash() -> None:
    first = weights_hash(state())
    assert len(first) == 64
    assert weights_hash(dict(reversed(state().items()))) == first
    turned = state()["a"].t().contiguous().t()  # the same numbers in another order in memory
    assert weights_hash(state(a=turned.requires_grad_())) == first
    a = state()["a"]
    others = [state(a=other) for other in (a.reshape(3, 2), a.double(), a + 1e-6)]
    others += [state(b=torch.tensor(4)), state(c=torch.ones(4, dtype=torch.float16)), state(d=torch.zeros(3, 0))]
    others += [state(e=torch.tensor([False, True])), state(f=torch.zeros(0))]
    assert len({first, *map(weights_hash, others)}) == 9
