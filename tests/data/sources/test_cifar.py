import errno
import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest

import mpp.system.torchvision_import  # noqa: F401
from mpp.data.sources.opening import open_source, open_splits
from tests.data.sources.reading import refused

from torchvision.datasets import CIFAR10, CIFAR100  # isort: skip


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A small CIFAR, checksums included: (kind, folder, torchvision's class)."""
    kind = request.param
    reader, key, number = (CIFAR10, "labels", 10) if kind == "cifar10" else (CIFAR100, "fine_labels", 100)
    folder = tmp_path / "cifar"
    (folder / reader.base_folder).mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / reader.base_folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    for attribute in ("train_list", "test_list"):
        checked = []
        for name, _ in getattr(reader, attribute):
            pixels = generator.integers(0, 256, (6, 3072), dtype=np.uint8)
            checked.append([name, write(name, {"data": pixels, key: generator.integers(0, number, 6).tolist()})])
        monkeypatch.setattr(reader, attribute, checked)
    classes = [f"class {label}" for label in range(number)]
    meta = {**reader.meta, "md5": write(reader.meta["filename"], {reader.meta["key"]: classes})}
    monkeypatch.setattr(reader, "meta", meta)
    return kind, folder, reader


def pack(cifar, archive):
    _, folder, reader = cifar
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / reader.base_folder, reader.base_folder)


@pytest.mark.parametrize("form", ["unpacked", "the folder itself", "packed"])
def test_cifar_equals_torchvision(form, cifar, tmp_path):
    kind, folder, reader = cifar
    root = folder
    if form == "the folder itself":
        root = (folder / reader.base_folder).rename(tmp_path / "by any name")
        folder.rename(tmp_path / "gone")
        folder.mkdir()
        (folder / reader.base_folder).symlink_to(root)
    elif form == "packed":
        root = tmp_path / "packed"
        pack(cifar, root / reader.filename)
    for split, source in open_splits(f"{kind}:{root}").items():
        reference = reader(str(folder), train=split == "train")
        assert source.labels().tolist() == reference.targets
        assert list(source.classes) == reference.classes
        np.testing.assert_array_equal(np.stack([source.read(i)[0] for i in range(len(source))]), reference.data)
        assert source.read(0)[0].flags.c_contiguous
        assert source.location(2) == f"image 2 of the {split} split of {kind}:{root}"
    if form == "packed":
        assert [path.name for path in root.iterdir()] == [reader.filename]  # nothing is unpacked beside it


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unofficial_pickles_are_never_loaded(cifar, tmp_path):
    kind, folder, reader = cifar
    for name in (reader.train_list[0][0], reader.meta["filename"]):
        path = folder / reader.base_folder / name
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        assert f"{name} is not the official file" in refused(f"{kind}:{folder}")
        path.write_bytes(before)
    assert not (tmp_path / "ran").exists()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_damaged_or_missing_cifar(cifar, tmp_path, monkeypatch):
    kind, folder, reader = cifar
    text = refused(f"{kind}:{tmp_path / 'none'}")
    assert f"found no {reader.filename}, packed or unpacked, in {tmp_path / 'none'}; --download true fetches it" in text
    archive = tmp_path / "packed" / reader.filename
    pack(cifar, archive)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", full_disk)
        text = refused(f"{kind}:{archive.parent}")
        assert f"cannot unpack {archive}" in text
        assert "No space left on device" in text
    data = archive.read_bytes()
    archive.write_bytes(data[:200] + bytes(200) + data[400:])
    assert "is not a complete archive" in refused(f"{kind}:{archive.parent}")
    archive.write_bytes(data[:-100])
    assert "is not a complete archive" in refused(f"{kind}:{archive.parent}")
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("other"), io.BytesIO())
    assert f"{reader.train_list[0][0]} is missing" in refused(f"{kind}:{archive.parent}")
    (folder / reader.base_folder / reader.test_list[0][0]).unlink()
    assert f"{reader.test_list[0][0]} is missing" in refused(f"{kind}:{folder}")


@pytest.fixture
def served(tmp_path):
    """The address under which tmp_path/served is served on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_download(cifar, served, tmp_path, monkeypatch):
    kind, _, reader = cifar
    archive = tmp_path / "served" / reader.filename
    pack(cifar, archive)
    monkeypatch.setattr(reader, "url", f"{served}/{reader.filename}")
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / reader.filename).write_bytes(archive.read_bytes()[:500])
    for download in (True, False):  # a broken one is replaced, and then it is there
        source = open_source(f"{kind}:{tmp_path / 'new'}", download=download)
        assert len(source) == 6 * len(reader.train_list)
    monkeypatch.setattr(reader, "url", f"{served}/nowhere.tar.gz")
    assert f"the download of {reader.url} failed" in refused(f"{kind}:{tmp_path / 'newer'}", download=True)
