"""File names: which are images, in folders and in tar files alike, and how they are shown."""

import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from mpp.errors import install

Split = Literal["train", "val", "test"]
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
"""What splits are called, in any case; the likeliest first."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "npy")
"""File name endings that count as images; lower case."""
EXTRA_OF = {"heic": "heif", "heif": "heif", "avif": "pillow", "dcm": "dicom", "dicom": "dicom"}
"""Endings that count as images, too, and what must be installed to read them: an extra, or a newer Pillow."""
LABEL_COLUMNS = ("label", "labels", "class", "target", "classname", "finelabel", "findinglabels")
"""Columns of labels, as `folded` gives their names; the likeliest first."""

_UNREAD_EXTENSIONS = (
    *("jp2", "jxl", "svg", "psd", "exr"),
    *("dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"),  # raw
)
_SYSTEM = frozenset(
    ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
)
_MANY_IGNORED = 100  # pictures


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's own, never an image and never a class."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(name: str) -> bool:
    """Whether a file name ends as an image's does."""
    _, dot, extension = name.rpartition(".")
    return bool(dot) and (extension.lower() in IMAGE_EXTENSIONS or extension.lower() in EXTRA_OF)


@cache
def lacking(extra: str) -> str:
    """The command that installs what reads these files (see `EXTRA_OF`); empty where it is installed."""
    if extra == "pillow":
        from PIL import features

        return "" if features.check("avif") else f"{shlex.quote(sys.executable)} -m pip install -U pillow"
    return "" if find_spec({"heif": "pillow_heif", "dicom": "pydicom"}[extra]) else install(extra)


def needed_extra(data: bytes) -> str:
    """What must be installed to read a file of these first bytes, as in `EXTRA_OF`; empty for nothing."""
    if data[128:132] == b"DICM":
        return "dicom"
    brands = data[8:256]
    if data[4:8] != b"ftyp":
        return ""
    return "pillow" if b"avif" in brands or b"avis" in brands else "heif"


def is_picture(name: str) -> bool:
    """Whether a file name ends as that of a picture does, be it of a format that is read or not."""
    return is_image(name) or name.rpartition(".")[2].lower() in _UNREAD_EXTENSIONS


def is_split(name: str) -> bool:
    """Whether this is what a split is called."""
    return any(name.lower() in known for known in SPLIT_NAMES.values())


def splits_among(names: Collection[str]) -> dict[Split, str]:
    """Which of these names are the splits: a training split and a test split, perhaps a validation split; else none.

    A validation split without a test split is the test split.
    """
    found = dict[Split, str]()
    for split, known in SPLIT_NAMES.items():
        if called := [name for name in names if name.lower() in known]:
            found[split] = min(called, key=lambda name: (known.index(name.lower()), name))
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found if {"train", "test"} <= {*found} else {}


def folded(column: str) -> str:
    """The name of a column without its case, spaces and dashes: `Image_Path` is `imagepath`."""
    return re.sub(r"[\s_-]", "", column.lower())


def printable(text: str) -> str:
    """The text in one line that a terminal shows as it is: line breaks and undecodable bytes become \\n and \\xff."""

    def escaped(letter: str) -> str:
        if letter.isprintable() or unicodedata.category(letter) == "Zs":  # such as the wide space of Japanese names
            return letter
        code = ord(letter)
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else letter.encode("unicode_escape").decode()

    return text if text.isprintable() else "".join(map(escaped, text))


def home_expanded(path: str) -> Path:
    """The path with a leading ~ or ~user as the home folder; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user


@dataclass
class Ignored:
    """Files or members that are passed over: how many, how many of them end as pictures do, and an example."""

    number: int = 0
    pictures: int = 0
    example: str = ""

    def add(self, name: str, picture: bool) -> None:
        """One more."""
        self.merge(Ignored(1, int(picture), name))

    def merge(self, other: "Ignored") -> None:
        """Adds those of another part; the example is a picture if there is one, and the first by name, in any order."""
        if other.example:
            self.example = min((not of.pictures, of.example) for of in (self, other) if of.example)[1]
        self.number += other.number
        self.pictures += other.pictures

    def warnings(self, used: int, why: str) -> tuple[str, ...]:
        """A line where pictures are lost: many, or more than the `used` ones."""
        if self.pictures < min(_MANY_IGNORED, used + 1):
            return ()
        return (f"{self.pictures:,} pictures ignored, such as {printable(self.example)}: {why}",)
