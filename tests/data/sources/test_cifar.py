import errno
import hashlib
import io
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest

import mpp.system.torchvision_import  # noqa: F401
from mpp.data.sources.opening import open_source, open_splits
from tests.data.sources.reading import all_read, refused

from torchvision.datasets import CIFAR10, CIFAR100  # isort: skip


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A small CIFAR, checksums included: (kind, folder, torchvision's class)."""
    reader, key, number = (CIFAR10, "labels", 10) if request.param == "cifar10" else (CIFAR100, "fine_labels", 100)
    folder = tmp_path / "cifar" / reader.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
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
    return request.param, folder.parent, reader


def pack(cifar, folder):
    """The archive of a small CIFAR, in a folder."""
    _, unpacked, reader = cifar
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / reader.filename, "w:gz") as tar:
        tar.add(unpacked / reader.base_folder, reader.base_folder)
    return folder / reader.filename


@pytest.mark.parametrize("form", ["unpacked", "the folder itself", "packed"])
def test_cifar_equals_torchvision(form, cifar, tmp_path):
    kind, folder, reader = cifar
    root = folder
    if form == "the folder itself":
        root = (folder / reader.base_folder).rename(tmp_path / "by any name")
        (folder / reader.base_folder).symlink_to(root)
    elif form == "packed":
        root = pack(cifar, tmp_path / "packed").parent
    for split, source in open_splits(f"{kind}:{root}").items():
        reference = reader(str(folder), train=split == "train")
        assert source.labels().tolist() == reference.targets
        assert list(source.classes) == reference.classes
        np.testing.assert_array_equal(np.stack([image for image, _ in all_read(source)]), reference.data)
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
    archive = pack(cifar, tmp_path / "packed")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full_disk)
        text = refused(f"{kind}:{archive.parent}")
        assert f"cannot unpack {archive}" in text
        assert "No space left on device" in text
    data = archive.read_bytes()
    for damaged in (data[:200] + bytes(200) + data[400:], data[:-100]):
        archive.write_bytes(damaged)
        assert "is not a complete archive" in refused(f"{kind}:{archive.parent}")
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("other"), io.BytesIO())
    assert f"{reader.train_list[0][0]} is missing" in refused(f"{kind}:{archive.parent}")
    (folder / reader.base_folder / reader.test_list[0][0]).unlink()
    assert f"{reader.test_list[0][0]} is missing" in refused(f"{kind}:{folder}")


def test_download(cifar, server, tmp_path, monkeypatch):
    kind, _, reader = cifar
    data = pack(cifar, server.folder).read_bytes()
    monkeypatch.setattr(reader, "url", f"{server.url}/{reader.filename}")
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(data, usedforsecurity=False).hexdigest())
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / reader.filename).write_bytes(data[:500])
    for download in (True, False):  # a broken one is replaced, and then it is there
        source = open_source(f"{kind}:{tmp_path / 'new'}", download=download)
        assert len(source) == 6 * len(reader.train_list)
    monkeypatch.setattr(reader, "url", f"{server.url}/nowhere.tar.gz")
    assert f"the download of {reader.url} failed" in refused(f"{kind}:{tmp_path / 'newer'}", download=True)
