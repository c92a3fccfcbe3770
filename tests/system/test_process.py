"""What a whole process shares: changed by two threads at once it ends as it was, and neither disturbs the other."""

import gc
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import matplotlib
import pytest
import torch

from mpp import cli
from mpp.report import charts
from mpp.study import scheduler
from mpp.system.process import GENERATORS, forking, global_draws, handle, one_thread, shared, without_warnings
from tests import runs
from tests.study.commands import command as study_command

Enter = Callable[[], AbstractContextManager[object]]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    """One other thread; torch computes on three, in each."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with ThreadPoolExecutor(1) as pool:
        yield pool
    torch.set_num_threads(before)


def is_heard() -> bool:
    """Whether this thread hears a warning."""
    try:
        warnings.warn("The hint is heard", UserWarning, stacklevel=2)
    except UserWarning:
        return True
    return False


class Garbage:
    """In a cycle, so that the collector alone ends it; writes down in which process that is."""

    def __init__(self, path: Path) -> None:
        self.itself, self.path = self, path

    def __del__(self) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_a_child_leaves_the_parent_s_garbage_alone(tmp_path: Path) -> None:
    gc.disable()
    try:
        Garbage(tmp_path / "ended in")
        with forking(()):
            child = os.fork()
            if not child:
                gc.collect()
                os._exit(0)
            os.waitpid(child, 0)
        assert not (tmp_path / "ended in").exists()
        gc.collect()
    finally:
        gc.enable()
    assert (tmp_path / "ended in").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    ("enter", "look"),
    [
        (one_thread, torch.get_num_threads),
        (without_warnings, is_heard),
        (lambda: without_warnings("the hint"), is_heard),
        (charts._settings, lambda: matplotlib.rcParams["svg.hashsalt"]),
    ],
)
def test_two_threads_within(enter: Enter, look: Callable[[], object], other: ThreadPoolExecutor) -> None:
    def elsewhere(work: Callable[[], object]) -> object:
        return other.submit(work).result()

    before, first, second = (look(), elsewhere(look)), enter(), enter()
    first.__enter__()
    within = look()
    assert within != before[0]
    if look in (torch.get_num_threads, is_heard):  # not those of the process
        with ThreadPoolExecutor(1) as new:
            assert new.submit(look).result() == before[0]
    elsewhere(second.__enter__)
    assert (look(), elsewhere(look)) == (within, within)
    first.__exit__(None, None, None)
    assert elsewhere(look) == within  # which is still within
    elsewhere(lambda: second.__exit__(None, None, None))
    assert (look(), elsewhere(look)) == before


def test_only_the_warnings_that_are_named() -> None:
    with without_warnings("the (hint|clue)", UserWarning):
        assert not is_heard()
        with pytest.raises(DeprecationWarning):
            warnings.warn("The hint", DeprecationWarning, stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("Not the hint", UserWarning, stacklevel=1)
        warnings.simplefilter("error")  # asked before ours
        assert is_heard()
        with without_warnings("the (hint|clue)", UserWarning):
            assert not is_heard()
    with without_warnings():  # the filters can be sent to other processes, as joblib does
        sent = pickle.loads(pickle.dumps(warnings.filters))
    assert sent[0] == ("ignore", re.compile("(?!)"), Warning, None, 0)


def test_draws_of_two_threads_are_those_of_each_alone(other: ThreadPoolExecutor) -> None:
    def draw(seed: int, wait: Callable[[], object] = lambda: None) -> list[float]:
        with global_draws(seed):
            first = float(torch.rand(()))
            wait()
            return [first, float(torch.rand(()))]

    alone, before = [draw(seed) for seed in (1, 2)], torch.get_rng_state()
    drawn, started = threading.Event(), []

    def start_the_other() -> None:
        started.append(other.submit(draw, 2, lambda: drawn.wait(60)))
        time.sleep(0.1)  # it would draw now, and again when this thread has

    first = draw(1, start_the_other)
    drawn.set()
    assert [first, started[0].result()] == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    begun, go = threading.Event(), threading.Event()

    @shared
    @contextmanager
    def slow() -> Iterator[None]:
        begun.set()
        go.wait(60)
        yield

    def within() -> None:
        with GENERATORS, slow():
            pass

    thread = threading.Thread(target=within)
    thread.start()
    begun.wait(60)
    with without_warnings(".*fork", DeprecationWarning):
        child = os.fork()
    if not child:
        go.set()
        threading.Timer(10, os._exit, (1,)).start()
        with GENERATORS, slow():
            os._exit(0)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


REUSE = """
import os, resource, torch
from mpp.system.process import memory_reused, return_memory

def faults(times=6, size=2**22):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(size), torch.ones(2 * size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
print(faults())
with memory_reused():
    faults()
    before = resident()
    print(faults(), resident() == before)
print(before - resident())
if os.fork() == 0:
    return_memory()
    # As a loader worker: a megabyte, which glibc reuses by itself.
    print(min(faults(1, 2**18) for _ in range(9)), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is tuned")
@pytest.mark.slow
def test_memory_is_reused_within_and_given_back_after() -> None:
    # A process of its own: its heap has room that the tests freed before, and the environment may tune it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", REUSE], env=environment, capture_output=True, text=True, check=True)
    usual, within, same, freed, worker = done.stdout.split()
    assert int(within) < int(usual) / 10  # page faults; how many usually are depends on the size of pages
    assert same == "True"
    assert int(freed) > 2**25
    assert int(worker) < 100


def test_earlier_handlers_of_signals_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before, heard = [signal.getsignal(number) for number in SIGNALS], []
    restore = handle(SIGNALS, lambda number, _: heard.append(number))
    signal.raise_signal(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]
    restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # one that is not Python's stays
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("it could not be put back"))
    handle(SIGNALS, lambda *_: None)()


def pretraining(source: str, out: Path) -> list[str]:
    return runs.command(source, out, data__workers="2", train__length="3 steps", fewshot__data="")


def tuning(source: str, out: Path) -> list[str]:
    return runs.finetune_command(source, out, data__workers="2", train__length="3 steps")


def packing(source: str, out: Path) -> list[str]:
    return ["tools/shard.py", "--data", source, "--out", str(out), "--workers", "2"]


def checking(source: str, out: Path) -> list[str]:
    return ["tools/check_data.py", "--data", source, "--out", str(out), "--workers", "2", "--img-size", "32"]


def studying(source: str, out: Path) -> list[str]:
    one = {"pretrain_seeds": "0", "labels": "100%", "lengths": "2 steps", "seeds": "0", "layers": "-1"}
    return study_command(source, out, **one, arms="", longer="", tune_at="", pretrain__log__report="false")


@pytest.mark.slow
@pytest.mark.parametrize("words", [pretraining, tuning, packing, checking, studying])
def test_tools_work_in_any_thread(
    words: Callable[[str, Path], list[str]],
    source: str,
    other: ThreadPoolExecutor,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tool, *rest = words(source, tmp_path / "out")
    assert other.submit(getattr(cli, Path(tool).stem), rest).result() == 0, capfd.readouterr().err


def test_a_study_waits_for_a_task_in_any_thread(
    other: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_WAIT_SECONDS", 0)
    ready = iter([False, True])
    task = scheduler.Task(tmp_path / "a", lambda: 0, lambda: next(ready))
    assert other.submit(scheduler.run_tasks, [task]).result() == 0
