"""YAML files and dotted flags in, frozen dataclasses out; every mistake in them becomes one line.

1. The command line is cut into flags and their texts, the YAML file into dotted names and theirs.
2. Each name is looked up in the tree of dataclasses, its text becomes a value of the field's type; flags come last.
3. The dataclasses are built from the inside out, so that each checks itself in `__post_init__`.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from mpp.config.files import config_file, dump_yaml, load_yaml
from mpp.config.help import accepts, print_help
from mpp.errors import ConfigError, without_credentials

T = TypeVar("T")
Auto = Literal["auto"]
CHOSEN = {"free": "chosen"}
"""Metadata of a setting whose auto a run replaces by a value that fits its data; the run's config.yaml has that."""
_UNIONS = (typing.Union, types.UnionType)
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Setting(NamedTuple):
    """A setting as written; `label` is `--optim.lr` or `base.yaml: optim.lr`, a token None is YAML's null."""

    name: str
    label: str
    tokens: list[Any]
    file: str = ""


def parse(cls: type[T], argv: Sequence[str], prog: str, description: str, aliases: Mapping[str, str]) -> T:
    """Builds `cls` from its defaults, then the YAML file of `--config`, then the other flags.

    `cls` is a frozen dataclass of settings and groups, all with defaults; `aliases` maps short names, "data", to whole
    ones, "data.source"; `argv` lacks the program's name; `prog` is the tool, perhaps after a word, "mpp pretrain".
    Raises ConfigError, in one line, for a bad setting, flag or file, and SystemExit after `--help` or `--version`.
    """
    flags = _flags(argv)
    names = [flag.name for flag in flags]
    if "version" in names:
        print(prog, version())
        raise SystemExit(0)
    files = [flag.tokens for flag in flags if flag.name == "config"]
    if len(files) > 1:
        raise ConfigError("--config: given twice; it takes one file")
    if files and len(files[0]) != 1:
        raise ConfigError(f"--config: takes one file, got {_quoted(files[0])}")
    tool = prog.rpartition(" ")[2].replace("-", "_")
    settings = _read(cls, config_file(files[0][0], tool), aliases) if files else []
    if "help" in names:
        print_help(_rebuilt(cls(), settings), prog, description)
    kinds = _kinds(cls)
    settings += [_resolve(flag, kinds, aliases) for flag in flags if flag.name != "config"]
    return _rebuilt(cls(), settings)


def version() -> str:
    """The package's version."""
    found = next(iter(metadata.distributions(name="mpp")), None)  # none where its source is on sys.path
    return found.version if found else "(not installed)"


def from_values(
    cls: type[T],
    config: Any,
    values: Mapping[str, Any],
    aliases: Mapping[str, str],
    tool: str,
    converted: Callable[[str, Any], Any] = lambda name, value: value,
) -> T:
    """Builds `cls` as `parse` does, from Python: numbers, bools, texts, lists and None instead of words.

    `config`: None, the name of a shipped config of the `tool`, the path of a YAML file, a mapping, or a `cls`; the
    `values` go on top, by dotted names, or nested. `converted(name, value)` is taken instead of a value.
    Raises ConfigError, in one line, for a bad setting or file.
    """
    start, kinds = config if isinstance(config, cls) else cls(), _kinds(cls)
    settings: list[_Setting] = []
    if isinstance(config, str | os.PathLike):
        settings = _read(cls, config_file(os.fspath(config), tool), aliases)
    elif config is not None and not isinstance(config, Mapping | cls):
        what = f"a name, a path, a dict or a {cls.__name__}"
        raise ConfigError(f"config: takes {what}, got {type(config).__name__}")

    def walk(tree: Mapping[str, Any], prefix: str = "") -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if dataclasses.is_dataclass(kinds.get(name)):
                value = to_dict(value) if isinstance(value, kinds[name]) else value
                if isinstance(value, Mapping):
                    walk(value, f"{name}.")
                    continue
            setting = _resolve(_Setting(name, name, []), kinds, aliases)
            settings.append(setting._replace(tokens=_texts(setting, converted(setting.name, value))))

    walk(config if isinstance(config, Mapping) else {})
    walk(values)
    return _rebuilt(start, settings)


def _texts(setting: _Setting, value: Any) -> list[Any]:
    """A Python value as the words of a command line. Raises ConfigError for one that has none."""
    several = isinstance(value, list | tuple | set | range)
    several |= (
        hasattr(value, "tolist") and hasattr(value, "__len__") and not isinstance(value, str)
    )  # an np.str_ is one
    given: Sequence[Any] = [*value] if several else [value]
    texts: list[Any] = []
    for one in given:
        plain = one.item() if hasattr(one, "item") else one  # of NumPy's numbers
        if isinstance(plain, os.PathLike):
            texts.append(os.fspath(plain))
        elif isinstance(plain, str | None):
            texts.append(plain)
        elif isinstance(plain, bool | int | float):
            texts.append(str(plain).lower() if isinstance(plain, bool) else repr(plain))
        else:
            raise ConfigError(f"{setting.label}: takes numbers, texts and lists of these, got {type(plain).__name__}")
    return texts


def from_file(cls: type[T], path: Path) -> T:
    """The config in a YAML file such as a run's `config.yaml`, else its defaults. Raises ConfigError as `parse`."""
    return _rebuilt(cls(), _read(cls, path, {}))


def overridden(config: T, argv: Sequence[str], aliases: Mapping[str, str] = types.MappingProxyType({})) -> T:
    """The config with these command-line flags on top. Raises ConfigError as `parse`."""
    return _rebuilt(config, [_resolve(flag, _kinds(type(config)), aliases) for flag in _flags(argv)])


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts of str, int, float, bool, None and lists of those, in field order."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def to_yaml(config: Any) -> str:
    """A config as YAML, without credentials in addresses; read again, all else is equal, floats bit for bit."""
    return dump_yaml(without_credentials(to_dict(config)))


def by_name(config: Any) -> dict[str, Any]:
    """Every setting of a config by its dotted name, as a plain value, without credentials in addresses."""
    return _flat(without_credentials(to_dict(config)))


def differences(cls: type[Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The changes between two configs, as `to_dict` gives them, but for free fields: "optim.lr: 1.0 -> 2.0".

    Where a field is free to be chosen, auto in the new one is what the old one has.
    """
    freedoms = {name: freedom for name, _, freedom in _fields(cls) if freedom}
    free = tuple(f"{name}." for name, freedom in freedoms.items() if freedom is True)
    before, after = (_flat(without_credentials(tree)) for tree in (old, new))  # signatures of URLs may change
    lines: list[str] = []
    for name in {**after, **before}:
        alike = freedoms.get(name, ())
        if f"{name}.".startswith(free) or (alike == "chosen" and after.get(name) in ("auto", ["auto"])):
            continue
        if isinstance(alike, tuple) and alike and {before.get(name), after.get(name)} <= {*alike}:
            continue
        was, now = (json.dumps(at[name], ensure_ascii=False) if name in at else "absent" for at in (before, after))
        # NaN equals itself as text alone, 1 equals 1.0 as a number alone.
        if was != now and (name not in before or name not in after or before[name] != after[name]):
            lines.append(f"{name}: {was} -> {now}")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _fields(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, type and "free" (True, values that count as equal, or "chosen") of each group and setting, groups first."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, kinds[field.name]
        yield name, kind, field.metadata.get("free", False)
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{name}.")


@functools.cache
def _kinds(cls: type[Any]) -> dict[str, Any]:
    return {name: kind for name, kind, _ in _fields(cls)}


def _flags(argv: Sequence[str]) -> list[_Setting]:
    """Cuts a command line at its flags."""
    flags: list[_Setting] = []
    for token in argv:
        if token == "-h":
            flags.append(_Setting("help", token, []))
        elif token.startswith("--"):
            label, equals, value = token.partition("=")
            flags.append(_Setting(label[2:].replace("-", "_"), label, [value] if equals else []))
        elif flags:
            flags[-1].tokens.append(token)
        else:
            raise ConfigError(f"unexpected {token!r}; settings are given as --NAME VALUE")
    return flags


def _read(cls: type[Any], path: Path, aliases: Mapping[str, str]) -> list[_Setting]:
    """The settings of a YAML file."""
    kinds = _kinds(cls)
    found: dict[str, _Setting] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if dataclasses.is_dataclass(kinds.get(name)) and isinstance(value, dict | None):
                walk(value or {}, f"{name}.")  # None: all lines of the group are commented out
                continue
            setting = _resolve(_Setting(name, f"{path}: {name}", [value], str(path)), kinds, aliases)
            if setting.name in found:
                raise ConfigError(f"{path}: {setting.name} is set twice")
            kind = kinds[setting.name]
            if isinstance(value, list) and tuple in [
                typing.get_origin(each) for each in (kind, *typing.get_args(kind))
            ]:
                setting = setting._replace(tokens=value)
            found[setting.name] = setting

    walk(load_yaml(path), "")
    return list(found.values())


def _resolve(setting: _Setting, kinds: Mapping[str, Any], aliases: Mapping[str, str]) -> _Setting:
    """The same setting by its full name, without alias or `no-`. Raises ConfigError for an unknown name."""
    full = aliases.get(setting.name, setting.name)
    settings = [name for name, kind in kinds.items() if not dataclasses.is_dataclass(kind)]
    if full in settings:
        return setting._replace(name=full)
    positive = re.sub(r"(^|\.)no_([^.]*)$", r"\1\2", full)
    flag = setting.label.startswith("-")
    if flag and kinds.get(positive) is bool:
        if setting.tokens:
            raise ConfigError(f"{setting.label}: takes no value, got {_quoted(setting.tokens)}")
        return setting._replace(name=positive, tokens=["false"])

    def shown(name: str) -> str:
        return "--" + name.replace("_", "-") if flag else name

    message = f"{setting.file}: no setting {full!r}" if setting.file else f"no setting {setting.label!r}"
    if full in kinds:
        inside = ", ".join([shown(name) for name in settings if name.startswith(f"{full}.")][:3])
        raise ConfigError(f"{message}: it is a group of settings, such as {inside}")
    others = {"config", "help", "version"} if flag else {*kinds, *(["config"] if not setting.file else [])}
    near = " or ".join(f"'{shown(name)}'" for name in _nearest(full, sorted({*settings, *aliases, *others})))
    raise ConfigError(f"{message}; " + (f"did you mean {near}?" if near else "--help lists them all"))


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The names that were probably meant: the same last part in other groups, else the nearest spelling."""
    name = name.lower()
    last = {each: each.rpartition(".")[2] for each in (*known, name)}
    if same := [each for each in known if last[each] == last[name]]:
        return difflib.get_close_matches(name, same, n=1 if "." in name else 3, cutoff=0.0)
    near = difflib.get_close_matches(name, known, n=1)
    return near or [each for each in known if difflib.get_close_matches(last[name], [last[each]])][:3]


def _rebuilt(start: T, settings: Iterable[_Setting]) -> T:
    """The config with these settings, the last one of a name winning; all of them are checked."""
    kinds = _kinds(type(start))
    values = {setting.name: _convert(kinds[setting.name], setting) for setting in settings}
    files = {setting.name: setting.file for setting in settings}

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


def _convert(kind: Any, setting: _Setting) -> Any:
    """The texts of one setting as a value of its type. Raises ConfigError."""
    tokens = setting.tokens
    if kind is bool and not tokens:  # a flag alone
        return True
    with contextlib.suppress(ValueError, KeyError):
        return _value(kind, tokens)
    hint = "; put quotes around it" if kind is str and len(tokens) > 1 else ""
    if typing.get_origin(kind) is Literal and tokens:
        near = difflib.get_close_matches(str(tokens[0]).lower(), map(str, typing.get_args(kind)), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{setting.label}: takes {accepts(kind)}, got {_quoted(tokens)}{hint}")


def _value(kind: Any, texts: Sequence[Any]) -> Any:
    """The texts as a value of the type. Raises ValueError or KeyError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        kinds = inner[:1] * len(texts) if inner[-1] is Ellipsis else inner
        return tuple(_value(each, [text]) for each, text in zip(kinds, texts, strict=True))
    for each in inner if origin in _UNIONS else ():
        with contextlib.suppress(ValueError, KeyError):
            return _value(each, texts)
    (text,) = texts
    if kind is types.NoneType and str(text).lower() in ("none", "null", "~"):
        return None
    if not isinstance(text, str):
        raise ValueError
    if kind is float:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text, flags=re.IGNORECASE))
    if kind in (int, str):
        return kind(text)
    return _WORDS[text.lower()] if kind is bool else {str(choice): choice for choice in inner}[text]


def _quoted(tokens: Sequence[Any]) -> str:
    return " ".join("null" if token is None else repr(token) for token in tokens) or "nothing"
