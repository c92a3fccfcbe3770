"""Files and folders are written whole, and a folder by one at a time, whatever becomes of that one."""

import ast
import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mpp import cli
from mpp.errors import ConfigError, UserError
from mpp.system import files
from mpp.system.files import LOCK, claimed, holder, one_writer, whole_folder
from tests import runs

_CLAIM = """
import os, sys, time
from pathlib import Path
from mpp.system.files import claimed
with claimed(Path(sys.argv[1])) as mine:
    child = 0 if len(sys.argv) < 3 else os.fork()
    if len(sys.argv) < 3 or child:
        print(mine, child, flush=True)
    time.sleep(600)
"""


def is_claimed(lock: Path) -> bool:
    """Whether another process would be refused."""
    words = [sys.executable, "-c", _CLAIM.replace("time.sleep(600)", ""), str(lock)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.startswith("False")


def test_threads_exclude_each_other_as_processes_do(tmp_path: Path) -> None:
    lock, found = tmp_path / LOCK, []

    def claim(wait: bool) -> None:
        with claimed(lock, wait) as mine:
            found.append(mine)

    assert holder(lock) == "another process"
    with claimed(lock) as mine:
        assert mine
        claim(False)
        assert holder(lock).startswith(f"process {os.getpid()} on {socket.gethostname()} since 20")
        assert holder(lock).endswith(" UTC")
        thread = threading.Thread(target=claim, args=(False,))
        thread.start()
        thread.join()
        assert found == [False, False]
        waiting = threading.Thread(target=claim, args=(True,))
        waiting.start()
        waiting.join(0.2)
        assert len(found) == 2
        assert is_claimed(lock)  # whoever else has opened and closed the file
    waiting.join()
    assert found == [False, False, True]
    assert not is_claimed(lock)
    assert holder(lock) == "another process"


def test_a_killed_process_s_child_does_not_keep_its_claim(tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    words = [sys.executable, "-c", _CLAIM, str(lock), "fork"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        mine, child = process.stdout.readline().split()
        try:
            assert mine == "True"
            assert is_claimed(lock)
            process.kill()
            process.wait()
            os.kill(int(child), 0)  # it lives
            assert not is_claimed(lock)
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_without_locks_all_are_let_in_which_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "_noted_no_locks", False)
    monkeypatch.setattr(fcntl, "flock", none)
    with claimed(tmp_path / "a") as first, claimed(tmp_path / "a") as second, one_writer(tmp_path, "--out"):
        assert first
        assert second
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{tmp_path / 'a'} cannot be locked (No locks available)" in err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out \S+file cannot be written to \(.*\); give another one"):
        one_writer(tmp_path / "file", "--out").__enter__()


@pytest.mark.parametrize("tool", ["pretrain", "finetune", "check_data"])
def test_a_folder_in_use_is_refused_before_anything_is_read_or_written(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "out", f"folder:{tmp_path / 'gone'}"
    make = {"pretrain": runs.command, "finetune": runs.finetune_command}.get(tool)
    words = make(source, out)[1:] if make else ["--data", source, "--out", str(out)]
    with claimed(out / LOCK):
        written = (out / LOCK).stat().st_mtime_ns
        assert getattr(cli, tool)(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f" {out} is in use: process {os.getpid()} on {socket.gethostname()} since " in line
        assert [path.name for path in out.iterdir()] == [LOCK]
        assert (out / LOCK).stat().st_mtime_ns == written
    assert getattr(cli, tool)(words) == 2
    assert "in use" not in capsys.readouterr().err


def test_two_that_start_at_once(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpp.pretraining import recipe as pretrain

    out, build = tmp_path / "out", pretrain.build

    with claimed(out / LOCK):
        (out / LOCK).rename(tmp_path / LOCK)  # as if there were no folder yet
        out.rmdir()

        def built(*words: object) -> object:
            out.mkdir()
            (tmp_path / LOCK).rename(out / LOCK)
            return build(*words)  # pyright: ignore[reportArgumentType, reportCallIssue]

        monkeypatch.setattr(pretrain, "build", built)
        assert cli.pretrain(runs.command(source, out)[1:]) == 2
        assert f"{out} is in use: process " in capsys.readouterr().err.splitlines()[-1]
        assert [path.name for path in out.iterdir()] == [LOCK]


def test_text_is_utf_8_whatever_the_locale() -> None:
    """No call opens a text file in the encoding of the locale."""
    found, others = [], ("Fewshot", "Image", "archive", "gzip", "os", "tarfile")  # whose open is another one
    opening = ("open", "read_text", "write_text")
    for module in (path for folder in ("mpp", "tools", "docs") for path in (runs.ROOT / folder).rglob("*.py")):
        text = module.read_text("utf-8")
        tree = ast.parse(text if any(f"{name}(" in text for name in opening) else "")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", getattr(call.func, "attr", "")) not in opening:
                continue
            owner = ast.unparse(call.func).rpartition(".")[0]
            if owner not in others and not re.search(r"utf-8|encoding=|'[rwax+]*b\+?'", ast.unparse(call)):
                found.append(f"{module}:{call.lineno}: {ast.unparse(call)}")
    assert not found


@pytest.mark.parametrize("fails", [1, 2])
def test_an_interrupt_between_loses_neither_the_old_nor_the_new(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename, left = tmp_path / "model", Path.rename, iter(range(1, 9))

    def renamed(path: Path, target: Path) -> Path:
        if next(left) == fails:
            raise KeyboardInterrupt
        return rename(path, target)

    for content in ("old", "new"):
        if content == "new":
            monkeypatch.setattr(Path, "rename", renamed)
        with contextlib.suppress(KeyboardInterrupt), whole_folder(place) as folder:
            (folder / "file").write_text(content)
    assert (place / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_kill_between_left_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "file").write_text("old")
    for name in (".model-0123456789ab", ".model-ba9876543210", ".model-of mine"):
        (tmp_path / name).mkdir()
        if "a9" not in name:
            os.utime(tmp_path / name, (0, 0))
    with whole_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("new")
        assert (tmp_path / "model" / "file").read_text() == "old"
    assert (tmp_path / "model" / "file").read_text() == "new"
    # Another's that still writes, and what is called otherwise.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-ba9876543210", ".model-of mine", "model"]


def test_a_folder_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here / "sub")
    (tmp_path / "link").symlink_to(here / "linked")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (".", "../sub", "../..", "/", str(here), str(tmp_path / "loop")):
        reason = "cannot write to .*loop" if "loop" in path else "it is or holds the current folder; name a new one"
        with pytest.raises(UserError, match=reason), whole_folder(Path(path)):
            raise AssertionError("it was begun")
    for path in ("../new", "new/../../other", str(tmp_path / "link")):
        with whole_folder(Path(path)) as temporary:
            (temporary / "written").touch()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"here/new/written", "here/other/written", "here/linked/written"}
