"""Errors that are the user's to mend: each is one clear line, printed without a traceback."""

import shlex
import sys
from pathlib import Path


def command(tool: str) -> str:
    """How to start another tool, as this one was: `python tools/shard.py` from a clone, `mpp-shard` where installed."""
    sibling = Path(sys.argv[0]).with_name(f"{tool}.py") if sys.argv and sys.argv[0].endswith(".py") else Path(tool)
    if sibling.parent.name == "tools" and sibling.is_file():
        return f"python {shlex.quote(str(sibling))}"
    return f"mpp-{tool.replace('_', '-')}"


class UserError(Exception):
    """Something asked for cannot be done; the text names the thing, the value and what to do next."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting that cannot be used: one line that names the file or flag, the value and what is accepted."""


class Unreachable(OSError):
    """What images are read from gives no answer, after several tries: no fault of the images."""


class TryLater(UserError):
    """A run that waits for something to answer; the text says for what, and the same command goes on with it."""

    exit_code = 75  # EX_TEMPFAIL


class RunError(UserError):
    """A run that had started had to stop; the text says why and where it can go on."""

    exit_code = 1
