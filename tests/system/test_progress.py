"""Progress on a terminal, elsewhere, and where there should be none; the clock is made, nothing sleeps."""

import os
import pty
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mpp.system import progress
from mpp.system.progress import Progress, clock, say


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved."""
    at = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: at[0]))
    return at


def test_lines_come_from_ten_seconds_on_after_each_tenth_or_minute(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    said: dict[float, str] = {}
    with Progress("packing", 2000, done=1000) as shown:
        for seconds, more in ((9.9, 99), (0.1, 1), (5, 200), (4.9, 0), (0.1, 0), (59.9, 100), (0.1, 0), (11, 600)):
            now[0] += seconds
            shown.add(more)
            said[round(now[0] - 100, 1)] = capsys.readouterr().err
    assert {at: line for at, line in said.items() if line} == {
        10: "packing: 1,100 of 2,000 images, 10 images/s, 0:01:30 left\n",
        20: "packing: 1,300 of 2,000 images, 15 images/s, 0:00:47 left\n",
        80: "packing: 1,400 of 2,000 images, 5 images/s, 0:02:00 left\n",
        91: "packing: 2,000 of 2,000 images, 11 images/s, 0:00:00 left\n",
    }
    with Progress("listing", None, "files") as shown:
        now[0] += 1000
        shown.to(5)
    assert capsys.readouterr() == ("", "listing: 5 files, 0.005 files/s\n")
    assert clock(3725.4) == "1:02:05"


@pytest.mark.parametrize("where", ["another rank", "a forked process", "off", "closed", "no lines"])
def test_where_nothing_is_shown(
    where: str, now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if where == "another rank":
        monkeypatch.setenv("RANK", "1")
    shown = Progress("packing", 10, on=where != "off", lines=where != "no lines")
    if where == "a forked process":
        monkeypatch.setattr(progress.os, "getpid", lambda: -1)
    if where == "closed":
        shown.close()
    now[0] += 100
    shown.to(5)
    shown.close()
    assert capsys.readouterr() == ("", "")


SCRIPT = """
import os, sys, time
from mpp.system.progress import Progress, say
with Progress("outer", 10, "steps", after=0, lines=False) as outer:
    outer.to(3)
    with Progress("inner", 500, after=0) as inner:
        inner.to(250)
        time.sleep(0.6)  # for the display's own thread
        say("words")
        print("1,2")
        if not os.fork():
            print("the child", file=sys.stderr, flush=True)
            inner.to(500)
            os._exit(0)
        os.wait()
        os.kill(os.getpid(), INTERRUPT)
print("3,4")
"""


def on_a_terminal(interrupt: int, **environment: str) -> tuple[str, str, int]:
    """What a script shows on a terminal, what it writes to stdout, and its exit code."""
    above, below = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("INTERRUPT", str(interrupt))],
        stdout=subprocess.PIPE,
        stderr=below,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment},
        text=True,
    ) as process:
        os.close(below)
        shown = b""
        while True:
            try:
                read = os.read(above, 4096)
            except OSError:  # what Linux says once nobody has the other end
                break
            if not read:
                break
            shown += read
        os.close(above)
        assert process.stdout is not None
        out = process.stdout.read()
    return shown.decode(), out, process.returncode


@pytest.mark.parametrize("interrupt", [0, signal.SIGINT])
def test_bars_on_a_terminal_leave_it_as_it_was(interrupt: int) -> None:
    shown, out, code = on_a_terminal(interrupt, NO_COLOR="1")
    plain = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", shown)
    for text in ("outer ", " 3/10 steps", "inner ", " 250/500 images"):
        assert text in plain
    assert "words\r\n" in plain
    assert "the child\r\n" in plain
    assert "500/500" not in plain  # of the child
    assert not re.search(r"\x1b\[(3|4|9|1)\dm", shown)  # a colour
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
    assert (out, code) == (("1,2\n", -signal.SIGINT) if interrupt else ("1,2\n3,4\n", 0))


def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    shown, out, code = on_a_terminal(0, TERM="dumb")
    lines = shown.splitlines()
    assert [line.split(",")[0] for line in lines] == ["inner: 250 of 500 images", "words", "the child"]
    assert (out, code, "\x1b" in shown) == ("1,2\n3,4\n", 0, False)


def test_a_line_without_bars_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold] words")
    assert capsys.readouterr() == ("", "[bold] words\n")
