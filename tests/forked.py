"""Processes that start at once: forks of one that has imported torch and the tools, which takes most of a short run.

    pytest --socket--> server, warm --fork--> supervisor --fork--> the command

The command is a process of its own, with arguments, environment, standard output and error, signals and exit status.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

WARM = (
    "mpp.cli",
    "mpp.pretraining.recipe",
    "mpp.downstream.finetune",
    "mpp.study.run",
    "mpp.training.log_tensorboard",
    "mpp.training.sharded",
    "torch._dynamo",
    "torch.distributed.run",
)
_MOST = 150_000  # bytes of a request


class Forked:
    """As `subprocess.Popen([sys.executable, *words])`, for a script, or a module after "-m".

    `streams` are the descriptors of its standard output and error; None keeps both for `communicate`.
    """

    returncode: int | None = None

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        cwd: "str | Path | None" = None,
        start_new_session: bool = False,
        streams: tuple[int, int] | None = None,
    ) -> None:
        self._files = () if streams else [tempfile.TemporaryFile("w+") for _ in "12"]  # noqa: SIM115
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(_address or _server())
        request = {"words": [*words], "env": {**env}, "cwd": str(cwd or Path.cwd()), "session": start_new_session}
        socket.send_fds(self._connection, [json.dumps(request).encode()], streams or [f.fileno() for f in self._files])
        self.pid = int(self._connection.recv(100))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._connection.recv(100))
            except (BlockingIOError, TimeoutError) as error:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from error
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = map(_read, self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def ranks(self) -> dict[int, int]:
        """Process numbers of the ranks that this torchrun started last, by rank."""
        return {int(path.suffix[1:]): int(path.read_text()) for path in Path(_server()).parent.glob(f"{self.pid}.*")}


def _read(file: TextIO) -> str:
    with file:
        file.seek(0)
        return file.read()


_address = ""  # of the server, in its forks


@functools.cache
def _server() -> str:
    """Starts the server, which ends with this process; its address."""
    address = str(Path(tempfile.mkdtemp(prefix="mpp-forks-"), "socket"))
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:mpp"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-m", __name__, address], env=environment, cwd=root, **pipes)
    atexit.register(process.communicate)  # the end of its input ends it
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return address


def serve(address: str) -> None:
    """Forks a supervisor for each request, until standard input ends."""
    global _address
    _address = address
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address)
    server.listen()
    os.write(1, b"ready\n")
    while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            return _supervise(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # supervisors that have ended
                pass
    shutil.rmtree(Path(address).parent)
    return None


def _supervise(connection: socket.socket) -> None:
    message, descriptors, *_ = socket.recv_fds(connection, _MOST, 2)
    request = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        return _run(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(str(pid).encode())
    with contextlib.suppress(BrokenPipeError):  # who asked may have ended
        connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _run(request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """As the interpreter does the command; what it raises ends this process as it would end that."""
    import numpy as np

    for descriptor, stream in zip((os.open(os.devnull, os.O_RDONLY), *descriptors), (0, 1, 2), strict=True):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    np.random.seed()  # as in a process that has just begun, and not in each the same
    module, *sys.argv = request["words"] if request["words"][0] == "-m" else ("", *request["words"])
    if module:
        if sys.argv[0] == "torch.distributed.run":
            _fork_ranks()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def _fork_ranks() -> None:
    """torchrun starts its ranks as forks of the server, too."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def fork(_: Any, words: Sequence[str], env: Mapping[str, str]) -> Any:
        assert words[1] == "-u", words
        rank = Forked(words[2:], env, start_new_session=True, streams=(1, 2))
        new = Path(_address).with_name("new")
        new.write_text(str(rank.pid))
        new.rename(Path(_address).with_name(f"{os.getpid()}.{env['RANK']}"))
        return rank

    SubprocessHandler._popen = fork


if __name__ == "__main__":
    serve(sys.argv[1])
