import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mpp.errors import ConfigError
from mpp.sources import local_shards
from mpp.sources.base import SourceError, Subset
from mpp.sources.descriptors import Descriptors
from mpp.sources.mixture import MixtureSource
from mpp.sources.opening import open_source


def write_tar(path, members):
    """`members`: (name, bytes or TarInfo) in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                data.name = name
                tar.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder, number=3, each=4):
    """Shards whose images are not even images: nothing here decodes."""
    for shard in range(number):
        members = []
        for i in range(each):
            key = f"{shard * each + i:04d}"
            members += [(f"{key}.jpg", f"image {key}".encode()), (f"{key}.cls", str(i % 3).encode())]
        write_tar(folder / f"s-{shard:03d}.tar", members)
    return folder


def refused(spec):
    with pytest.raises(SourceError) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def all_read(source):
    return [source.read(i) for i in range(len(source))]


def test_shards_equal_tarfile(tmp_path):
    write_shards(tmp_path)
    source = open_source(f"shards:{tmp_path}/s-{{000..002}}.tar")
    expected = []
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            held = {member.name: tar.extractfile(member).read() for member in tar}
        expected += [(held[name], int(held[name[:-3] + "cls"])) for name in held if name.endswith("jpg")]
    assert all_read(source) == expected
    assert source.labels().tolist() == [label for _, label in expected]
    assert source.classes == ("0", "1", "2")
    assert source.describe() == "12 images in 3 classes"
    assert source.where(5).startswith(str(tmp_path / "s-001.tar"))


def test_globs_are_sorted_and_unique(tmp_path):
    write_shards(tmp_path)
    once = all_read(open_source(f"shards:{tmp_path}/*.tar"))
    assert all_read(open_source(f"shards:{tmp_path}/s-{{002,00?,000}}.tar")) == once


def test_naming(tmp_path):
    directory = tarfile.TarInfo()
    directory.type = tarfile.DIRTYPE
    link, device = tarfile.TarInfo(), tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    write_tar(
        tmp_path / "a.tar",
        [
            ("x", directory),
            ("x/b.cls", b" 1\n"),
            ("x/b.seg.png", b"its mask"),
            ("x/b.png", b"one image of a key"),
            ("y.d/b.JPG", b"other folder"),
            ("y.d/b.json", b'{"label": 0, "more": [1]}'),
            ("c.webp", b"third"),
            ("c.json", b'{"label": 5}'),
            ("c.cls", b"2"),
            ("c.txt", b"a caption"),
            ("._c.jpg", b"what macOS adds"),
            ("link.jpg", link),
            ("device.jpg", device),
        ],
    )
    source = open_source(f"shards:{tmp_path}/a.tar")
    assert all_read(source) == [(b"one image of a key", 1), (b"other folder", 0), (b"third", 2)]
    assert source.describe() == "3 images in 3 classes; ignored 5 other members, such as device.jpg"


@pytest.mark.parametrize(
    ("names", "images", "ignored"),
    [
        (
            ["cam.0000.jpg", "cam.0001.jpg", "cam.0002.JPG", "cam.0001.cls"],
            [("cam.0000.jpg", None), ("cam.0001.jpg", 7), ("cam.0002.JPG", None)],
            0,
        ),
        (["IMG.05.01.jpg", "v1.0/a.png", "IMG.05.01.cls"], [("IMG.05.01.jpg", 7), ("v1.0/a.png", None)], 0),
        (["a.left.jpg", "a.right.jpg", "a.cls", "a.right.json"], [("a.left.jpg", 7), ("a.right.jpg", 8)], 0),
        (["a.seg.png", "a.jpg", "a.cls", "b.jpg", "b.seg.png"], [("a.jpg", 7), ("b.jpg", None)], 2),
        (["a.jpg", "a.jpg.json", "b.0.png", "b.0.png.json"], [("a.jpg", 8), ("b.0.png", 8)], 0),
        (["a.jpg", "a.png", "a.txt", "a.left.txt", "jpg", "b", "a.0.jpg.cls"], [("a.jpg", None)], 5),
        (["a.0.jpg", "a.0.JPG"], [("a.0.jpg", None)], 1),
        (["/d/a.jpg", "/d/a.cls", "d/a.jpg"], [("/d/a.jpg", 7), ("d/a.jpg", None)], 0),
        (["./d/a.jpg", "d/a.cls", "d//a.jpg"], [("./d/a.jpg", 7)], 1),
        (["../a.jpg", "../a.cls", "x/../a.0.jpg"], [("../a.jpg", 7), ("x/../a.0.jpg", None)], 0),
    ],
)  # fmt: skip
def test_keys(names, images, ignored, tmp_path):
    """The names of the members that are images, with their labels, and how many others are ignored."""
    held = {"cls": b"7", "json": b'{"label": 8}'}
    members = [(name, held.get(name.rpartition(".")[2], name.encode())) for name in names]
    source = open_source(f"shards:{write_tar(tmp_path / 'a.tar', members)}")
    assert [(data.decode(), label) for data, label in all_read(source)] == images
    assert (source.describe().partition("ignored ")[2].partition(" ")[0] or "0") == str(ignored)


def test_pictures_that_are_lost_are_a_warning(tmp_path):
    members = [("cam.jpg", b"one"), *((f"cam.{i:04d}.jpg", b"more") for i in range(120))]
    source = open_source(f"shards:{write_tar(tmp_path / 'a.tar', members)}")
    why = "a sample has one image, KEY.jpg or of another known ending"
    assert source.warnings == (f"120 pictures ignored, such as cam.0000.jpg: {why}",)
    assert open_source(f"shards:{tmp_path}/a.tar").warnings == source.warnings  # from the kept index
    assert Subset(source, [0]).warnings == MixtureSource("m", [source]).warnings == source.warnings
    write_tar(tmp_path / "b.tar", [(f"{i}.{end}", b"x") for i in range(120) for end in ("jpg", "txt")])
    source = open_source(f"shards:{tmp_path}/b.tar")
    assert (source.describe(), source.warnings) == (
        "120 images, unlabelled; ignored 120 other members, such as 0.txt",
        (),
    )


def test_members_that_are_no_images_of_ours(tmp_path):
    named = (
        "/etc/a.jpg",
        "../b.jpg",
        "x/../../c.jpg",
        "x/..",
        "../e.cls",
        "/etc/d.jpg",
    )  # never a path of this machine
    hidden = (".DS_Store", "__MACOSX/f.jpg", "./x/._g.jpg", ".cache/h.jpg", "x/Thumbs.db")
    link = tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    fifo, hard = tarfile.TarInfo(), tarfile.TarInfo()
    fifo.type = tarfile.FIFOTYPE
    hard.type, hard.linkname = tarfile.LNKTYPE, "ours.jpg"
    members = [(name, b"no") for name in (*named, *hidden)]
    members += [("../link.jpg", link), ("fifo.jpg", fifo), ("hard.jpg", hard)]
    members += [("./ours.jpg", b"yes"), ("ours.cls", b"0"), ("./x/y.npy", b""), ("x/y.cls", b"0")]
    source = open_source(f"shards:{write_tar(tmp_path / 'a.tar', members)}")
    assert all_read(source) == [*[(b"no", None)] * 4, (b"yes", 0), (b"", 0)]
    assert source.describe() == ("6 images in 1 class; ignored 9 other members, such as ../link.jpg; 4 without a label")


def test_class_names_of_several_folders_agree(tmp_path):
    for folder, names in (("a", "ant\nbee\ncat\n"), ("b", "ant\nbee\ncat"), ("c", "cat\nbee\nant\n"), ("d", None)):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, 1)
        if names:
            (tmp_path / folder / "classes.txt").write_text(names)
    assert open_source(f"shards:{tmp_path}/{{a,b,d}}/*.tar").classes == ("ant", "bee", "cat")
    assert "a/classes.txt and" in refused(f"shards:{tmp_path}/{{a,c}}/*.tar")
    (tmp_path / "a" / "classes.txt").write_bytes(b"\xff\xfe")
    assert "write it in UTF-8" in refused(f"shards:{tmp_path}/a/*.tar")


def test_state(tmp_path):
    write_shards(tmp_path, 2)
    source = open_source(f"shards:{tmp_path}/*.tar")
    before = list(source.state(True))
    assert list(source.state(False)) == ["s-000.tar 10240", "s-001.tar 10240"]
    os.utime(tmp_path / "s-001.tar", (1, 1))
    assert [a == b for a, b in zip(source.state(True), before, strict=True)] == [True, False]
    assert list(source.state(False)) == ["s-000.tar 10240", "s-001.tar 10240"]
    (tmp_path / "s-001.tar").unlink()
    assert list(source.state(False))[1] == "s-001.tar error 2"


def test_unlabelled_and_partly_labelled(tmp_path):
    write_tar(tmp_path / "none.tar", [("a.jpg", b"a"), ("b.jpg", b"b"), ("b.json", b'{"text": "x"}')])
    source = open_source(f"shards:{tmp_path}/none.tar")
    assert (source.classes, source.labels(), source.read(1)) == (None, None, (b"b", None))
    write_tar(tmp_path / "some.tar", [("a.jpg", b"a"), ("a.cls", b"0"), ("b.jpg", b"b")])
    source = open_source(f"shards:{tmp_path}/some.tar")
    assert (source.labels().tolist(), source.read(1)) == ([0, -1], (b"b", None))
    assert source.describe() == "2 images in 1 class; 1 without a label"


def test_labels_of_a_few_images_of_a_large_set(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), ("a.cls", b"99999"), ("b.jpg", b"b"), ("b.cls", b"100001")])
    source = open_source(f"shards:{tmp_path}/a.tar")
    assert (len(source.classes), source.labels().tolist()) == (100_000, [99_999, -1])
    (tmp_path / "classes.txt").write_text("".join(f"class {i}\n" for i in range(100_002)))
    source = open_source(f"shards:{tmp_path}/a.tar")
    assert (len(source.classes), source.labels().tolist()) == (100_002, [99_999, 100_001])


def test_class_names(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_source(f"shards:{tmp_path}/*.tar").classes == ("ant", "bee", "cat")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert "names 2 classes, but there is a label 2" in refused(f"shards:{tmp_path}/*.tar")


def test_gzip_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache" / "deep"))
    write_shards(tmp_path, 2)
    plain = all_read(open_source(f"shards:{tmp_path}/*.tar"))
    for path in sorted(tmp_path.glob("*.tar")):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert all_read(open_source(f"shards:{tmp_path}/*.tar.gz")) == plain
    monkeypatch.setattr(local_shards, "_unpack", None)
    assert all_read(open_source(f"shards:{tmp_path}/*.tar.gz")) == plain
    monkeypatch.undo()
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache" / "deep"))
    for unpacked in (tmp_path / "cache" / "deep").glob("*.tar"):
        unpacked.write_bytes(unpacked.read_bytes()[:1024])
    assert all_read(open_source(f"shards:{tmp_path}/*.tar.gz")) == plain


def test_the_index_is_kept_and_distrusted(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MPP_CACHE", str(cache))
    spec = f"shards:{write_shards(tmp_path, 1)}/s-000.tar"
    first = all_read(open_source(spec))
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(local_shards, "index_tar", None)
        assert all_read(open_source(spec)) == first
    whole = kept.read_bytes()
    for damage in (b"", b"nonsense", whole[: len(whole) // 2], whole[:200] + b"\0" * 60 + whole[260:]):
        kept.write_bytes(damage)
        assert all_read(open_source(spec)) == first
    write_tar(tmp_path / "s-000.tar", [("new.jpg", b"new"), ("new.cls", b"0")])
    assert all_read(open_source(spec)) == [(b"new", 0)]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "file" / "cache"))
    write_shards(tmp_path, 1)
    assert len(open_source(f"shards:{tmp_path}/s-000.tar")) == 4
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    text = refused(f"shards:{tmp_path}/s.tar.gz")
    assert "cannot unpack s.tar.gz" in text
    assert "set MPP_CACHE" in text


def test_a_failed_unpacking_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    noise = np.random.default_rng(0).bytes(100_000)
    whole = gzip.compress(write_tar(tmp_path / "a.tar", [("a.jpg", noise)]).read_bytes())
    for damaged in (whole[:50_000], whole[:-4] + b"\0\0\0\0", whole[:30_000] + b"\xff" * 500 + whole[30_500:]):
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        assert "a.tar.gz is not a complete gzip file" in refused(f"shards:{tmp_path}/a.tar.gz")
    assert what_is_kept(tmp_path / "cache") == []


def what_is_kept(cache):
    return [path.name for path in cache.iterdir() if path.is_file() and path.suffix != ".lock"]


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local_shards, "_MOST_SMALL", 2**20)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(2**23)))
    text = refused(f"shards:{tmp_path}/a.tar.gz")
    assert "a.tar.gz has 8.18 kB and unpacks to more than 1.05 MB, which images do not; if it is right, gunzip" in text
    assert what_is_kept(tmp_path / "cache") == []
    monkeypatch.setattr(local_shards, "_MOST_SMALL", 2**24)
    assert "no image in 1 shard" in refused(f"shards:{tmp_path}/a.tar.gz")


def test_room_is_looked_for_before_unpacking(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPP_CACHE_LIMIT", "none")
    noise = np.random.default_rng(0).bytes(100_000)
    whole = gzip.compress(write_tar(tmp_path / "a.tar", [("a.jpg", noise)]).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(whole)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with monkeypatch.context() as patch:
        patch.setattr(local_shards, "write_whole", None)  # not even begun
        text = refused(f"shards:{tmp_path}/a.tar.gz")
    assert "cannot unpack a.tar.gz into" in text
    assert "a.tar.gz, unpacked, takes 102 kB" in text
    assert "has room for 95 kB); set MPP_CACHE to a folder with room, or gunzip the shards" in text
    # One that says less than it has ends in the middle, with room to spare on the disk.
    (tmp_path / "b.tar.gz").write_bytes(whole + gzip.compress(bytes(10**6)) + gzip.compress(b""))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    text = refused(f"shards:{tmp_path}/b.tar.gz")
    assert "cannot unpack b.tar.gz into" in text
    assert "(it unpacks to more than 190 kB, for which there is room); set MPP_CACHE" in text
    monkeypatch.setenv("MPP_CACHE_LIMIT", "50kB")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "of the 50 kB that MPP_CACHE_LIMIT allows" in refused(f"shards:{tmp_path}/a.tar.gz")
    assert what_is_kept(tmp_path / "cache") == []
    monkeypatch.setenv("MPP_CACHE_LIMIT", "some")
    with pytest.raises(ConfigError, match=r"MPP_CACHE_LIMIT 'some' is no size; write e\.g\. 200GB, 50%"):
        open_source(f"shards:{tmp_path}/a.tar.gz")


def test_what_a_killed_unpacking_left_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    (write_shards(tmp_path, 1) / "s.tar.gz").write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    killed = """
import os, sys
from mpp.errors import ConfigError
from mpp.sources import local_shards
from mpp.sources.shards import open_shards
write = local_shards.write_whole
local_shards.write_whole = lambda path, function: write(path, lambda file: (function(file), os.kill(os.getpid(), 9)))
open_shards("shards:x", sys.argv[1])
"""
    spec = f"shards:{tmp_path}/s.tar.gz"
    assert subprocess.run([sys.executable, "-c", killed, f"{tmp_path}/s.tar.gz"]).returncode == -9
    (left,) = what_is_kept(tmp_path / "cache")
    os.utime(tmp_path / "cache" / left, (0, 0))  # what is new may belong to one that has yet to lock it
    assert len(open_source(spec)) == 4
    assert sorted(name.partition(".")[2] for name in what_is_kept(tmp_path / "cache")) == ["index", "tar"]


def test_errors(tmp_path):
    write_shards(tmp_path, 2)
    assert f"{tmp_path}/s-002.tar matches no file" in refused(f"shards:{tmp_path}/s-{{000..002}}.tar")
    assert f"{tmp_path}/no*.tar matches no file" in refused(f"shards:{tmp_path}/no*.tar")
    assert "is a folder; write e.g. shards:DIR/*.tar" in refused(f"shards:{tmp_path}")
    (tmp_path / "text.tar").write_text("not a tar file, " * 100)
    assert "text.tar is not a complete tar file" in refused(f"shards:{tmp_path}/text.tar")
    whole = (tmp_path / "s-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "big.tar").write_bytes(write_tar(tmp_path / "b.tar", [("a.jpg", b"x" * 5000)]).read_bytes()[:2000])
    assert "big.tar is not a complete tar file" in refused(f"shards:{tmp_path}/big.tar")
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    assert "no image in 1 shard;" in refused(f"shards:{tmp_path}/empty.tar")


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("a.cls", b"cat"),
        ("a.cls", "٣".encode()),
        ("a.cls", b"-2"),
        ("a.cls", b"1" * 5000),
        ("a.cls", b" " * 2**20 + b"1"),
        ("a.json", b"{"),
        ("a.json", b"[" * 100_000),
        ("a.json", b'{"label": ' + b"1" * 5000 + b"}"),
        ("a.json", b'{"label": 1}' + b" " * 2**20),
        ("a.json", json.dumps({"label": "cat"}).encode()),
        ("a.json", json.dumps({"label": True}).encode()),
        ("a.json", json.dumps({"label": 2**24}).encode()),
        ("a.cls", b"16777215"),
        ("a.cls", b"100000"),
    ],
)
def test_a_label_that_cannot_be_read_is_none(member, data, tmp_path):
    others = [("b.jpg", b"b"), ("b.json", b'{"label": 2}')]
    write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), (member, data), *others])
    source = open_source(f"shards:{tmp_path}/a.tar")
    assert all_read(source) == [(b"a", None), (b"b", 2)]
    assert (source.classes, source.labels().tolist()) == (("0", "1", "2"), [-1, 2])
    assert source.describe() == "2 images in 3 classes; 1 label that cannot be read"
    write_tar(tmp_path / "alone.tar", [("a.jpg", b"a"), (member, data)])
    source = open_source(f"shards:{tmp_path}/alone.tar")
    assert (source.classes, source.labels()) == (None, None)
    assert source.describe() == "1 image, unlabelled; 1 label that cannot be read"


def test_the_label_that_can_be_read_counts(tmp_path):
    members = [("a.jpg", b"a"), ("a.json", b'{"label": 1}'), ("a.cls", b"x"), ("b.json", b"x"), ("b.cls", b"0")]
    members += [("b.jpg", b"b"), ("c.jpg", b"c"), ("c.cls", b"-1"), ("d.jpg", b"d"), ("d.json", b'{"label": null}')]
    source = open_source(f"shards:{write_tar(tmp_path / 'a.tar', members)}")
    assert source.labels().tolist() == [1, 0, -1, -1]
    assert source.describe() == "4 images in 2 classes; 2 without a label"


def test_a_shard_that_shrinks_gives_an_error_for_its_images(tmp_path):
    source = open_source(f"shards:{write_shards(tmp_path, 1)}/s-000.tar")
    os.truncate(tmp_path / "s-000.tar", 600)
    assert source.read(0)[0] == b"image 0000"
    with pytest.raises(OSError, match="changed since indexing"):
        source.read(3)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_descriptors_are_few_and_stay_at_home(tmp_path):
    source = open_source(f"shards:{write_shards(tmp_path, 5, 2)}/*.tar")
    source._open = Descriptors(os.O_RDONLY, limit=2)
    before = descriptors()
    expected = all_read(source)
    assert all_read(source) == expected
    copy = pickle.loads(pickle.dumps(source))
    assert all_read(copy) == expected
    assert descriptors() == before + 4
    del source, copy
    assert descriptors() == before


def test_shared_cifar_equals_tarfile(shared):
    path = shared("data/cifar10/cifar10-test-000000.tar.gz")
    source = open_source(f"shards:{path}")
    assert len(source) == 10_000
    assert source.classes[:2] == ("airplane", "automobile")
    assert np.bincount(source.labels()).tolist() == [1000] * 10
    held = {}
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            held[member.name] = tar.extractfile(member).read()
            if len(held) == 200:
                break
    for i in range(100):
        assert source.read(i) == (held[f"{i:06d}.jpg"], int(held[f"{i:06d}.cls"]))
