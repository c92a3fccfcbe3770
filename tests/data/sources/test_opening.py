import numpy as np
import pytest

from mpp.data.sources.opening import open_source, open_splits
from mpp.data.sources.patterns import expand_braces, literal, quoted, shown, split_patterns
from mpp.data.sources.specs import spec_of
from tests.data.sources.reading import all_read, opened, refused, write_tar


def test_home_is_expanded(picture_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(picture_folder("pics/1.png")))
    assert len(open_source("folder:~/pics")) == 1


def test_which_kinds_have_a_test_split(tmp_path):
    for kind in ("demo", f"cifar10:{tmp_path}", f"cifar100:{tmp_path}"):
        assert list(open_splits(kind)) == ["train", "test"]
    for kind in ("array:x.npy", "shards:x-{0..3}.tar"):
        assert list(open_splits(kind)) == ["train"]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("", "no source of images was given"),
        ("flder:/x", "there is no kind of source called 'flder'; did you mean folder:/x?"),
        ("cifar:/x", "did you mean cifar10:/x?"),
        ("Shards:a.tar", "did you mean shards:a.tar?"),
        ("deom", "did you mean demo?"),
        ("qqq:1", "a source is one of folder:DIR, shards:GLOB"),
        ("folder:", "does not say where; write folder:DIR"),
        ("hf", "does not say where; write hf:NAME_OR_DIR"),
        ("shards: ", "does not say where; write shards:GLOB"),
        ("demo:72", "demo takes no argument; write demo"),
        ("/x/*.tar", "lacks the kind of source: did you mean shards:/x/*.tar?"),  # a glob is no weight
        ("2024*.tar.gz", "lacks the kind of source: did you mean shards:2024*.tar.gz?"),
        ("/x/a-{0..3}.TGZ", "lacks the kind of source: did you mean shards:/x/a-{0..3}.TGZ?"),
        ("/my data/*.tar", 'did you mean shards:"/my data/*.tar"?'),
        ("/x/*.tar + demo", "lacks the kind of source: did you mean shards:/x/*.tar?"),
        ("2 * /x/*.tar + 1 * demo", "lacks the kind of source: did you mean shards:/x/*.tar?"),
        ("2 * /x", "a weight is for one of several sources; write /x"),
    ],
)
def test_strings_that_name_no_source(spec, text):
    assert text in refused(spec)


def test_paths_without_a_kind(tmp_path):
    assert f"did you mean folder:{tmp_path}?" in refused(str(tmp_path))
    kinds = {"array": ("a.npy", "a.npz"), "shards": ("a.tar", "a.tar.gz"), "csv": ("a.csv", "a.tsv")}
    for kind, path in [(kind, tmp_path / name) for kind, names in kinds.items() for name in names]:
        path.touch()
        assert f"did you mean {kind}:{path}?" in refused(str(path))
    (tmp_path / "a.png").touch()
    text = f"single file: did you mean the folder that it lies in, folder:{tmp_path}?"
    assert text in refused(str(tmp_path / "a.png"))


NAMES = ("C + D", "3 * x", "a b", 'a "b" + c', '"q"', "it's + that's", "back\\ + slash\\", " a + b ", "{a,b} + [c]*")


@pytest.mark.parametrize("name", [*NAMES, "x{1..2}"])
def test_any_name_can_be_named(name, picture_folder, tmp_path):
    folder = picture_folder(f"{name}/1.png")
    spec = spec_of("folder", str(folder / name))
    assert len(open_source(spec)) == 1
    write_tar(folder / name / "a.tar", [("a.jpg", b"a"), ("b.jpg", b"b")])
    shards = spec_of("shards", f"{literal(str(folder / name))}/*.tar")
    assert len(open_source(shards)) == 2
    write_tar(folder / "other one.tar", [("a.jpg", b"a")])
    also = quoted(f"{literal(str(folder))}/other *.tar")
    assert len(open_source(f"shards:{also} {shards.partition(':')[2]}")) == 3
    for mixed in (f"{spec} + {shards} + {spec}", f"2 * {spec} + 1 * {shards} + 3 * {spec}"):
        assert [len(part) for part in open_source(mixed).parts] == [1, 2, 1]
    np.save(folder / f"{name}.npy", np.zeros((3, 4, 4), np.uint8))
    assert len(open_source(spec_of("array", str(folder / f"{name}.npy")))) == 3
    (folder / f"{name}.csv").write_text("other one.tar\n")
    assert len(open_source(spec_of("csv", str(folder / f"{name}.csv")))) == 1


def test_quotes_of_either_kind_and_names_that_lack_them(picture_folder):
    folder = picture_folder("C + D/1.png", "it's/1.png", "x'y + z'/1.png")
    for spec in (f'folder:"{folder}/C + D"', f"folder:'{folder}/C + D'", f"folder:{folder}/it's"):
        assert len(open_source(spec)) == len(open_source(f"{spec} + {spec}")) / 2 == 1
    assert f'there is no folder "{folder}' in refused(f'folder:"{folder}/C')  # no closing one: a name like others
    write_tar(folder / "C + D" / "a.tar", [("a.jpg", b"a")])
    hint = f'+ joins two sources; a name that holds one is quoted, folder:"{folder}/C + D"'
    assert hint in refused(f"folder:{folder}/C + D")
    assert f'is quoted, shards:"{folder}/C + D/*.tar"' in refused(f"shards:{folder}/C + D/*.tar")
    assert "no kind of source called 'D'" in refused(f"folder:{folder} + D")


@pytest.mark.parametrize("kind", ["folder", "array", "csv", "hf", "cifar10", "shards"])
def test_paths_that_no_system_has(kind):
    if kind not in ("cifar10", "shards"):
        assert "there is no f" in refused(f"{kind}:~nobody-of-this-name/x")
        refused(f"{kind}:/{'x' * 5000}")
    assert "holds a NUL" in refused(f"{kind}:/a\0b")
    refused(f"{kind}:/a\nb.csv")


@pytest.mark.parametrize("kind", ["shards", "shrds", "folder", "array", "csv", "hf", ""])
def test_nothing_secret_is_shown(kind):
    address = "http://user:SECRET@host/x?sig=SECRET"
    spec = f"{kind}:{address}" if kind else address
    for split in ("train", "test") if kind != "shards" else ("test",):  # which fetches nothing
        text = refused(spec, split=split)
        assert "SECRET" not in text
        assert "//host/x" in text
        assert "SECRET" not in refused(f"demo + {spec}", split=split)


@pytest.mark.parametrize(
    ("call", "text", "expected"),
    [
        (expand_braces, "a.tar", ["a.tar"]),
        (expand_braces, "a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        (expand_braces, "{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
        (expand_braces, "a{,-b}.tar", ["a.tar", "a-b.tar"]),
        (expand_braces, "a{2..0}", ["a2", "a1", "a0"]),
        (split_patterns, " /a/*.tar\n s3://b/x-{000..123}.tar ", ["/a/*.tar", "s3://b/x-{000..123}.tar"]),
        (split_patterns, r"/my\ data/*.tar /b/{c d,e}.tar", ["/my data/*.tar", "/b/{c d,e}.tar"]),
        (split_patterns, r"/a\b.tar", [r"/a\b.tar"]),
    ],
)
def test_patterns(call, text, expected):
    assert list(call(text)) == expected


def test_several_patterns(tmp_path):
    for folder, name in (("one two", "a b"), ("three", "c")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / f"{name}.tar", [("a.jpg", name.encode())])
    for pattern in (f"{tmp_path}/one two/a b.tar", f"{tmp_path}/one two/*.tar", f"{tmp_path}/one*/a\\ b.tar"):
        assert all_read(opened(pattern)) == [(b"a b", None)]
    both = opened(f"{tmp_path}/three/*.tar {tmp_path}/one\\ two/*.tar")
    assert all_read(both) == [(b"a b", None), (b"c", None)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/a?.tar", "/data/a?.tar"),
        ("s3://key:secret@bucket/a-?.tar", "s3://bucket/a-?.tar"),
        ("cannot reach 'https://me:pw@host/a,b.tar?X=1&Y=(2),3' now", "cannot reach 'https://host/a,b.tar' now"),
        ("http://h/a-{0..3}.tar?sig=1 http://u@h/b.tar", "http://h/a-{0..3}.tar http://h/b.tar"),
    ],
)
def test_addresses_in_messages(text, expected):
    assert shown(text) == expected
