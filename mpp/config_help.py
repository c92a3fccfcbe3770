"""The text of `--help`."""

import contextlib
import dataclasses
import os
import sys
from typing import Annotated, Any, NoReturn


def print_help(config: Any, prog: str, description: str) -> NoReturn:
    """Prints tyro's help, with the values of `config` as the defaults, and exits."""
    import tyro  # takes as long as all the rest

    file = tyro.conf.arg(
        metavar="FILE",
        help="Settings: a YAML file, or a shipped config by its name, such as base. Flags override it.",
        help_behavior_hint="",
    )
    version = tyro.conf.arg(help="show the version and exit", help_behavior_hint="")
    fields = [
        ("version", Annotated[bool, tyro.conf.FlagCreatePairsOff, version], False),
        ("config", Annotated[str, file], ""),
        ("settings", Annotated[type(config), tyro.conf.arg(name="")], config),
    ]
    arguments = dataclasses.make_dataclass("Arguments", fields)
    try:
        with contextlib.suppress(SystemExit):
            tyro.cli(arguments, args=["--help"], prog=prog, description=description)
        sys.stdout.flush()
    except BrokenPipeError:  # `--help | head`: Python must not fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)
