"""Failures of one process among several: which rank reports them, and why a child process ended. Free of torch."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

_LOST = (
    "/gloo/transport/",
    "caused pair closure",  # gloo, of the next operation after one that got no answer
    "ncclRemoteError",
    "communicator was aborted",
    "collective operation timeout",
    "retrieving ncclUniqueId",
)


def rank_name() -> str:
    """ "[rank 1 on host] ", or nothing for a process alone."""
    rank = os.environ.get("RANK", "0")
    alone = rank == "0" and os.environ.get("WORLD_SIZE", "1") == "1"
    return "" if alone else f"[rank {rank} on {socket.gethostname()}] "


def _error_file() -> Path | None:
    """attempt_0/1/error.json of local rank 1; torchrun shows its content as "Root Cause"."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file) if file else None


def is_first_to_report(alike: bool) -> bool:
    """Whether no other rank on this machine has reported a failure since torchrun (re)started them.

    Without torchrun, every rank reports; but of an error that is `alike` on all ranks only rank 0.
    """
    file = _error_file()
    if file is None:
        return not alike or os.environ.get("RANK", "0") == "0"
    mark = file.parent.parent / "failure_reported"  # in the folder of this attempt on this machine
    try:
        mark.touch(exist_ok=False)
    except OSError:
        return not mark.exists()
    return True


def report_to_torchrun(text: str) -> None:
    """Leaves the message for torchrun's summary."""
    file = _error_file()
    if file:
        content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        try:
            file.write_text(json.dumps(content), encoding="utf-8")
        except OSError:  # no room, maybe: the message is on stderr as well
            print("the error file of torchrun cannot be written", file=sys.stderr)


def await_torchrun(seconds: float = 5) -> None:
    """Waits for torchrun, which ends all ranks of this machine as soon as one has gone.

    A rank that ended only because another failed would hide in torchrun's summary which one that was; and on another
    machine it would use up one of the restarts.
    """
    if _error_file() is not None:
        time.sleep(seconds)


def lost_another(error: Exception) -> str:
    """The network's message in one line where it means that another rank is gone or silent; else an empty text."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return ""
    if type(error).__name__ not in ("DistNetworkError", "DistStoreError") and not any(word in text for word in _LOST):
        return ""
    return re.sub(r"\[\S+\.(cc|cpp|h):\d+\] ", "", text)[:200]


def why_ended(exit_code: int, fewer: str) -> str:
    """Why a child process ended by itself (minus the number of a signal), and what to try; `fewer`: processes."""
    name = signal.Signals(-exit_code).name if exit_code < 0 else ""
    if name == "SIGKILL":
        return f"was killed, perhaps for want of memory: {fewer}"
    if name == "SIGBUS":
        room = "give the container more (docker run --shm-size 1g)"
        return f"had no shared memory left, or a file that it read was cut short meanwhile (SIGBUS): {room}, or {fewer}"
    if name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"):
        return f"crashed ({name}); the stack above says where: update that package, or leave out the image that it read"
    return f"was ended by {name}" if name else f"ended with exit status {exit_code}, for the reason above: {fewer}"


def last_line(trace: str) -> str:
    """A traceback in one line: the error, and the file and line where it arose."""
    text = trace.strip().strip('"').strip()
    locations = re.findall(r'File "(?:.*/)?(.*)", line (\d+)', text)
    error = text.splitlines()[-1].strip() if text else "no reason given"
    return f"{error} ({locations[-1][0]}, line {locations[-1][1]})" if locations else error
