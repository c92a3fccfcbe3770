import numpy as np
import pytest

from mpp.data.sources.base import SourceError
from mpp.data.sources.opening import open_source, open_splits
from mpp.data.sources.patterns import literal, quoted
from mpp.data.sources.specs import spec_of
from tests.data.sources.reading import refused
from tests.data.sources.tar_shards import write_tar


def test_home_is_expanded(picture_folder, monkeypatch):
    folder = picture_folder("pics/1.png")
    monkeypatch.setenv("HOME", str(folder))
    assert len(open_source("folder:~/pics")) == 1


def test_which_kinds_have_a_test_split(tmp_path):
    assert "test" in open_splits("demo")
    assert "test" in open_splits(f"cifar10:{tmp_path}")
    assert "test" in open_splits(f"cifar100:{tmp_path}")
    assert "test" not in open_splits("array:x.npy")
    assert "test" not in open_splits("shards:x-{0..3}.tar")


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
        ("array", "does not say where; write array:FILE.npy"),
        ("csv:", "does not say where; write csv:FILE.csv"),
        ("hf", "does not say where; write hf:NAME_OR_DIR"),
        ("demo:72", "demo takes no argument; write demo"),
    ],
)
def test_unknown_kinds(spec, text):
    assert text in refused(spec)


def test_paths_without_a_kind(tmp_path):
    assert f"did you mean folder:{tmp_path}?" in refused(str(tmp_path))
    kinds = {
        "a.npy": "array",
        "a.npz": "array",
        "a.tar": "shards",
        "a.tar.gz": "shards",
        "a.csv": "csv",
        "a.tsv": "csv",
    }
    for name, kind in kinds.items():
        (tmp_path / name).touch()
        assert f"did you mean {kind}:{tmp_path / name}?" in refused(str(tmp_path / name))
    (tmp_path / "a.png").touch()
    assert f"single file: did you mean the folder that it lies in, folder:{tmp_path}?" in refused(
        str(tmp_path / "a.png")
    )


NAMES = (
    "C + D",
    "3 * x",
    "a b",
    'a "b" + c',
    '"q"',
    "it's + that's",
    "back\\ + slash\\",
    " a + b ",
    "{a,b} + [c]*",
    "x{1..2}",
)


@pytest.mark.parametrize("name", NAMES)
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
    (folder / f"{name}.csv").write_text(f'"{folder / "1.png"}"\n'.replace("1.png", "other one.tar"))
    assert len(open_source(spec_of("csv", str(folder / f"{name}.csv")))) == 1


def test_quotes_of_either_kind(picture_folder):
    folder = picture_folder("C + D/1.png", "it's/1.png", "x'y + z'/1.png")
    for spec in (f'folder:"{folder}/C + D"', f"folder:'{folder}/C + D'", f"folder:{folder}/it's"):
        assert len(open_source(spec)) == len(open_source(f"{spec} + {spec}")) / 2 == 1
    assert f'there is no folder "{folder}' in refused(f'folder:"{folder}/C')  # no closing one: a name like others


def test_a_name_with_a_plus_is_told_to_be_quoted(picture_folder):
    folder = picture_folder("C + D/1.png")
    write_tar(folder / "C + D" / "a.tar", [("a.jpg", b"a")])
    hint = f'+ joins two sources; a name that holds one is quoted, folder:"{folder}/C + D"'
    assert hint in refused(f"folder:{folder}/C + D")
    assert f'is quoted, shards:"{folder}/C + D/*.tar"' in refused(f"shards:{folder}/C + D/*.tar")
    with pytest.raises(SourceError, match="is quoted"):
        open_splits(f"folder:{folder}/C + D")
    assert "no kind of source called 'D'" in refused(f"folder:{folder} + D")


def test_a_glob_is_no_weight(tmp_path):
    for pattern in ("/x/*.tar", "x-*.tar", "2024*.tar.gz", f"{tmp_path}/a-{{0..3}}.TGZ"):
        assert f"lacks the kind of source: did you mean shards:{pattern}?" in refused(pattern)
    assert 'did you mean shards:"/my data/*.tar"?' in refused("/my data/*.tar")
    assert "lacks the kind of source: did you mean shards:/x/*.tar?" in refused("/x/*.tar + demo")
    assert "lacks the kind of source: did you mean shards:/x/*.tar?" in refused("2 * /x/*.tar + 1 * demo")
    assert "a weight is for one of several sources; write /x" in refused("2 * /x")
    assert "the weight 'x' is no number; write e.g. 3 * folder:DIR" in refused("x * demo + 1 * demo")


@pytest.mark.parametrize("kind", ["folder", "array", "csv", "hf"])
def test_paths_that_no_system_has(kind):
    assert "there is no f" in refused(f"{kind}:~nobody-of-this-name/x")
    refused(f"{kind}:/{'x' * 5000}")
    refused("x" * 5000)


@pytest.mark.parametrize("kind", ["folder", "array", "csv", "hf", "cifar10", "shards"])
def test_paths_with_a_nul_or_a_line_break(kind):
    assert "holds a NUL" in refused(f"{kind}:/a\0b")
    refused(f"{kind}:/a\nb.csv")
    with pytest.raises(SourceError, match="holds a NUL"):
        open_splits(f"{kind}:/a\0b")


@pytest.mark.parametrize("kind", ["shards", "shrds", "folder", "array", "csv", "hf", ""])
def test_nothing_secret_is_shown(kind):
    address = "http://user:SECRET@host/x?sig=SECRET"
    spec = f"{kind}:{address}" if kind else address
    for split in ("train", "test") if kind != "shards" else ("test",):  # which fetches nothing
        text = refused(spec, split=split)
        assert "SECRET" not in text
        assert "//host/x" in text
        assert "SECRET" not in refused(f"demo + {spec}", split=split)
