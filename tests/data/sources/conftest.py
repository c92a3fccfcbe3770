"""What the tests of sources share: a server of files, and datasets of Hugging Face."""

import threading

import numpy as np
import pytest

from tests.data.sources.file_server import FileServer
from tests.data.sources.parquet import write_parquet


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
        held = {"id": list(numbers), "image": [{"bytes": pictures[n], "path": f"{n}.png"} for n in numbers]}
        if not columns:
            features["label"] = datasets.ClassLabel(names=["ant", "bee", "cat"])
            held["label"] = [n % 3 for n in numbers]
        for name, (feature, values) in columns.items():
            features[name], held[name] = feature, [values[n] for n in numbers]
        return datasets.Dataset.from_dict(held, features=datasets.Features(features))

    return make


@pytest.fixture(params=["saved", "parquet"])
def split_in_two(request, made, tmp_path):
    """The source string of a dataset with twelve images to train and eight to test."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "held"
    if request.param == "saved":
        datasets.DatasetDict(train=made(0, 12), test=made(12, 20)).save_to_disk(str(folder))
    else:
        write_parquet(folder, train=made(0, 12), test=made(12, 20))
    return f"hf:{folder}"
