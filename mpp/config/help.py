"""The text of `--help`, and types in the user's words."""

import contextlib
import dataclasses
import os
import sys
import types
import typing
from typing import Annotated, Any, Literal, NoReturn


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


def accepts(kind: Any) -> str:
    """A type in the user's words: "a number", "one of adam, adamw", "2 numbers"."""
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "one text", types.NoneType: "none"}
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if inner[1:] else str(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(accepts(each) for each in inner)
    if origin is not tuple:
        return names.get(kind, str(kind))
    if inner[0] in (float, int, str):
        plural = {float: "numbers", int: "whole numbers", str: "texts"}[inner[0]]
        return f"{'a list of' if inner[-1] is Ellipsis else len(inner)} {plural}"
    each = accepts(inner[0])
    return each.replace("one of", "one or more of") if each.startswith("one of") else f"one or more, each {each}"
