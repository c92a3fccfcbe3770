"""The commands. They read the command line; torch is loaded only once it is known to be sound."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mpp.config import parse
from mpp.errors import ConfigError, UserError
from mpp.recipes import PretrainConfig

T = TypeVar("T")

_ALIASES = {"data": "data.source"}


def pretrain(argv: Sequence[str] | None = None) -> int:
    """Pretrains as the command line says (`argv`, by default the process's own); returns the exit code."""
    return _main("pretrain", PretrainConfig, argv, _pretrain)


def _pretrain(config: PretrainConfig) -> int:
    if not config.data.source:
        raise ConfigError("no images to learn from: give --data, such as --data folder:/my/images or --data demo")
    if not config.run_dir and not config.dry_run:
        raise ConfigError("nowhere to write to: give --run-dir, such as --run-dir runs/first, or --dry-run")
    from mpp.pretrain import run

    return run(config)


def _main(
    prog: str,
    cls: type[T],
    argv: Sequence[str] | None,
    run: Callable[[T], int],
    aliases: Mapping[str, str] = _ALIASES,
) -> int:
    """Parses `cls`, runs, and turns what the user can put right into one line on stderr and an exit code of 2 or 1."""
    rank = os.environ.get("RANK", "0")
    try:
        config = parse(cls, sys.argv[1:] if argv is None else argv, prog, cls.__doc__ or "", aliases)
        return run(config)
    except UserError as error:
        # All ranks read the same settings, so one speaks for all; anything else may have befallen this rank alone.
        if rank == "0" or not isinstance(error, ConfigError):
            who = "" if rank == "0" else f"[rank {rank}] "
            print(f"{prog}: error: {who}{' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if rank == "0":
            print(f"{prog}: interrupted", file=sys.stderr)
        return 130
