"""A look at all images, in parallel and in bounded memory, with the same result for any number of processes."""

import functools
import re
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

from mpp.curation.pool import in_processes
from mpp.curation.value_ranges import Kind, Spread, kind_of_form
from mpp.data.decoding import BadImage, open_picture
from mpp.data.decoding.to_uint8 import RawValues
from mpp.data.reader import Bad, attempt_each
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source, image_digest
from mpp.data.statistics import ChannelStatistics, histogram
from mpp.errors import RunError, Unreachable

GOOD, GREY, BLANK = 1, 2, 4
"""Flags: it can be used; colour whose channels are all the same; pixels that are all the same."""
THUMB = 16
"""Sides of a thumbnail in pixels."""
_CHUNK = 32  # images of a task: few enough to hold their files at once, enough for reading them together
_NAMED = 3  # bad files of a kind that are named
_COLOUR = re.compile(r"JPEG$|RGBA?$|CMYK$|YCbCr$|\D3 x |x 3$")
_HAS = re.compile(r"has (\d+) channels")


class ScanResult:
    """Facts about some images: some numbers for each, 0 where it is bad, and sums over all.

    Attributes:
        indices: int64 (n,), which images of the source.
        height, width: int32 (n,).
        content, pixels: uint64 (n,), hashes of the file's bytes, and of size and pixels.
        flags: uint8 (n,).
        thumbs: uint8 (n, 16, 16), the image in grey, squeezed.
        forms: images of each file format; channels: of each number of channels that does not fit.
        kinds: bad images of each kind; named: the first ones.
        bad: all of them; not kept by `add`.
        spreads: the values of images that are not plain 8-bit.
        seconds: spent in decoding the good images.
    """

    def __init__(self, indices: np.ndarray, channels: int) -> None:
        n = len(indices)
        self.indices, self._added, self.seconds = indices, 0, 0.0
        self.height, self.width = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)
        self.content, self.pixels = np.zeros(n, dtype=np.uint64), np.zeros(n, dtype=np.uint64)
        self.flags = np.zeros(n, dtype=np.uint8)
        self.thumbs = np.zeros((n, THUMB, THUMB), dtype=np.uint8)
        self.colours = ChannelStatistics(channels)
        self.forms: Counter[str] = Counter()
        self.channels: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.named: dict[str, list[Bad]] = {}
        self.bad: list[Bad] = []
        self.spreads: dict[Kind, Spread] = {}

    def add(self, chunk: "ScanResult") -> None:
        """Takes in the result of the next images."""
        start, self._added = self._added, self._added + len(chunk.flags)
        for name in ("height", "width", "content", "pixels", "flags", "thumbs"):
            getattr(self, name)[start : self._added] = getattr(chunk, name)
        self.seconds += chunk.seconds
        self.colours.merge(chunk.colours)
        self.forms += chunk.forms
        self.channels += chunk.channels
        for bad in chunk.bad:
            self.kinds[bad.kind] += 1
            named = self.named.setdefault(bad.kind, [])
            if len(named) < _NAMED:
                named.append(bad)
        for kind, spread in chunk.spreads.items():
            self.spreads.setdefault(kind, Spread(kind.channels)).merge(spread)

    @property
    def good(self) -> np.ndarray:
        """bool (n,): which can be used."""
        return (self.flags & GOOD).astype(bool)

    @property
    def grey(self) -> int:
        """How many are colour with all channels the same."""
        return int(np.count_nonzero(self.flags & GREY))

    @property
    def blank(self) -> np.ndarray:
        """Those of one colour throughout, as positions in `indices`."""
        return np.flatnonzero(self.flags & BLANK)


def scan(
    source: Source,
    reading: DecodeOptions,
    indices: np.ndarray,
    workers: int,
    report_bad: Callable[[list[Bad]], None] = lambda bad: None,
    tell: Callable[[int], None] = lambda images: None,
) -> tuple[ScanResult, float]:
    """Reads and decodes images (`indices`, int64); returns the facts about them, and the seconds that it took.

    `report_bad` gets the bad ones as they are met, `tell` the number of images done. Raises RunError where a process
    died or the source does not answer.
    """
    start, total = time.perf_counter(), ScanResult(indices, reading.channels)
    work = functools.partial(scan_chunk, source, reading)
    chunks = np.split(indices, range(_CHUNK, len(indices), _CHUNK))
    done = 0
    for chunk in in_processes(work, chunks, workers) if workers else map(work, chunks):
        total.add(chunk)
        report_bad(chunk.bad)
        done += len(chunk.indices)
        tell(done)
    return total, time.perf_counter() - start


def scan_chunk(source: Source, reading: DecodeOptions, indices: np.ndarray) -> ScanResult:
    """Reads and decodes some images."""
    result = ScanResult(indices, reading.channels)
    rows = {index: row for row, index in enumerate(indices.tolist())}

    def look(index: int, data: bytes | np.ndarray, _: int) -> None:
        _scan_image(result, rows[index], data, reading)

    try:
        for _, bad in attempt_each(source, list(rows), reading.max_bytes, look):
            if bad:
                result.bad.append(bad)
                if bad.kind == "wrong channels" and (has := _HAS.match(bad.reason)):
                    result.channels[int(has[1])] += 1
    except Unreachable as error:
        raise RunError(f"{error}; once it answers, run the same command again") from error
    return result


def _scan_image(result: ScanResult, row: int, data: bytes | np.ndarray, reading: DecodeOptions) -> None:
    start = time.perf_counter()
    picture = open_picture(data, reading)
    result.forms[picture.form] += 1
    stored = picture.raw_values()
    try:
        pixels = picture.scaled(stored)
    except BadImage as error:
        if error.kind in ("no range", "wrong channels"):  # the values show what to state
            _note_values(result, stored, picture.form, reading)
        raise
    result.seconds += time.perf_counter() - start
    _note_values(result, stored, picture.form, reading)
    counts = histogram(pixels)
    result.colours.add(counts)
    result.height[row], result.width[row] = picture.height, picture.width
    for hashes, image in ((result.content, data), (result.pixels, pixels)):
        hashes[row] = int.from_bytes(image_digest(image)[:8], "little")
    result.thumbs[row] = _thumb(pixels)
    result.flags[row] = GOOD
    if counts.max(axis=1).min() == picture.height * picture.width:
        result.flags[row] |= BLANK
    elif reading.channels == 3 and _COLOUR.search(picture.form) and _is_grey(counts, pixels):
        result.flags[row] |= GREY


def _thumb(pixels: np.ndarray) -> np.ndarray:
    """Shrinks uint8 (H, W, C) to uint8 (16, 16): of RGB the luma, else the mean of the channels."""
    channels = pixels.shape[2]
    if channels == 1:  # a mean would make a float64 of each pixel
        pixels = pixels[:, :, 0]
    image = Image.fromarray(pixels if channels in (1, 3) else pixels.mean(axis=2).astype(np.uint8))
    return np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX, reducing_gap=2.0).convert("L"))


def _is_grey(counts: np.ndarray, pixels: np.ndarray) -> bool:
    return bool((counts == counts[0]).all() and (pixels == pixels[:, :, :1]).all())  # the former settles nearly all


def _note_values(result: ScanResult, stored: RawValues, form: str, reading: DecodeOptions) -> None:
    """Notes values that are not plain 8-bit, nor of PPM, which states its range itself; opacity has no range."""
    if kind_of_form(form) is None or form.startswith("PPM"):
        return
    values = stored.values if stored.values.ndim == 3 else stored.values[:, :, None]
    if stored.alpha and reading.channels in (1, 3):
        values = values[:, :, :-1]
    kind = Kind(values.dtype.newbyteorder("=").name, values.shape[2])
    result.spreads.setdefault(kind, Spread(kind.channels)).add(values)
