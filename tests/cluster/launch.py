"""Starts runs of several ranks and does them harm."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mpp.training.checkpoint import Checkpoints
from tests import runs

LONG = {"model__drop_path": "0", "train__length": "120 steps", "fewshot__data": ""}


def command(source: str, run_dir: Path, **changed: str) -> list[str]:
    """A run that is long enough to be hurt, without what would make it slow."""
    return runs.command(source, run_dir, **LONG, **changed)


def launcher(*options: str, nproc: int = 2) -> list[str]:
    """torchrun as anybody would start it, with its own store."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), *options]


def environment(**changed: str) -> dict[str, str]:
    """That of the tests without what a caller might have set for torchrun."""
    kept = {k: v for k, v in runs.environment().items() if k != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    return kept | changed


@contextlib.contextmanager
def started(words: list[str], log: Path, **changed: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The command, writing to `log`; whatever is left of it at the end is killed."""
    with log.open("ab") as out:
        process = subprocess.Popen(words, env=environment(**changed), stdout=out, stderr=out, cwd=runs.ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            for rank in ranks(process.pid).values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            process.kill()
        process.wait(30)


def ranks(pid: int) -> dict[int, int]:
    """Process numbers of the ranks at and below process `pid`, by rank."""
    found = {}
    for child in _children(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            told = dict(word.split(b"=", 1) for word in words if b"=" in word)
            if b"LOCAL_RANK" in told and b"RANK" in told:
                found.setdefault(int(told[b"RANK"]), child)
        found = {**ranks(child), **found}
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint; -1 without one."""
    return max(Checkpoints(run_dir / "checkpoints").steps(), default=-1)


def wait(until: Callable[[], bool], log: Path, seconds: float = 150) -> None:
    """Waits until something is so.

    Raises:
        AssertionError: it has not come to be; with the end of the log.
    """
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
