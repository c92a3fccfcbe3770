"""The string that names a source: taken apart, and written so that it opens.

3 * folder:"/x/C + D" + 1 * demo  ->  weights 3 and 1  ->  folder, /x/C + D; demo
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable

from mpp.data.sources.base import SourceError
from mpp.data.sources.names import home_expanded, is_hidden
from mpp.data.sources.patterns import QUOTED, is_url, local_files, quoted, shown, unquoted
from mpp.errors import ConfigError

_EXAMPLES = {
    "folder": "folder:DIR",
    "shards": "shards:GLOB",
    "array": "array:FILE.npy",
    "csv": "csv:FILE.csv",
    "hf": "hf:NAME_OR_DIR",
    "cifar10": "cifar10:DIR",
    "cifar100": "cifar100:DIR",
    "demo": "demo",
}
_ENDINGS = {"array": (".npy", ".npz", ".h5", ".hdf5"), "csv": (".csv", ".tsv"), "shards": (".tar", ".tgz", ".tar.gz")}
_PLUS = " + "
_TOKEN = re.compile(rf"{QUOTED}|{re.escape(_PLUS)}", re.DOTALL)
_WEIGHTED = re.compile(r"([^\s:*/]+)\s*\*\s*(\S.*)", re.DOTALL)
_ARGUMENT = re.compile(rf"({QUOTED})(:\w+)?", re.DOTALL)  # hf:"...":test


def spec_of(kind: str, argument: str) -> str:
    """`kind:argument`, with quotes where it would not open without: around " + ", and around blanks in shards."""
    bare = _PLUS not in argument and argument == argument.strip() and argument[:1] not in ('"', "'")
    if kind == "shards":
        bare = bare and not any(character.isspace() for character in argument)
    return f"{kind}:{argument if bare else quoted(argument)}"


def parts_of(spec: str) -> tuple[list[float] | None, list[str]]:
    """The weights, where there are any, and the sources that are joined by " + ", one or several.

    Raises SourceError: a source is missing beside a +, or has no weight although others do.
    """
    starts = [found.start() for found in _TOKEN.finditer(spec) if found[0] == _PLUS]
    ends = [start + len(_PLUS) for start in starts]
    texts = [spec[begin:end].strip() for begin, end in zip([0, *ends], [*starts, len(spec)], strict=True)]
    if len(texts) == 1:
        return None, [spec]
    name = shown(spec)
    if not all(texts):
        raise SourceError(f"{name!r}: a source is missing beside a +; write e.g. folder:/a + folder:/b")
    kind, _, argument = spec.partition(":")
    if kind in _EXAMPLES and "\0" not in argument and "://" not in argument and local_files(argument, folders=True):
        raise SourceError(f"{spec!r}: + joins two sources; a name that holds one is quoted, {spec_of(kind, argument)}")
    found = [_weighted(text) for text in texts]
    weighted = [match for match in found if match]
    if not weighted:
        return None, texts
    if len(weighted) < len(texts):
        bare = texts[found.index(None)]
        raise SourceError(f"{name!r}: {shown(bare)} has no weight; give every source one, or none")
    weights = list[float]()
    for match in weighted:
        try:
            weights.append(float(match[1]))
        except ValueError:
            raise SourceError(f"{name!r}: the weight {match[1]!r} is no number; write e.g. 3 * folder:DIR") from None
    return weights, [match[2] for match in weighted]


def _weighted(text: str) -> re.Match[str] | None:
    """A weight and its source; None for a glob, `2024*.tar`."""
    found = _WEIGHTED.fullmatch(text)
    if found is None or found[2].partition(":")[0] in _EXAMPLES or text[found.end(1)].isspace():
        return found
    return None if text.lower().endswith(_ENDINGS["shards"]) else found


def parse(spec: str) -> tuple[str, str]:
    """`kind:argument` in two, checked, the argument without quotes; that of shards with them, for it is several.

    Raises SourceError: no such kind, or an argument that it cannot have.
    """
    if "\0" in spec:
        raise SourceError(f"{shown(spec)!r} holds a NUL, which no path does; check it")
    if weighted := _weighted(spec):
        raise SourceError(f"{shown(spec)!r}: a weight is for one of several sources; write {shown(weighted[2])}")
    kind, _, argument = spec.partition(":")
    if kind == "python":  # only a program can give such (from_python.py)
        return kind, argument
    if kind not in _EXAMPLES:
        raise _unknown(spec, kind, argument)
    found = _ARGUMENT.fullmatch(argument) if kind != "shards" else None
    if found and (kind == "hf" or not found[2]):
        argument = unquoted(found[1]) + (found[2] or "")
    if kind == "demo":
        if argument:
            raise SourceError(f"{shown(spec)!r}: demo takes no argument; write demo")
    elif not argument:
        raise SourceError(f"{spec!r} does not say where; write {_EXAMPLES[kind]}")
    elif kind != "shards" and is_url(argument):
        raise SourceError(f"{shown(spec)}: only shards are read over the network, shards:URL; copy it to a local disk")
    return kind, argument


def _unknown(spec: str, kind: str, argument: str) -> SourceError:
    """The error for a string that begins with no kind of source: says which was probably meant."""
    known = f"a source is one of {', '.join(_EXAMPLES.values())}"
    lacks = f"{shown(spec)!r} lacks the kind of source: did you mean"
    if is_url(spec):
        return SourceError(f"{lacks} shards:{shown(spec)}?")
    if not spec:
        return SourceError(f"no source of images was given (data.source, or --data for short); {known}")
    path = home_expanded(spec)
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        suffix = "".join(path.suffixes[-2:]).lower()
        meant = next((kind for kind, endings in _ENDINGS.items() if suffix.endswith(endings)), "")
        if path.is_dir() or meant:
            return SourceError(f"{lacks} {spec_of('folder' if path.is_dir() else meant, spec)}?")
        parent = spec_of("folder", str(path.parent))
        return SourceError(f"{spec!r} is a single file: did you mean the folder that it lies in, {parent}?")
    if ":" not in spec and spec.lower().endswith(_ENDINGS["shards"]):  # a glob
        return SourceError(f"{lacks} {spec_of('shards', spec)}?")
    near = difflib.get_close_matches(kind.lower(), _EXAMPLES, n=1, cutoff=0.5)
    rest = f":{shown(argument)}" if argument and near[:1] != ["demo"] else ""
    hint = f"did you mean {near[0]}{rest}? " if near else ""
    return SourceError(f"{shown(spec)!r}: there is no kind of source called {shown(kind)!r}; {hint}{known}")


def check_outside_images(setting: str, folder: str, specs: Iterable[str]) -> None:
    """Refuses to write in a folder of images, where our pictures would be images, and a class, for the next command.

    A run that is there already may go on. `setting` names `folder`, which is there or not, or empty for none; opening
    the `specs` says what is wrong with one.

    Raises ConfigError: `folder` is one of images, or lies in one, and is not hidden there.
    """
    target = home_expanded(folder).resolve()
    if not folder or (target / "config.yaml").exists():
        return
    for spec in specs:
        with contextlib.suppress(SourceError, OSError, RuntimeError):
            for kind, argument in map(parse, parts_of(spec)[1] if spec else ()):
                images = home_expanded(argument).resolve()
                if kind != "folder" or not images.is_dir() or not target.is_relative_to(images):
                    continue
                if not any(is_hidden(name) for name in target.relative_to(images).parts):
                    raise ConfigError(
                        f"{setting} {folder} is in the folder of the images, {spec_of(kind, argument)}: pictures "
                        "written there would be images, too; give a folder outside of it"
                    )
