"""The command lines, `mpp TOOL ...` and a script for each tool.

torch is loaded only once the settings are known to be sound. The table of the tools is in commands.py.
"""

import difflib
import functools
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mpp.cli.commands import TOOLS, run
from mpp.config import parse, version
from mpp.errors import ConfigError, Unreachable, UserError
from mpp.system import failure
from mpp.system.cache import limit_of
from mpp.system.cores import limit_threads
from mpp.system.files import cache_folder

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """The command `mpp TOOL ...`: does what the words (by default the process's own) ask; returns the exit code."""
    words = sys.argv[1:] if argv is None else [*argv]
    first = words[0] if words else "--help"
    name = first.replace("-", "_")
    if name in TOOLS:
        return _main(name, words[1:], f"mpp {first}")
    if first in ("-h", "--help"):
        lines = [f"  {tool.replace('_', '-'):<12}{of.about}" for tool, of in TOOLS.items()]
        head = [
            "usage: mpp TOOL [settings]",
            "",
            "Masked patch prediction: Vision Transformers for images without labels.",
            "",
        ]
        print("\n".join([*head, *lines, "", "mpp TOOL --help lists the settings of a tool."]))
        return 0
    if first == "--version":
        print("mpp", version())
        return 0
    near = difflib.get_close_matches(name.lower(), TOOLS, n=1)
    hint = f"did you mean {near[0].replace('_', '-')!r}?" if near else "mpp --help lists them all"
    print(f"mpp: error: no tool {first!r}; {hint}", file=sys.stderr)
    return 2


def _main(name: str, argv: Sequence[str] | None = None, prog: str = "") -> int:
    """Does what the command line (`argv`, by default the process's own) asks of a tool; returns the exit code."""
    tool = TOOLS[name]
    words = sys.argv[1:] if argv is None else argv
    words = _with_images(words) if name == "predict" else words
    return run_tool(prog or name, tool.settings, words, functools.partial(run, tool), tool.aliases)


# The entry points that setup.cfg names: `pretrain(argv)` returns the exit code.
pretrain = functools.partial(_main, "pretrain")
finetune = functools.partial(_main, "finetune")
fewshot = functools.partial(_main, "fewshot")
probe = functools.partial(_main, "probe")
predict = functools.partial(_main, "predict")
embed = functools.partial(_main, "embed")
convert = functools.partial(_main, "convert")
visualize = functools.partial(_main, "visualize")
study = functools.partial(_main, "study")
shard = functools.partial(_main, "shard")
check_data = functools.partial(_main, "check_data")
cache = functools.partial(_main, "cache")


def _with_images(argv: Sequence[str]) -> list[str]:
    """The command line of `predict`, words that belong to no setting as its images; settings take one value."""
    words: list[str] = []
    images: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            images.append(word)
        elif word.startswith("--images="):
            images.append(word.removeprefix("--images="))
        elif word != "--images":
            words.append(word)
            if "=" not in word and word not in ("-h", "--help", "--version") and rest:
                words.append(rest.pop(0))
    return [*words, "--images", *images] if images else words


def run_tool(prog: str, cls: type[T], argv: Sequence[str], run: Callable[[T], int], aliases: Mapping[str, str]) -> int:
    """Parses `cls`, runs, and turns what the user can put right into one line on stderr and an exit code of 2 or 1.

    Of several ranks the first to fail reports; those that only miss another do so where nobody else has.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr: the locale may lack ±, or a name's letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        limit_threads()
        config = parse(cls, argv, prog, cls.__doc__ or "", aliases)
        if os.environ.get("MPP_CACHE_LIMIT"):  # a wrong one is reported now rather than when something is cached
            limit_of(cache_folder())
        return run(config)
    except UserError as error:
        # All ranks read the same settings, so one reports for all; any other error may be this rank's alone.
        _report(prog, error, alike=isinstance(error, ConfigError))
        return error.exit_code
    except Unreachable as error:
        _report(prog, f"{error}; once it answers, try again")
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        lost = failure.lost_another(error)
        if lost:
            failure.await_torchrun(1)  # the rank that caused it will report why
            if _report(prog, f"another rank is gone, or silent for longer than MPP_TIMEOUT: {lost}"):
                failure.await_torchrun()
            return 1
        if failure.rank_name() and not _report(prog, f"{type(error).__name__}: {error}"):
            return 1
        raise


def _report(prog: str, what: object, alike: bool = False) -> bool:
    """Reports on stderr and to torchrun, unless another rank here has done so; returns whether it did."""
    if not failure.is_first_to_report(alike):
        failure.await_torchrun()
        return False
    line = f"{prog}: error: {'' if alike else failure.rank_name()}{' '.join(str(what).splitlines())}"
    failure.report_to_torchrun(line)
    print(line, file=sys.stderr)
    return True
