"""Kept features are the features, and nothing that happens to the files ends a run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpp.downstream.cache import FeatureCache, Features, weights_hash
from mpp.system.files import cache_folder

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
    pairs = list(zip(one, other, strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_same_bits_fresh_and_kept(dtype: Any, tmp_path: Path) -> None:
    encoder = Encoder(dtype)
    fresh = FeatureCache(tmp_path / "new").get(KEY, encoder)
    kept = FeatureCache(tmp_path / "new").get(dict(reversed(KEY.items())), encoder)
    assert encoder.calls == 1
    assert same(fresh, kept)
    features, indices = kept
    assert (features.dtype, indices.dtype) == (np.float32, np.int64)
    assert fresh[0].flags.c_contiguous == features.flags.c_contiguous is True  # or BLAS may sum in another order
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(features, Encoder(dtype)()[0].astype(np.float32))
    assert indices.tolist() == [9, 3, 1, 7, 2]


@given(other=st.dictionaries(st.sampled_from(list(KEY)), st.sampled_from([None, 0, "", "abc", [224], [224, 224]])))
def test_every_other_key_is_another_file(other: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    cache, encoder = FeatureCache(tmp_path_factory.mktemp("keys")), Encoder()
    cache.get(KEY, encoder)
    cache.get(KEY | other, encoder)
    assert encoder.calls == (1 if KEY | other == KEY else 2)


def test_the_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    FeatureCache().get(KEY, Encoder())
    (path,) = (tmp_path / "features").iterdir()
    assert path.suffix == ".npz"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # colleagues may share the folder


def test_empty_features_are_features(tmp_path: Path) -> None:
    none = np.empty((0, 0), dtype=np.float32), np.empty(0, dtype=np.int64)
    assert same(FeatureCache(tmp_path).get(KEY, lambda: none), none)
    assert same(FeatureCache(tmp_path).get(KEY, lambda: 1 / 0), none)


def test_damaged_files_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, encoder = FeatureCache(tmp_path), Encoder()
    cache.get(KEY, encoder)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with np.load(path) as held:
        good = dict(held)
    flipped = bytearray(whole)
    flipped[whole.index(good["features"].tobytes()) + 17] ^= 1
    damaged: list[bytes | dict[str, Any]] = [b"", b"no archive", whole[:-30], whole[: len(whole) // 2], bytes(flipped)]
    damaged += [{"features": good["features"]}, {**good, "key": np.array("{}")}]
    damaged += [{**good, "features": good["features"].astype(float)}, {**good, "indices": good["indices"][:2]}]
    damaged += [{**good, "indices": np.array([None] * 5)}]  # would have to be unpickled
    assert capsys.readouterr().err == ""
    for content in damaged:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)
        calls = encoder.calls
        fresh = cache.get(KEY, encoder)
        assert encoder.calls == calls + 1
        said = capsys.readouterr().err
        assert said.startswith(f"note: the kept features {path} cannot be used (")
        assert said.endswith("); they are computed again\n")
        assert said.count("\n") == 1
        assert same(cache.get(KEY, encoder), fresh)
        assert encoder.calls == calls + 1
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    cache, encoder = FeatureCache(tmp_path / "file" / "features"), Encoder()
    cache.get(KEY, encoder)
    assert encoder.calls == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"note: cannot keep features in {tmp_path / 'file' / 'features'} (")
    assert last.endswith("set MPP_CACHE to a folder with room")


def test_features_for_which_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))
    monkeypatch.setenv("MPP_CACHE_LIMIT", "99B")
    encoder = Encoder()
    FeatureCache().get(KEY, encoder)
    said = capsys.readouterr().err
    assert said.startswith(
        f"note: cannot keep features in {tmp_path}/features (an array of features takes 100 bytes, of "
    )
    assert not list(tmp_path.glob("features/*"))
    monkeypatch.setenv("MPP_CACHE_LIMIT", "10kB")
    (first,) = (FeatureCache().get(KEY, encoder), *tmp_path.glob("features/*"))[1:]
    os.utime(first, (0, 0))
    FeatureCache().get(KEY, encoder)
    assert encoder.calls == 2
    assert first.stat().st_mtime > 0  # used again


def test_what_fits_no_cache(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    with pytest.raises(TypeError):
        cache.get({"key": object()}, Encoder())
    with pytest.raises(ValueError, match="JSON"):
        cache.get({"key": float("nan")}, Encoder())
    with pytest.raises(ValueError, match=r"got \(5, 3\), \(4,\)"):
        cache.get(KEY, lambda: (np.zeros((5, 3)), np.zeros(4)))
    assert not list(tmp_path.iterdir())


def test_all_ranks_extract_where_one_lacks_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, encoder = FeatureCache(tmp_path), Encoder()
    monkeypatch.setenv("LOCAL_RANK", "1")
    cache.get(KEY, encoder)
    assert not list(tmp_path.iterdir())  # another process of this machine writes
    monkeypatch.setenv("LOCAL_RANK", "0")
    cache.get(KEY, encoder)
    monkeypatch.setattr("mpp.downstream.cache.dist.any_rank", lambda flag: True)
    latest = cache.get(KEY, encoder)
    assert encoder.calls == 3
    monkeypatch.undo()
    assert same(cache.get(KEY, encoder), latest)  # what the others have kept, too
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
    others = [
        state(a=state()["a"].reshape(3, 2)),
        state(a=state()["a"].double()),
        state(a=state()["a"] + 1e-6),
        state(b=torch.tensor(4)),
        state(c=torch.ones(4, dtype=torch.float16)),
        state(d=torch.zeros(3, 0)),
        state(e=torch.tensor([False, True])),
        state(f=torch.zeros(0)),
    ]
    assert len({first, *map(weights_hash, others)}) == 9
