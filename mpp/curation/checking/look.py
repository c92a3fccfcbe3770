"""What the pre-flight learns of images, some at a time: in any process, in any order of the processes."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha1

import numpy as np

from mpp.curation.checking.values import Kind, Spread, kind_of_form
from mpp.data.decoding import BadImage, open_picture
from mpp.data.decoding.bad_image import one_line
from mpp.data.decoding.to_uint8 import RawValues
from mpp.data.reader import Bad, kind_of
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.statistics import ChannelStatistics, histogram
from mpp.errors import RunError, Unreachable

GOOD, GREY, BLANK = 1, 2, 4
"""Flags: it can be used; colour whose channels are all the same; pixels that are all the same."""
_COLOUR = re.compile(r"JPEG$|RGBA?$|CMYK$|YCbCr$|\D3 x |x 3$")
_HELD = re.compile(r"has (\d+) channels")


@dataclass
class Part:
    """What some images are; a row of an array for each of them, 0 where it is bad."""

    height: np.ndarray
    width: np.ndarray
    content: np.ndarray
    """uint64, of the file's bytes."""
    pixels: np.ndarray
    """uint64, of size and pixels."""
    flags: np.ndarray
    colours: ChannelStatistics
    forms: Counter[str] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    """Of the images of wrong channels."""
    bad: list[Bad] = field(default_factory=list)
    spreads: dict[Kind, Spread] = field(default_factory=dict)
    seconds: float = 0.0
    """Spent in decoding the good images."""


def look(source: Source, indices: Sequence[int], reading: DecodeOptions) -> Part:
    """Reads and decodes images, and keeps what there is to know of them."""
    n = len(indices)
    part = Part(
        *(np.zeros(n, dtype=dtype) for dtype in (np.int32, np.int32, np.uint64, np.uint64, np.uint8)),
        colours=ChannelStatistics(reading.channels),
    )
    for row, (index, found) in enumerate(zip(indices, source.read_many(indices, reading.max_bytes), strict=True)):
        if isinstance(found, Unreachable):
            raise RunError(f"{found}; once it answers, run the same command again")
        try:
            if isinstance(found, OSError):
                raise found
            _look(part, row, found[0], reading)
        except (BadImage, OSError, MemoryError) as error:
            part.bad.append(Bad(index, kind_of(error), source.location(index), one_line(error)))
            if (held := _HELD.match(str(error))) and kind_of(error) == "wrong channels":
                part.channels[int(held[1])] += 1
    return part


def _look(part: Part, row: int, data: bytes | np.ndarray, reading: DecodeOptions) -> None:
    start = time.perf_counter()
    picture = open_picture(data, reading)
    part.forms[picture.form] += 1
    stored = picture.raw_values()
    try:
        pixels = picture.scaled(stored)
    except BadImage as error:
        if error.kind in ("no range", "wrong channels"):  # the values say what to state
            _note_values(part, stored, picture.form, reading)
        raise
    part.seconds += time.perf_counter() - start
    _note_values(part, stored, picture.form, reading)
    counts = histogram(pixels)
    part.colours.add(counts)
    part.height[row], part.width[row] = picture.height, picture.width
    part.content[row], part.pixels[row] = _hash_content(data), _hash_array(pixels)
    part.flags[row] = GOOD
    if counts.max(axis=1).min() == picture.height * picture.width:
        part.flags[row] |= BLANK
    elif reading.channels == 3 and _COLOUR.search(picture.form) and _is_grey(counts, pixels):
        part.flags[row] |= GREY


def _note_values(part: Part, stored: RawValues, form: str, reading: DecodeOptions) -> None:
    """Of what is not plain 8-bit, nor PPM, which says its range itself; opacity has none."""
    if kind_of_form(form) is None or form.startswith("PPM"):
        return
    values = stored.values if stored.values.ndim == 3 else stored.values[:, :, None]
    if stored.alpha and reading.channels in (1, 3):
        values = values[:, :, :-1]
    kind = Kind(values.dtype.newbyteorder("=").name, values.shape[2])
    part.spreads.setdefault(kind, Spread(kind.channels)).add(values)


def _is_grey(counts: np.ndarray, pixels: np.ndarray) -> bool:
    if (counts != counts[0]).any():  # settles nearly all
        return False
    return bool((pixels == pixels[:, :, :1]).all())


def _hash_content(data: bytes | np.ndarray) -> int:
    return _hash_array(data) if isinstance(data, np.ndarray) else _number(sha1(data, usedforsecurity=False).digest())


def _hash_array(values: np.ndarray) -> int:
    # Twice as fast as BLAKE2 where the processor knows it; else all this would take as long as decoding.
    digest = sha1(f"{values.dtype} {values.shape}".encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(values).data)
    return _number(digest.digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")
