"""The loader's worker processes: how they start, what they die of, and how they end."""

import errno
import itertools
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mpp.curation.scan import scan
from mpp.data import shared_memory, workers
from mpp.data.loader import sequential, stream
from mpp.data.settings import DecodeOptions
from mpp.data.sources.opening import open_source
from mpp.data.transform import EvalTransform
from mpp.errors import RunError, UserError
from mpp.system.process import GENERATORS
from tests import runs
from tests.data.sources.reading import write_tar
from tests.data.streams import Failing, assert_same, numbered, raising, run


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed, perhaps for want of memory: take fewer workers"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"had no shared memory left, .*--shm-size"),
        (lambda: os._exit(3), "ended with exit status 3"),
        (raising(KeyError("what")), r"failed: KeyError: 'what' \(streams.py, line \d+\); with 0 workers"),
        (raising(UserError("take another")), "^take another$"),
        (raising(OSError(errno.EMFILE, "Too many open files")), r"too many open files: .*\(ulimit -n\)"),
    ],
)
def test_what_a_worker_dies_of_is_one_line(act, said):
    with pytest.raises(UserError, match=said) as caught:
        run(Failing(act), 40, workers=2)
    assert "\n" not in str(caught.value)


def test_a_worker_that_crashes_says_where(capfd):
    with pytest.raises(RunError, match=r"a loader process crashed \(SIGSEGV\); the stack above says where"):
        run(Failing(lambda: os.kill(os.getpid(), signal.SIGSEGV)), 40, workers=1)
    said = capfd.readouterr().err
    assert "Fatal Python error: Segmentation fault" in said
    assert re.search(r'File ".*streams.py", line \d+ in read\b', said)


def test_a_worker_that_dies_ends_the_training_where_it_takes_a_batch():
    """Not where it happens to be when the signal comes, as torch has it."""
    settings = {"seed": 0, "batch_size": 4, "micro_batch": 4, "start": 0, "workers": 1}
    batches = stream(Failing(int, 8), EvalTransform((4, 4)), DecodeOptions(3), **settings)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.05)  # torch's handler has run
    with pytest.raises(RunError, match="a loader process was killed"):
        list(itertools.islice(batches, 9))


@pytest.fixture
def allow_files():
    """`allow_files(n)`: this process may open so many more files, until the end of the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) - 1 + more, before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
def test_many_shards_within_few_open_files(tmp_path, encode, allow_files, monkeypatch):
    """Of which each worker wants to keep some open, or one line that names the limit."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    for number in range(60):
        picture = encode(np.full((96, 96, 3), number, dtype=np.uint8))
        write_tar(tmp_path / f"{number:02d}.tar", [("a.png", picture)])
    source, settings = open_source(f"shards:{tmp_path}/*.tar"), {"transform": EvalTransform((96, 96)), "workers": 2}
    expected = run(source, 20, **{**settings, "workers": 0})
    for more in (26, 30, 50):
        allow_files(more)
        assert_same(run(open_source(f"shards:{tmp_path}/*.tar"), 20, **settings, copied=True), expected)
    allow_files(20)
    with pytest.raises(RunError, match=r"a process may have \d+ here \(ulimit -n\), and 2 workers need 24 more"):
        run(source, 20, **settings)


@pytest.mark.parametrize(("number", "said"), [(errno.EAGAIN, "no process can be started"), (errno.EMFILE, "ulimit -n")])
def test_workers_that_cannot_be_started(number, said, monkeypatch):
    monkeypatch.setattr(os, "fork", raising(OSError(number, os.strerror(number))))
    with pytest.raises(RunError, match=said):
        run(numbered(4), 1, workers=1)
    with pytest.raises(RunError, match=said):
        scan(numbered(4), DecodeOptions(), np.arange(4), 2)


def test_a_worker_that_dies_while_it_starts_is_one_line(monkeypatch):
    monkeypatch.setattr(workers, "_start_worker", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match=r"^no process can be started \(DataLoader worker .*\): take fewer workers$"):
        run(numbered(4), 1, workers=2)


SCRIPT = """
    import multiprocessing, os, signal, sys, time
    import numpy as np
    from mpp.data.settings import DecodeOptions
    from mpp.data.loader import stream
    from mpp.data.sources.in_memory import ListSource
    from mpp.data.transform import EvalTransform

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    source = ListSource(list(np.zeros((9, 8, 8, 3), dtype=np.uint8)))
    transform = EvalTransform((4, 4))
    batches = stream(source, transform, DecodeOptions(3), seed=0, batch_size=4, micro_batch=4, start=0, workers=2)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(0, number)
    time.sleep(0.2)
    for _ in range(20):
        next(batches)
    print("alive", flush=True)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_start_while_another_thread_draws():
    """Forked while that thread is within torch's generator, a worker, which seeds its own, would hang."""
    done = threading.Event()

    def draw() -> None:
        place = torch.empty(10_000_000)
        while not done.wait(0.001):
            with GENERATORS:
                place.bernoulli_()

    other = threading.Thread(target=draw)
    hung = threading.Timer(30, lambda: [child.kill() for child in multiprocessing.active_children()])
    other.start()
    hung.start()
    try:
        for _ in range(3):
            run(numbered(9), 1, workers=2)
    finally:
        hung.cancel()
        done.set()
        other.join()


def test_a_batch_that_cannot_be_sent_is_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(shared_memory._ByPipe, "__reduce__", raising(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(RunError, match="a loader process ended with exit status 1, for the reason above"):
        run(numbered(8), 1, workers=1)
    assert "a batch cannot be sent: OSError: [Errno 24] Too many open files" in capfd.readouterr().err


@pytest.mark.parametrize("room", [0, 10**9])
def test_batches_travel_with_and_without_shared_memory(room, monkeypatch, capfd):
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: room)
    monkeypatch.setattr(shared_memory, "_noted", False)
    transform, source = EvalTransform((96, 96)), numbered(20, bad=(3,))
    settings = {"transform": transform, "batch_size": 16, "micro_batch": 16}
    batches = run(source, 4, workers=2, **settings)
    assert_same(batches, run(source, 4, workers=0, **settings))
    assert [batch["images"].is_shared() for batch in batches] == [room > 0] * 4
    assert not batches[0]["index"].is_shared()  # an open file less
    assert capfd.readouterr().err.count("--shm-size") == (room == 0)
    (batch,) = sequential(source, transform, DecodeOptions(3), range(16), batch_size=16, workers=1)
    assert batch["images"].is_shared() == (room > 0)
    assert batch["index"].tolist() == [number for number in range(16) if number != 3]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_workers_ignore_the_groups_signals_and_end_with_their_parent():
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    processes = {how: subprocess.Popen([*command, how], **pipes) for how in ("end", "die")}
    for how, process in processes.items():
        out, err = process.communicate(timeout=60)
        pids, alive = out.splitlines()
        assert alive == "alive"
        assert process.returncode == (0 if how == "end" else -signal.SIGKILL)
        assert err == ""
        runs.wait_for_end(int(pid) for pid in pids.split())


@pytest.mark.slow
def test_a_worker_whose_parent_has_died_while_it_started_ends() -> None:
    code = "from mpp.data.workers import _start_worker; _start_worker({}, 0); print('works')"
    for parent, said in (("__import__('os').getppid()", "works\n"), ("__import__('os').getppid() + 1", "")):
        done = subprocess.run([sys.executable, "-c", code.format(parent)], capture_output=True, text=True)
        assert (done.stdout, done.returncode) == (said, 0 if said else 1), done.stderr
