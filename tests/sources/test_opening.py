import pytest

from mpp.sources.base import SourceError
from mpp.sources.opening import has_split, open_source


def refused(spec, **options):
    """The text of the SourceError, which is one line."""
    with pytest.raises(SourceError) as caught:
        open_source(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_home_is_expanded(picture_folder, monkeypatch):
    folder = picture_folder("pics/1.png")
    monkeypatch.setenv("HOME", str(folder))
    assert len(open_source("folder:~/pics")) == 1


def test_has_split_by_kind(tmp_path):
    assert has_split("demo")
    assert has_split(f"cifar10:{tmp_path}")
    assert has_split(f"cifar100:{tmp_path}")
    assert not has_split("array:x.npy")
    assert not has_split("shards:x-{0..3}.tar")


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
        has_split(f"{kind}:/a\0b")


@pytest.mark.parametrize("kind", ["shards", "shrds", "folder", "array", "csv", "hf", ""])
def test_nothing_secret_is_shown(kind):
    address = "http://user:SECRET@host/x?sig=SECRET"
    spec = f"{kind}:{address}" if kind else address
    for split in ("train", "test") if kind != "shards" else ("test",):  # which fetches nothing
        text = refused(spec, split=split)
        assert "SECRET" not in text
        assert "//host/x" in text
        assert "SECRET" not in refused(f"demo + {spec}", split=split)
