"""Names of shards: several patterns in one string, quotes, braces, globs, and which are URLs.

/a/*.tar s3://b/x-{000..123}.tar  ->  /a/*.tar, s3://b/x-000.tar, ...  ->  the files there are
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpp.data.sources.base import SourceError
from mpp.data.sources.names import home_expanded, printable
from mpp.errors import without_credentials

QUOTED = r"""(?<![^\s:])(?:"(?:[^"\\]|\\.)*"|'[^']*')(?![^\s:])"""
"""What stands in quotes: a name with blanks or " + " in it."""
_BRACES = re.compile(r"(?<!\[)\{([^{}]*)\}")  # [{] is a brace that is meant, as [*] is a star
_PATTERN = re.compile(rf"{QUOTED}|(?:\\\s|\{{[^{{}}]*\}}|\S)+", re.DOTALL)
_URL = re.compile(r"(?:s3|gs|https?|hf)://", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether it names something that is read over the network: s3://, gs://, http(s)://, hf://."""
    return bool(_URL.match(text))


def shown(text: str) -> str:
    """The text in one line, without user names, passwords and signed queries in its URLs."""
    return printable(without_credentials(text))


def quoted(text: str) -> str:
    """The text in quotes, of which `unquoted` makes it again."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def unquoted(text: str) -> str:
    """The text without the quotes around it."""
    return text[1:-1] if text.startswith("'") else re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)


def literal(path: str) -> str:
    """The pattern that stands for a path as it is, whatever stars, brackets and braces it holds."""
    return glob.escape(path).replace("{", "[{]")


def split_patterns(text: str) -> list[str]:
    r"""The patterns in one string, separated by white space; a name that holds some is quoted or escaped, `my\ data`.

    White space within braces does not separate. A string that names local shards as it stands is one pattern.
    """
    several = any(character.isspace() for character in text.strip()) and "://" not in text
    if several and (home_expanded(text).is_file() or all(local_files(one) for one in expand_braces(text))):
        return [text]
    return [
        unquoted(found) if re.fullmatch(QUOTED, found, re.DOTALL) else re.sub(r"\\(\s)", r"\1", found)
        for found in _PATTERN.findall(text)
    ]


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{00..02}.tar` to a-00.tar, a-01.tar, a-02.tar; `{x,y}` to x, y. Numbers keep the width of the first."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    choices: Iterable[str] = found[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = int(bounds[1]), int(bounds[2])
        step = 1 if first <= last else -1
        choices = (f"{number:0{len(bounds[1])}d}" for number in range(first, last + step, step))  # there may be many
    for choice in choices:
        yield from expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def local_files(alternative: str, folders: bool = False) -> list[str]:
    """The files, and if asked for folders, too, that a pattern without braces stands for."""
    there = os.path.exists if folders else os.path.isfile
    path = str(home_expanded(alternative))
    if there(path):
        return [path]
    matches = glob.glob(path, recursive=True)  # noqa: PTH207
    return [match for match in matches if there(match) and not match.endswith(".index")]


def local_shards(spec: str, pattern: str) -> list[Path]:
    """The files that a local pattern stands for, unsorted.

    Raises SourceError: an alternative in braces that matches no file.
    """
    if Path(pattern).is_file():
        return [Path(pattern)]
    files = list[str]()
    for alternative in expand_braces(pattern):
        matches = local_files(alternative)
        if not matches:
            folder = home_expanded(alternative).is_dir()
            what = "is a folder; write e.g. shards:DIR/*.tar" if folder else "matches no file"
            raise SourceError(f"{shown(spec)}: {printable(alternative)} {what}; check the path")
        files += matches
    return [Path(file) for file in files]
