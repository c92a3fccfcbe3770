"""What a rank says when it fails, so that all of them together give one message. Free of torch, as the commands are."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

_TRANSPORT = (
    "/gloo/transport/",
    "caused pair closure",  # gloo, of the next operation after one that got no answer, without its place
    "ncclRemoteError",
    "communicator was aborted",
    "collective operation timeout",
    "retrieving ncclUniqueId",
)
_STORE = ("DistNetworkError", "DistStoreError")


def who() -> str:
    """ "[rank 1 on host] ", or nothing for a process alone."""
    rank = os.environ.get("RANK", "0")
    alone = rank == "0" and os.environ.get("WORLD_SIZE", "1") == "1"
    return "" if alone else f"[rank {rank} on {socket.gethostname()}] "


def speaks(alike: bool) -> bool:
    """Whether no other rank on this machine has spoken since torchrun (re)started them.

    Without torchrun, every rank speaks, but of errors that all have `alike` rank 0 only.
    """
    mark = _mark()
    if mark is None:
        return not alike or os.environ.get("RANK", "0") == "0"
    try:
        mark.touch(exist_ok=False)
    except OSError:
        return not mark.exists()
    return True


def _mark() -> Path | None:
    # attempt_0/1/error.json belongs to local rank 1; the folder above, to all of this machine in this attempt.
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parent.parent / "failure_reported" if file else None


def tell_torchrun(text: str) -> None:
    """Leaves the message where torchrun's summary ("Root Cause") takes it from."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        try:
            Path(file).write_text(json.dumps(told), encoding="utf-8")
        except OSError:  # no room, maybe: the message is on stderr as well
            print("torchrun could not be told", file=sys.stderr)


def lost_another(error: Exception) -> str:
    """What the network said, in one line, where `error` is that another rank is gone or silent; else an empty text."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return ""
    if type(error).__name__ not in _STORE and not any(word in text for word in _TRANSPORT):
        return ""
    return re.sub(r"\[\S+\.(cc|cpp|h):\d+\] ", "", text)[:200]


def await_verdict(seconds: float = 5) -> None:
    """Waits for torchrun, which ends all ranks of this machine as soon as one has gone.

    A rank that goes by itself, only because another failed, would hide in torchrun's summary which one it was; and on
    another machine it would use up one of the restarts.
    """
    if _mark() is not None:
        time.sleep(seconds)


def ended(exit_code: int, fewer: str) -> str:
    """What befell a process that ended by itself, and what to try.

    Args:
        exit_code: as `multiprocessing` has it: minus the number of a signal.
        fewer: how to take fewer processes.
    """
    name = signal.Signals(-exit_code).name if exit_code < 0 else ""
    if name == "SIGKILL":
        return f"was killed, perhaps for want of memory: {fewer}"
    if name == "SIGBUS":
        room = "give the container more (docker run --shm-size 1g)"
        return f"had no shared memory left, or a file that it read was cut short meanwhile (SIGBUS): {room}, or {fewer}"
    if name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"):
        return f"crashed ({name}); the stack above says where: update that package, or leave out the image that it read"
    return f"was ended by {name}" if name else f"ended with exit status {exit_code}, for the reason above: {fewer}"


def last_words(trace: str) -> str:
    """The text of a traceback in one line: the error, and the file and line where it arose."""
    text = trace.strip().strip('"').strip()
    places = re.findall(r'File "(?:.*/)?(.*)", line (\d+)', text)
    error = text.splitlines()[-1].strip() if text else "no reason given"
    return f"{error} ({places[-1][0]}, line {places[-1][1]})" if places else error
