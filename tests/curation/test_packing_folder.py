"""Packing goes on after whatever stops it, and ends in the same bytes."""

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mpp.curation import pack_task
from mpp.curation.pack_task import Record, TarWriter
from mpp.curation.packing_folder import PackingFolder
from tests.curation.made import complaint, contents, pack, write_pictures

FLAGS = ("--shard-images", "10", "--resize", "12")


def in_a_process(images: Path, out: Path, before: Callable[[], object] | None = None) -> ForkServerProcess:
    """Packs in a process of its own, whose stderr goes to `_errors(out)`.

    Not a fork of this process, which has threads: the child may wait for ever for a lock that one of them had.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_pack, args=(images, out, before))
    process.start()
    return process


def _errors(out: Path) -> Path:
    return out.with_suffix(".stderr")


def _pack(images: Path, out: Path, before: Callable[[], object] | None) -> None:
    with _errors(out).open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
        if before:
            before()
        sys.exit(pack(images, out, *FLAGS))


def error(out: Path) -> str:
    """The one line of an error that the process packing into `out` ended with."""
    (line,) = [line for line in _errors(out).read_text().splitlines() if line.startswith("shard: error: ")]
    return line


def exit_code(process: ForkServerProcess) -> int | None:
    process.join(60)
    return process.exitcode


def wait_after_saving() -> None:
    """So that the packing is never over before a signal arrives."""
    keep = PackingFolder.save

    def keep_and_wait(self: PackingFolder, task: int, record: Record) -> None:
        keep(self, task, record)
        time.sleep(20)

    PackingFolder.save = keep_and_wait


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


class Uninterrupted(NamedTuple):
    """What an undisturbed packing gives, bad files and all, and how long it takes."""

    contents: dict[str, bytes]
    seconds: float

    def assert_same_once_resumed(self, images: Path, out: Path) -> None:
        assert pack(images, out, *FLAGS) == 0
        assert contents(out) == self.contents


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in three classes, some of them bad."""
    folder = write_pictures(tmp_path_factory.mktemp("packed") / "images")
    for number in (0, 20):
        (folder / "class 0" / f"bad {number:02d}.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(images: Path) -> Uninterrupted:
    exit_code(in_a_process(images, images.parent / "first"))  # until all is imported
    begun = time.monotonic()
    assert exit_code(in_a_process(images, images.parent / "reference")) == 0
    return Uninterrupted(contents(images.parent / "reference"), time.monotonic() - begun)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_killed_and_resumed(number: int, images: Path, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    draw = random.Random(number)
    for _ in range(3):
        process = in_a_process(images, tmp_path / "out")
        time.sleep(draw.uniform(0, uninterrupted.seconds))
        process.kill()
        process.join()
    uninterrupted.assert_same_once_resumed(images, tmp_path / "out")


@pytest.mark.slow
def test_interrupted_at_each_step_of_the_end(
    images: Path, uninterrupted: Uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, me, crashes = os.replace, os.getpid(), 0

    class Crash(BaseException):
        pass

    while True:
        left = crashes

        def until(source: Path, target: Path) -> None:
            nonlocal left
            if os.getpid() == me:  # in the processes of the tasks all goes well
                if not left:
                    raise Crash
                left -= 1
            replace(source, target)

        out = tmp_path / str(crashes)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until)
            try:
                assert pack(images, out, *FLAGS) == 0
                break
            except Crash:
                crashes += 1
        uninterrupted.assert_same_once_resumed(images, out)
        shutil.rmtree(out)
    shards = sum(name.endswith(".tar") for name in uninterrupted.contents)
    assert crashes == 1 + 2 * shards + 4  # settings; shards and indices; class names and manifest, written and moved


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(
    number: signal.Signals,
    images: Path,
    uninterrupted: Uninterrupted,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    process = in_a_process(images, out, wait_after_saving)
    while process.is_alive() and not list(out.glob(".packing/[0-9]*.json")):
        time.sleep(0.001)
    os.kill(process.pid or 0, number)
    assert exit_code(process) == 1
    assert f"stopped by {number.name}; the same command again goes on" in error(out)
    assert not list(out.glob("*.tar"))
    uninterrupted.assert_same_once_resumed(images, out)


def test_a_full_disk(images: Path, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert exit_code(in_a_process(images, out, limit_files)) == 1
    assert f"cannot write to {out} (File too large); make room" in error(out)
    assert not list(out.glob("*.tar"))
    uninterrupted.assert_same_once_resumed(images, out)


def no_fork() -> int:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def bad_disk(path: Path, right: Callable[[Path], str] = pack_task.sha256) -> str:
    path.write_bytes(path.read_bytes().replace(b"ustar", b"ustsr"))
    return right(path)


@pytest.mark.parametrize(
    ("owner", "name", "fault", "said"),
    [
        (
            TarWriter,
            "finish",
            lambda _: os.kill(os.getpid(), signal.SIGKILL),
            "a process was killed, perhaps for want of memory: take fewer --workers",
        ),
        (
            TarWriter,
            "finish",
            lambda _: {}["what"],
            "a process failed: KeyError: 'what' (test_packing_folder.py, line ",
        ),
        (os, "fork", no_fork, "no process can be started"),
        (pack_task, "sha256", bad_disk, "read back gives other bytes"),
    ],
)
def test_what_fails_is_one_line_and_the_next_packing_is_whole(
    owner: Any, name: str, fault: Callable[..., Any], said: str,
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        assert pack(images, tmp_path / "out", *FLAGS) == 1
    assert said in complaint(capsys)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert pack(images, tmp_path / "out", *FLAGS) == 0
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_two_at_once(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    identity = {"source": "", "fingerprint": "", "settings": {}}
    with PackingFolder(out, identity).locked():
        (out / ".packing" / "packing.json").unlink()  # so that the lock alone is in the way
        assert exit_code(in_a_process(images, out)) == 2
    assert f"--out {out} is in use: process {os.getpid()} on " in error(out)


def test_what_another_process_finished_meanwhile_is_complete(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, locked = tmp_path / "out", PackingFolder.locked

    def after_another(folder: PackingFolder) -> contextlib.AbstractContextManager[None]:
        assert exit_code(in_a_process(images, out)) == 0
        return locked(folder)

    monkeypatch.setattr("mpp.curation.shard.PackingFolder.locked", after_another)
    assert pack(images, out, *FLAGS) == 0
    assert f"{out} is complete: nothing to do" in capfd.readouterr().out
