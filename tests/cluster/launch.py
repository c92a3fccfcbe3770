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
from typing import Any

from mpp.training.checkpoint import Checkpoints
from tests import runs
from tests.forked import Forked

STEPS = 80


def command(source: str, run_dir: Path, **changed: str) -> list[str]:
    """A run that is long enough to be hurt, without what would make it slow."""
    long = {"model__drop_path": "0", "train__length": f"{STEPS} steps", "fewshot__data": ""}
    return runs.command(source, run_dir, **long, **changed)


def launcher(*options: str, nproc: int = 2) -> list[str]:
    """torchrun as anybody would start it, with its own store."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), *options]


@contextlib.contextmanager
def started(words: list[str], log: Path, **changed: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The command, writing to `log`; whatever is left of it at the end is killed.

    torchrun, without an environment of its own, and its ranks are forked from a warm process.
    """
    environment = runs.environment() | changed
    environment.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)  # a caller might have set it
    process: Any
    with log.open("ab") as out:
        if words[0] == sys.executable and not changed:
            process = Forked(words[1:], environment, runs.ROOT, streams=(out.fileno(), out.fileno()))
        else:
            process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, cwd=runs.ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            for rank in ranks(process).values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            process.send_signal(signal.SIGKILL)
        process.wait(30)


def end(process: "subprocess.Popen[bytes]", log: Path, code: int = 0) -> str:
    """Waits for the process to end with this exit status; what it wrote."""
    assert process.wait(200) == code, log.read_text()[-3000:]
    return log.read_text()


def descendants(pid: int) -> Iterator[int]:
    """The processes below process `pid`."""
    with contextlib.suppress(OSError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            yield child
            yield from descendants(child)


def ranks(started: Any) -> dict[int, int]:
    """Process numbers of the ranks below a process, by rank; of a rank and its workers the rank itself."""
    if isinstance(started, Forked):
        return started.ranks()
    found: dict[int, int] = {}
    for process in descendants(started.pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            variables = dict(word.split(b"=", 1) for word in words if b"=" in word)
            if b"LOCAL_RANK" in variables and b"RANK" in variables:
                found.setdefault(int(variables[b"RANK"]), process)
    return found


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint; -1 without one."""
    return max(Checkpoints(run_dir / "checkpoints").steps(), default=-1)


def wait(until: Callable[[], bool], log: Path) -> None:
    """Waits until something is so; fails with the end of the log."""
    deadline = time.monotonic() + 150
    while not until():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
