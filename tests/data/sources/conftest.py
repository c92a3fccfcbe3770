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
    running = FileServer(tmp_path / "www")
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own; what fails is asked for again at once."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mpp.data.sources.remote._FIRST_PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def no_progress_bars():
    """Without those of `datasets`."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def pictures(encode):
    """Twenty PNG files of one grey each."""
    return [encode(np.full((8, 8, 3), number * 10, dtype=np.uint8)) for number in range(20)]


@pytest.fixture
def made(pictures):
    """`made(start, stop)`: a dataset of pictures in three named classes, the last image first."""
    datasets = pytest.importorskip("datasets")

    def make(start=0, stop=20, **columns):
        numbers = range(stop - 1, start - 1, -1)
        features = {"id": datasets.Value("int64"), "image": datasets.Image()}
        values = {"id": list(numbers), "image": [{"bytes": pictures[n], "path": f"{n}.png"} for n in numbers]}
        if not columns:
            features["label"] = datasets.ClassLabel(names=["ant", "bee", "cat"])
            values["label"] = [n % 3 for n in numbers]
        for name, (feature, column) in columns.items():
            features[name], values[name] = feature, [column[n] for n in numbers]
        return datasets.Dataset.from_dict(values, features=datasets.Features(features))

    return make


@pytest.fixture
def write_parquet():
    """`write_parquet(folder, train=...)`: a folder with one Parquet file of each dataset, by the name of its split."""

    def write(folder, **parts):
        folder.mkdir(exist_ok=True)
        for name, part in parts.items():
            part.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
        return folder

    return write


@pytest.fixture(params=["saved", "parquet"])
def split_in_two(request, made, write_parquet, tmp_path):
    """The source string of a dataset with twelve images to train and eight to test."""
    datasets = pytest.importorskip("datasets")
    parts = {"train": made(0, 12), "test": made(12, 20)}
    if request.param == "saved":
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    else:
        write_parquet(tmp_path / "two", **parts)
    return f"hf:{tmp_path / 'two'}"
