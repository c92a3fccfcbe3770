"""YAML files and dotted flags in, frozen dataclasses out; whatever is wrong with them is said in one line.

1. The command line is cut into flags and their values, the YAML file into dotted names and theirs.
2. Every name is looked up in the tree of dataclasses, and tyro turns its text into a value of the field's type: the
   file's settings first, then the flags, so that flags override.
3. The dataclasses are built from the inside out, so that each checks itself in `__post_init__`.

tyro reads one setting at a time, because only so can a complaint be one line with the setting's name; it also writes
the help.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from mpp.addresses import without_credentials
from mpp.errors import ConfigError
from mpp.system.process import printing_to
from mpp.yaml_text import dump_yaml, load_yaml

T = TypeVar("T")

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclasses.dataclass(frozen=True)
class _Given:
    name: str
    label: str
    """How the user finds the setting again: `--optim.lr` or `base.yaml: optim.lr`."""
    tokens: list[Any]
    """Its values as texts; None stands for YAML's null."""
    file: str = ""


def parse(cls: type[T], argv: Sequence[str], prog: str, description: str, aliases: Mapping[str, str]) -> T:
    """Builds `cls` from its defaults, then the YAML file of `--config`, then the other flags.

    Args:
        cls: frozen dataclass in which every field has a default; its fields may be such dataclasses.
        argv: the command line without the program's name.
        aliases: short names of settings, `{"data": "data.source"}`.

    Raises:
        ConfigError: bad setting, flag or file.
        SystemExit: 0, after `--help` or `--version` was printed.
    """
    flags = _flags(argv)
    names = [flag.name for flag in flags]
    if "version" in names:
        print(prog, _version(cls))
        raise SystemExit(0)
    if names.count("config") > 1:
        raise ConfigError("--config: given twice; it takes one file")
    settings: list[_Given] = []
    for flag in flags:
        if flag.name == "config" and len(flag.tokens) != 1:
            raise ConfigError(f"--config: takes one file, got {_quoted(flag.tokens)}")
        if flag.name == "config":
            settings = _read(cls, Path(flag.tokens[0]), aliases)
    if "help" in names:
        _print_help(_build(cls, settings), prog, description)
    kinds = {name: kind for name, kind, _ in _fields(cls)}
    return _build(cls, settings + [_resolve(flag, kinds, aliases) for flag in flags if flag.name != "config"])


def overridden(config: T, argv: Sequence[str], aliases: Mapping[str, str] = types.MappingProxyType({})) -> T:
    """A config with these flags on top of what it says, written as on the command line.

    Raises:
        ConfigError: as `parse`.
    """
    kinds = {name: kind for name, kind, _ in _fields(type(config))}
    return _rebuilt(config, [_resolve(flag, kinds, aliases) for flag in _flags(argv)])


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts of str, int, float, bool, None and lists of those, in field order."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {key: list(v) if isinstance(v, tuple) else v for key, v in items}
    )


def to_yaml(config: Any) -> str:
    """A config as YAML in field order, for people and for a run's folder: without credentials in addresses.

    Read again, it gives an equal config but for those, floats bit for bit.
    """
    return dump_yaml(printable(to_dict(config)))


def by_name(config: Any) -> dict[str, Any]:
    """Every setting of a config by its dotted name, as a plain value, without credentials in addresses."""
    return dict(_leaves(printable(to_dict(config))))


def printable(value: Any) -> Any:
    """Plain values, such as those of `to_dict`, without credentials in addresses."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {key: printable(held) for key, held in value.items()}
    return [printable(held) for held in value] if isinstance(value, list) else value


def from_file(cls: type[T], path: Path) -> T:
    """The config in a YAML file such as a run's `config.yaml`; what the file leaves out has its default.

    Raises:
        ConfigError: as `parse`.
    """
    return _build(cls, _read(cls, path, {}))


def differences(cls: type[Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configs, as `to_dict` gives them, apart from the free fields: "optim.lr: 1.0 -> 2.0".

    A field is free whose metadata has `"free": True`, or of which both values are among those that it has there.
    """
    free = tuple(f"{name}." for name, _, freedom in _fields(cls) if freedom is True)
    among: dict[str, Any] = {name: freedom for name, _, freedom in _fields(cls) if isinstance(freedom, tuple)}
    before, after = dict(_leaves(printable(old))), dict(_leaves(printable(new)))  # signatures of URLs may change
    lines: list[str] = []
    for name in {**after, **before}:
        if f"{name}.".startswith(free) or (name in before and name in after and before[name] == after[name]):
            continue
        if name in among and {before.get(name), after.get(name)} <= {*among[name]}:
            continue
        was, now = (json.dumps(at[name], ensure_ascii=False) if name in at else "absent" for at in (before, after))
        if was != now:  # NaN differs from itself, but not as text
            lines.append(f"{name}: {was} -> {now}")
    return lines


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _fields(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, bool | tuple[str, ...]]]:
    """Name, type and freedom of all groups and settings below `cls`, in order, a group before its settings."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, kinds[field.name]
        yield name, kind, field.metadata.get("free", False)
        if dataclasses.is_dataclass(kind):
            yield from _fields(kinds[field.name], f"{name}.")


def _flags(argv: Sequence[str]) -> list[_Given]:
    """Cuts a command line at its flags."""
    flags: list[_Given] = []
    for token in argv:
        if token == "-h":
            flags.append(_Given("help", token, []))
        elif token.startswith("--"):
            label, equals, value = token.partition("=")
            flags.append(_Given(label[2:].replace("-", "_"), label, [value] if equals else []))
        elif flags:
            flags[-1].tokens.append(token)
        else:
            raise ConfigError(f"unexpected {token!r}; settings are given as --NAME VALUE")
    return flags


def _read(cls: type[Any], path: Path, aliases: Mapping[str, str]) -> list[_Given]:
    """The settings of a YAML file."""
    kinds = {name: kind for name, kind, _ in _fields(cls)}
    found: dict[str, _Given] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if dataclasses.is_dataclass(kinds.get(name)) and isinstance(value, dict | None):
                walk(value or {}, f"{name}.")  # None: all lines of the group are commented out
                continue
            given = _resolve(_Given(name, f"{path}: {name}", [value], str(path)), kinds, aliases)
            if given.name in found:
                raise ConfigError(f"{path}: {given.name} is set twice")
            if isinstance(value, list) and typing.get_origin(kinds[given.name]) is tuple:
                given = dataclasses.replace(given, tokens=value)
            found[given.name] = given

    walk(load_yaml(path), "")
    return list(found.values())


def _resolve(given: _Given, kinds: Mapping[str, Any], aliases: Mapping[str, str]) -> _Given:
    """The same setting by its full name, without alias or `no-`. Raises ConfigError for a name that is none."""
    full = aliases.get(given.name, given.name)
    settings = [name for name, kind in kinds.items() if not dataclasses.is_dataclass(kind)]
    if full in settings:
        return dataclasses.replace(given, name=full)
    group, dot, last = full.rpartition(".")
    positive = group + dot + last.removeprefix("no_")
    if not given.file and kinds.get(positive) is bool:
        if given.tokens:
            raise ConfigError(f"{given.label}: takes no value, got {_quoted(given.tokens)}")
        return dataclasses.replace(given, name=positive, tokens=["False"])

    def shown(name: str) -> str:
        return name if given.file else "--" + name.replace("_", "-")

    message = f"{given.file}: no setting {full!r}" if given.file else f"no setting {given.label!r}"
    if full in kinds:
        inside = ", ".join([shown(name) for name in settings if name.startswith(f"{full}.")][:3])
        raise ConfigError(f"{message}: it is a group of settings, such as {inside}")
    others = set(kinds) if given.file else {"config", "help", "version"}
    near = " or ".join(f"'{shown(name)}'" for name in _nearest(full, sorted({*settings, *aliases, *others})))
    raise ConfigError(f"{message}; " + (f"did you mean {near}?" if near else "--help lists them all"))


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The names that were probably meant: the same last part in other groups, else the nearest spelling."""

    def last(dotted: str) -> str:
        return dotted.rpartition(".")[2]

    name = name.lower()
    same = [other for other in known if last(other) == last(name)]
    if same:
        return difflib.get_close_matches(name, same, n=1 if "." in name else 3, cutoff=0.0)
    in_group = [other for other in known if difflib.get_close_matches(last(name), [last(other)])]
    return difflib.get_close_matches(name, known, n=1) or in_group[:3]


def _build(cls: type[T], settings: Iterable[_Given]) -> T:
    """An instance of `cls` with these settings, its defaults for the rest."""
    return _rebuilt(cls(), settings)


def _rebuilt(start: T, settings: Iterable[_Given]) -> T:
    """The config with these settings, the last one of a name winning; all of them are checked."""
    kinds = {name: kind for name, kind, _ in _fields(type(start))}
    values = {given.name: _convert(kinds[given.name], given) for given in settings}
    files = {given.name: given.file for given in settings}

    def rebuild(config: Any, prefix: str) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            name = prefix + field.name
            if dataclasses.is_dataclass(kinds[name]):
                changes[field.name] = rebuild(getattr(config, field.name), f"{name}.")
            elif name in values:
                changes[field.name] = values[name]
        try:
            # Not a new instance of the class: a recipe may give a group other defaults than the group's own.
            return dataclasses.replace(config, **changes)
        except ValueError as error:
            named = {file for name, file in files.items() if file and re.search(rf"\b{re.escape(name)}\b", str(error))}
            raise ConfigError(": ".join([*named, str(error)])) from None

    return rebuild(start, "")


def _convert(kind: Any, given: _Given) -> Any:
    """The texts of one setting as a value of its type. Raises ConfigError."""
    tokens = given.tokens
    if kind is bool and not tokens:
        return True
    word = tokens[0] if len(tokens) == 1 else ""
    if kind is str and len(tokens) == 1 and isinstance(word, str):
        return word
    if kind is bool and str(word).lower() in _WORDS:
        return _WORDS[str(word).lower()]
    if types.NoneType in typing.get_args(kind) and str(word).lower() in ("none", "null", "~"):
        return None
    if kind is not str and all(isinstance(token, str) for token in tokens):
        texts = (re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", token, flags=re.IGNORECASE) for token in tokens)
        with contextlib.suppress(SystemExit):
            return _by_tyro(kind, tuple(texts))
    hint = "; put quotes around it" if kind is str and len(tokens) > 1 else ""
    if typing.get_origin(kind) is Literal:
        near = difflib.get_close_matches(str(word).lower(), map(str, typing.get_args(kind)), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{given.label}: takes {_accepts(kind)}, got {_quoted(tokens)}{hint}")


@functools.cache
def _by_tyro(kind: Any, texts: tuple[str, ...]) -> Any:
    """Kept, since tyro takes milliseconds and a study reads a hundred configs that hardly differ."""
    # tyro prints what it thinks of a bad value and exits; the caller says it shorter.
    with printing_to(io.StringIO()):
        return tyro.cli(kind, args=texts, add_help=False)


def _quoted(tokens: Sequence[Any]) -> str:
    return " ".join("null" if token is None else repr(token) for token in tokens) or "nothing"


def _accepts(kind: Any) -> str:
    """A type in the user's words: "a number", "one of adam, adamw", "2 numbers"."""
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "one text", types.NoneType: "none"}
    plurals = {float: "numbers", int: "whole numbers", str: "texts"}
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, inner))}" if inner[1:] else str(inner[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_accepts(each) for each in inner)
    if typing.get_origin(kind) is tuple and typing.get_origin(inner[0]) is Literal:
        return f"one or more of {', '.join(map(str, typing.get_args(inner[0])))}"
    if typing.get_origin(kind) is tuple and typing.get_origin(inner[0]) in (typing.Union, types.UnionType):
        return f"one or more, each {_accepts(inner[0])}"
    if typing.get_origin(kind) is tuple:
        count = "a list of" if inner[-1] is Ellipsis else len(inner)
        return f"{count} {plurals.get(inner[0], 'values')}"
    return names.get(kind, str(kind))


def _print_help(config: Any, prog: str, description: str) -> NoReturn:
    """Prints tyro's help, with the values of `config` as the defaults, and exits."""
    told = functools.partial(tyro.conf.arg, help_behavior_hint="")
    file = Annotated[str, told(metavar="FILE", help="YAML file of settings; flags override it.")]
    version = Annotated[bool, tyro.conf.FlagCreatePairsOff, told(help="show the version and exit")]
    settings = Annotated[type(config), tyro.conf.arg(name="")]
    fields = [("version", version, False), ("config", file, ""), ("settings", settings, config)]
    arguments = dataclasses.make_dataclass("Arguments", fields)
    try:
        try:
            tyro.cli(arguments, args=["--help"], prog=prog, description=description)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `--help | head`: Python must not fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _version(cls: type[Any]) -> str:
    try:
        return metadata.version(cls.__module__.partition(".")[0])
    except metadata.PackageNotFoundError:
        return "(not installed)"
