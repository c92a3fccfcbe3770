import os
import tarfile

import pytest

from mpp.data.sources import shards
from mpp.data.sources.base import Subset
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.opening import open_source
from tests.data.sources.reading import all_read, refused, write_shards, write_tar


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
    assert source.location(5).startswith(str(tmp_path / "s-001.tar"))
    assert all_read(open_source(f"shards:{tmp_path}/s-{{002,00?,000}}.tar")) == expected  # sorted, each once


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
        (["k.dcm", "k.jpg", "l.png", "l.avif"], [("k.jpg", None), ("l.png", None)], 2),  # what needs no extra
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
    assert source.describe() == "120 images, unlabelled; ignored 120 other members, such as 0.txt"
    assert source.warnings == ()


def test_what_must_be_installed_is_named(tmp_path, monkeypatch):
    heic, dicom = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", bytes(128) + b"DICM"
    members = [("a.heic", heic), ("b.jpg", b"jpeg"), ("c.dcm", dicom), ("d.heif", heic), ("e.jpg", b"")]
    spec = f"shards:{write_tar(tmp_path / 'a.tar', members)}"
    monkeypatch.setattr(shards, "lacking", lambda extra: "" if extra == "pillow" else f"pip install {extra}")
    where = f"such as {tmp_path}/a.tar, byte"
    assert open_source(spec).warnings == (
        f"1 of 5 images looked at cannot be read, {where} 2560: to read them, pip install dicom",
        f"2 of 5 images looked at cannot be read, {where} 512: to read them, pip install heif",
    )
    monkeypatch.setattr(shards, "lacking", lambda extra: "")
    assert open_source(spec).warnings == ()


def test_members_of_all_kinds(tmp_path):
    def special(kind, target=""):
        info = tarfile.TarInfo()
        info.type, info.linkname = kind, target
        return info

    hidden = (".DS_Store", "__MACOSX/f.jpg", "./x/._g.jpg", ".cache/h.jpg", "x/Thumbs.db")
    # Names of members are never paths of this machine.
    members = [
        ("x", special(tarfile.DIRTYPE)),
        *((name, b"no") for name in hidden),
        ("../link.jpg", special(tarfile.SYMTYPE, "/etc/passwd")),
        ("fifo.jpg", special(tarfile.FIFOTYPE)),
        ("device.jpg", special(tarfile.CHRTYPE)),
        ("hard.jpg", special(tarfile.LNKTYPE, "ours.jpg")),
        *((name, b"outside") for name in ("/etc/a.jpg", "../b.jpg", "x/../../c.jpg")),
        ("./x/b.cls", b" 1\n"),
        ("x/b.seg.png", b"its mask"),
        ("x/b.png", b"one image of a key"),
        ("y.d/b.JPG", b"other folder"),
        ("y.d/b.json", b'{"label": 0, "more": [1]}'),
        ("c.webp", b"third"),
        ("c.json", b'{"label": 5}'),
        ("c.cls", b"2"),
        ("c.txt", b"a caption"),
        ("d.npy", b""),
    ]
    source = open_source(f"shards:{write_tar(tmp_path / 'a.tar', members)}")
    labelled = [(b"one image of a key", 1), (b"other folder", 0), (b"third", 2)]
    assert all_read(source) == [*[(b"outside", None)] * 3, *labelled, (b"", None)]
    text = "7 images in 3 classes; ignored 11 other members, such as ../link.jpg; 4 without a label"
    assert source.describe() == text


def test_class_names(tmp_path):
    for folder, names in (("a", "ant\nbee\ncat\n"), ("b", "ant\nbee\ncat"), ("c", "cat\nbee\nant\n"), ("d", None)):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, 1)
        if names:
            (tmp_path / folder / "classes.txt").write_text(names)
    assert open_source(f"shards:{tmp_path}/{{a,b,d}}/*.tar").classes == ("ant", "bee", "cat")
    for name in ("classes.txt", "s-000.tar.index"):
        os.mkfifo(tmp_path / "d" / name)  # which nobody writes to is not waited for
    assert open_source(f"shards:{tmp_path}/d/*.tar").classes == ("0", "1", "2")
    assert "a/classes.txt and" in refused(f"shards:{tmp_path}/{{a,c}}/*.tar")
    (tmp_path / "a" / "classes.txt").write_bytes(b"\xff\xfe")
    assert "write it in UTF-8" in refused(f"shards:{tmp_path}/a/*.tar")
    (tmp_path / "a" / "classes.txt").write_text("ant\nbee\n")
    assert "names 2 classes, but there is a label 2" in refused(f"shards:{tmp_path}/a/*.tar")


def test_labels_of_a_few_images_of_a_large_set(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), ("a.cls", b"99999"), ("b.jpg", b"b"), ("b.cls", b"100001")])
    source = open_source(f"shards:{tmp_path}/a.tar")
    assert (len(source.classes), source.labels().tolist()) == (100_000, [99_999, -1])
    (tmp_path / "classes.txt").write_text("".join(f"class {i}\n" for i in range(100_002)))
    source = open_source(f"shards:{tmp_path}/a.tar")
    assert (len(source.classes), source.labels().tolist()) == (100_002, [99_999, 100_001])


def test_errors(tmp_path):
    write_shards(tmp_path, 2)
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    (tmp_path / "text.tar").write_text("not a tar file, " * 100)
    (tmp_path / "cut.tar").write_bytes(write_tar(tmp_path / "b.tar", [("a.jpg", b"x" * 5000)]).read_bytes()[:2000])
    for name, text in {
        "s-{000..002}.tar": f"{tmp_path}/s-002.tar matches no file",
        "no*.tar": f"{tmp_path}/no*.tar matches no file",
        "": "is a folder; write e.g. shards:DIR/*.tar",
        "text.tar": "text.tar is not a complete tar file",
        "cut.tar": "cut.tar is not a complete tar file",
        "empty.tar": "no image in 1 shard;",
    }.items():
        assert text in refused(f"shards:{tmp_path}/{name}")


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
        *(("a.json", b'{"label": %b}' % label) for label in (b'"cat"', b"true", b"16777216")),
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
