"""Packing goes on after whatever stops it, and ends in the same bytes."""

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpp.curation import pack_task
from mpp.curation.pack_task import Record
from mpp.curation.packing_folder import PackingFolder
from tests.curation.packed import complaint, contents, pack

FLAGS = ("--shard-images", "6", "--resize", "12")


def in_a_process(images: Path, out: Path, before: Callable[[], object] = lambda: None) -> multiprocessing.Process:
    def run() -> None:
        before()
        os._exit(pack(images, out, *FLAGS))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.fixture
def uninterrupted(images: Path, tmp_path: Path) -> tuple[dict[str, bytes], float]:
    """What an undisturbed packing gives, bad files and all, and how long it takes."""
    for number in (0, 20):
        (images / "class 0" / f"bad {number:02d}.jpg").write_bytes(b"")
    begun = time.monotonic()
    process = in_a_process(images, tmp_path / "reference")
    process.join()
    assert process.exitcode == 0
    return contents(tmp_path / "reference"), time.monotonic() - begun


def killed_and_resumed(images: Path, out: Path, seconds: float, draw: random.Random) -> None:
    for _ in range(3):
        process = in_a_process(images, out)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
    assert pack(images, out, *FLAGS) == 0


@pytest.mark.parametrize("number", range(4))
def test_killed_and_resumed(
    number: int, images: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    killed_and_resumed(images, tmp_path / "out", uninterrupted[1], random.Random(number))
    assert contents(tmp_path / "out") == uninterrupted[0]


@pytest.mark.slow
def test_killed_many_times(images: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path) -> None:
    draw = random.Random(100)
    for number in range(24):
        killed_and_resumed(images, tmp_path / str(number), uninterrupted[1], draw)
        assert contents(tmp_path / str(number)) == uninterrupted[0]


@pytest.mark.slow
def test_interrupted_at_each_step_of_the_end(
    images: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, me = os.replace, os.getpid()

    class Crash(BaseException):
        pass

    crashes = 0
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
        assert pack(images, out, *FLAGS) == 0
        assert contents(out) == uninterrupted[0]
        shutil.rmtree(out)
    shards = sum(name.endswith(".tar") for name in uninterrupted[0])
    assert crashes == 1 + 2 * shards + 4  # settings; shards and indices; class names and manifest, written and moved


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(
    number: signal.Signals,
    images: Path,
    uninterrupted: tuple[dict[str, bytes], float],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    keep = PackingFolder.save

    def keep_and_wait(folder: PackingFolder, task: int, record: Record) -> None:
        keep(folder, task, record)
        signal.pause()  # so that the packing is never over before the signal arrives

    process = in_a_process(images, out, lambda: setattr(PackingFolder, "save", keep_and_wait))
    while not list(out.glob(".packing/[0-9]*.json")):
        time.sleep(0.001)
    assert process.pid
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 1
    assert f"stopped by {number.name}; the same command again goes on" in complaint(capfd)
    assert not list(out.glob("*.tar"))
    assert pack(images, out, *FLAGS) == 0
    assert contents(out) == uninterrupted[0]


def test_a_full_disk(
    images: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = in_a_process(images, out, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    process.join()
    assert process.exitcode == 1
    assert f"cannot write to {out} (File too large); make room" in complaint(capfd)
    assert not list(out.glob("*.tar"))
    assert pack(images, out, *FLAGS) == 0
    assert contents(out) == uninterrupted[0]


def test_a_killed_worker(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish = pack_task.TarWriter.finish
    monkeypatch.setattr(pack_task.TarWriter, "finish", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert pack(images, tmp_path / "out", *FLAGS) == 1
    assert "a process was killed, perhaps for want of memory: take fewer --workers" in complaint(capsys)
    monkeypatch.setattr(pack_task.TarWriter, "finish", finish)
    assert pack(images, tmp_path / "out", *FLAGS) == 0
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_a_worker_that_fails(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pack_task.TarWriter, "finish", lambda _: {}["what"])
    assert pack(images, tmp_path / "out", *FLAGS) == 1
    assert "a process failed: KeyError: 'what' (test_packing_folder.py, line " in complaint(capsys)


def test_no_process_can_be_started(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    assert pack(images, tmp_path / "out", *FLAGS) == 1
    assert "no process can be started" in complaint(capsys)


def test_other_bytes_read_back(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad_disk(path: Path) -> str:
        path.write_bytes(path.read_bytes().replace(b"ustar", b"ustsr"))
        return right(path)

    right = pack_task.sha256
    monkeypatch.setattr(pack_task, "sha256", bad_disk)
    assert pack(images, tmp_path / "out") == 1
    assert "read back gives other bytes" in complaint(capsys)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_two_at_once(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    identity = {"source": "", "fingerprint": "", "settings": {}}
    with PackingFolder(out, identity).locked():
        (out / ".packing" / "packing.json").unlink()  # so that the lock alone is in the way
        process = in_a_process(images, out)
        process.join()
    assert process.exitcode == 2
    assert f"--out {out} is in use: process {os.getpid()} on " in complaint(capfd)


def test_what_another_process_finished_meanwhile_is_complete(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, locked = tmp_path / "out", PackingFolder.locked

    def after_another(folder: PackingFolder) -> contextlib.AbstractContextManager[None]:
        in_a_process(images, out, monkeypatch.undo).join()
        return locked(folder)

    monkeypatch.setattr("mpp.curation.shard.PackingFolder.locked", after_another)
    assert pack(images, out, *FLAGS) == 0
    assert f"{out} is complete: nothing to do" in capfd.readouterr().out
