"""Errors that are the user's to mend: each is one clear line, printed without a traceback."""

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


def command(tool: str) -> str:
    """How to start another tool, as this one was: `python tools/shard.py` from a clone, `mpp-shard` where installed."""
    sibling = Path(sys.argv[0]).with_name(f"{tool}.py") if sys.argv and sys.argv[0].endswith(".py") else Path(tool)
    if sibling.parent.name == "tools" and sibling.is_file():
        return f"python {shlex.quote(str(sibling))}"
    return f"mpp-{tool.replace('_', '-')}"


def install(extra: str) -> str:
    """The command that installs the packages of an optional extra, such as "hf", for the Python that runs this.

    It names the packages one by one: "mpp" is another project on PyPI, which `pip install "mpp[hf]"` may fetch.
    """
    try:
        known = requires("mpp") or []
    except PackageNotFoundError:  # its source is on sys.path, not installed
        known = []
    wanted = re.findall(rf"^(.+?) *; *extra == [\"']{extra}[\"']$", "\n".join(known), re.MULTILINE)
    wanted = wanted or ["-e", f"{Path(__file__).parent.parent}[{extra}]"]
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.join(wanted)}"


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
