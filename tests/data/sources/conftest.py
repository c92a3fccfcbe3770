"""Fixtures for the tests of sources: a server of files, a cache, pictures, datasets of Hugging Face."""

import threading

import numpy as np
import pytest

from tests.data.sources.file_server import FileServer


@pytest.fixture
def images():
    """uint8 (5, 6, 7, 3)."""
    return np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


@pytest.fixture
def server(tmp_path):
    """A server of the files in a folder of its own."""
    (tmp_path / "www").mkdir()
    with FileServer(tmp_path / "www") as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield running
        running.shutdown()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own; what fails is asked for again at once."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mpp.data.sources.remote._FIRST_PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pictures(encode):
    """Twenty PNG files of one grey each."""
    return [encode(np.full((8, 8, 3), number * 10, dtype=np.uint8)) for number in range(20)]


@pytest.fixture
def made(pictures):
    """`made(start, stop)`: a dataset of pictures in three named classes, the last image first."""
    datasets = pytest.importorskip("datasets")

    def make(start=0, stop=20, **columns):
        columns = columns or {"label": (datasets.ClassLabel(names=["ant", "bee", "cat"]), [n % 3 for n in range(20)])}
        images = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(pictures)]
        columns = {"id": (datasets.Value("int64"), range(20)), "image": (datasets.Image(), images), **columns}
        values = {name: [column[n] for n in range(stop - 1, start - 1, -1)] for name, (_, column) in columns.items()}
        features = {name: feature for name, (feature, _) in columns.items()}
        return datasets.Dataset.from_dict(values, features=datasets.Features(features))

    return make


@pytest.fixture(params=["saved", "parquet"])
def split_in_two(request, made, tmp_path):
    """The source string of a dataset with twelve images to train and eight to test."""
    parts = {"train": made(0, 12), "test": made(12, 20)}
    if request.param == "saved":
        pytest.importorskip("datasets").DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    else:
        (tmp_path / "two").mkdir()
        for name, part in parts.items():
            part.to_parquet(str(tmp_path / "two" / f"{name}-00000-of-00001.parquet"))
    return f"hf:{tmp_path / 'two'}"
