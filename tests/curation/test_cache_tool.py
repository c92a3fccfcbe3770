"""The command that says what lies in the cache and clears it."""

import os
import time
from pathlib import Path

import pytest

from mpp.cli import cache
from mpp.system.cache import KINDS
from tests.test_cli import call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two indices, one older than the other, an unpacked tar, and what is none of ours."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1GB")
    for number, (name, size) in enumerate({"a.index": 1000, "b.index": 500, "c.tar": 2_000_000}.items()):
        path = tmp_path / f"{name[0] * 32}.{name[2:]}"
        path.write_bytes(bytes(size))
        os.utime(path, (86_400 * 365 * (1 + number),) * 2)
    (tmp_path / "mine.txt").write_text("mine")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> list[str]:
    assert cache(words) == status
    out, err = capsys.readouterr()
    return (err if status else out).splitlines()


def test_it_says_what_lies_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = said(capsys)
    assert head == f"{folder}: 2 MB, of at most 1 GB (MPP_CACHE_LIMIT, by default 80% of the disk)"
    assert [line.split()[:3] for line in lines] == [["index", "1.5", "kB"], ["unpacked", "2", "MB"]]
    first, last = (time.strftime("%Y-%m-%d", time.localtime(86_400 * 365 * year)) for year in (1, 2))
    assert lines[0].endswith(f"2 used {first} to {last}: where images lie in tars and in DICOM files of several frames")
    assert said(capsys, "--files")[2:4] == [f"    {folder / (key * 32)}.index" for key in "ab"]
    assert len(list(folder.iterdir())) == 4


def test_it_clears_by_kind_and_to_a_limit(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys, "--limit", "none")[0] == "removed 0 entries, 0 bytes"
    assert said(capsys, "--clear", "index", "--limit", "2.0009MB")[0] == "removed 1 entries, 1 kB"
    assert [path.name for path in folder.glob("*.index")] == ["b" * 32 + ".index"]
    assert said(capsys, "--limit", "1kB")[0] == "removed 1 entries, 2 MB"
    (folder / f"{'d' * 32}.tar").write_bytes(bytes(2000))
    assert said(capsys, "--clear", "unpacked", "pixels")[0] == "removed 1 entries, 2 kB"
    assert len(said(capsys)) == 2
    assert said(capsys, "--clear", "all")[:2] == [
        "removed 1 entries, 500 bytes",
        f"{folder}: 0 bytes, of at most 1 GB (MPP_CACHE_LIMIT, by default 80% of the disk)",
    ]
    assert {path.name for path in folder.iterdir()} == {"mine.txt", "cache.lock"}
    monkeypatch.setenv("MPP_CACHE", str(folder / "none"))
    assert said(capsys, "--clear", "all")[0] == "removed 0 entries, 0 bytes"
    assert not (folder / "none").exists()


def test_wrong_words(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = said(capsys, "--clear", "pixel", status=2)
    assert line.startswith("cache: error: --clear 'pixel': the kinds are index, unpacked, kept, pixels, features, ")
    (line,) = said(capsys, "--limit", "many", status=2)
    assert line == "cache: error: --limit 'many' is no size; write e.g. 200GB, 50% (of the disk) or none"
    monkeypatch.setenv("MPP_CACHE_LIMIT", "many")
    (line,) = said(capsys, status=2)
    assert line.startswith("cache: error: MPP_CACHE_LIMIT 'many' is no size")


def test_help_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    done = call("--help", tool="cache", cwd=tmp_path, python=("-X", "importtime"), COLUMNS="80")
    assert done.returncode == 0
    assert "--clear [STR [STR ...]]" in done.stdout
    assert all(kind in done.stdout for kind in KINDS)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not modules & {"torch", "timm", "numpy"}
