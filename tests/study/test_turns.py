"""Who does which part of a study."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from mpp.study import turns
from mpp.study.turns import Part, take_turns
from mpp.system.files import claimed

_HOLD = """
import sys
from pathlib import Path
from mpp.system.files import claimed
with claimed(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Generator[subprocess.Popen[str]]:
    """Another process that is at the part `a`."""
    words = [sys.executable, "-c", _HOLD, str(tmp_path / "locks" / "a")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_part_waits_for_what_it_needs(tmp_path: Path) -> None:
    done: list[str] = []

    def do(name: str) -> int:
        done.append(name)
        return 0

    parts = [
        Part(tmp_path / "c", lambda: do("c"), lambda: "b" in done),
        Part(tmp_path / "a", lambda: do("a")),
        Part(tmp_path / "b", lambda: do("b")),
        Part(tmp_path / "d", lambda: do("d")),
    ]
    assert take_turns(parts) == 0
    assert done == ["a", "b", "c", "d"]


def test_a_stopped_part_stops_all(tmp_path: Path) -> None:
    done: list[str] = []
    parts = [Part(tmp_path / "a", lambda: 75), Part(tmp_path / "b", lambda: done.append("b") or 0)]
    assert take_turns(parts) == 75
    assert not done


def test_a_part_is_for_one_process(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with claimed(tmp_path / "locks" / "a") as mine:
        assert not mine
    with claimed(tmp_path / "locks" / "b") as mine:
        assert mine
    other.kill()
    other.wait()
    with claimed(tmp_path / "locks" / "a") as mine:
        assert mine


def test_the_part_of_a_killed_process_is_taken_over(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    asked = 0

    def sleep(_: float) -> None:
        nonlocal asked
        asked += 1
        assert done == ["b"]  # what nobody was at
        if asked == 2:
            other.kill()
            other.wait()

    monkeypatch.setattr(turns.time, "sleep", sleep)
    parts = [Part(tmp_path / "locks" / name, lambda name=name: done.append(name) or 0) for name in "ab"]
    assert take_turns(parts) == 0
    assert done == ["b", "a"]
    assert asked == 2
    assert capsys.readouterr().out.count("waiting for other processes") == 1


def test_what_is_measured_once_is_waited_for(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    assert other.stdin
    threading.Timer(0.3, other.stdin.close).start()  # which ends it
    with claimed(tmp_path / "locks" / "a", wait=True) as mine:
        assert mine


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_one_that_waits_stops_when_asked(
    number: signal.Signals, status: int, tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns.time, "sleep", lambda _: os.kill(os.getpid(), number))
    assert take_turns([Part(tmp_path / "locks" / "a", lambda: 0)]) == status
    assert other.poll() is None
