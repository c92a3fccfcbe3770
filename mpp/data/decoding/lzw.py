"""LZW of TIFF by the libtiff in Pillow's wheels, which bears damage; imagecodecs' own decoder can crash the process."""

import io
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mpp.system.process import silence_libtiff

LZW = 5
_GROUP = 2**26  # bytes decoded at once; Pillow refuses more than about 2**28
_LONG = 4


def lzw_values(page: Any, data: bytes) -> np.ndarray:
    """What tifffile's `page.asarray()` would give.

    Raises:
        OSError: damaged or too short.
    """
    result = np.empty(page.shaped, page.dtype)  # plane, depth, height, width, channel
    segments = _segments(page, data)
    # From here on tifffile takes the decoded bytes for an uncompressed page: it swaps bytes, unpacks bits, undoes the
    # predictor.
    page.compression, page.fillorder = 1, 1
    for index, segment in enumerate(segments):
        values, (plane, _, top, left, _), _ = page.decode(segment, index)
        part = result[plane, 0, top : top + values.shape[1], left : left + values.shape[2]]
        part[:] = values[0, : part.shape[0], : part.shape[1]]
    return result.reshape(page.shape)


def _segments(page: Any, data: bytes) -> list[bytes]:
    """Each strip or tile, decoded. All but the last strip of a plane are of one size."""
    contiguous = page.samplesperpixel if page.planarconfig == 1 else 1
    height = page.imagelength
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    rows = rows if page.is_tiled else min(rows, height)
    width = math.ceil(columns * contiguous * page.bitspersample / 8)
    starts, counts = page.dataoffsets, page.databytecounts
    of_plane = len(starts) if page.is_tiled else math.ceil(height / rows)
    at_once = max(1, _GROUP // (rows * width))
    decoded: list[bytes] = []
    for plane in range(0, len(starts), of_plane):
        for first in range(plane, plane + of_plane, at_once):
            last = min(first + at_once, plane + of_plane)
            high = rows * (last - first)
            if not page.is_tiled:
                high = min(high, height - rows * (first - plane))
            pixels = _grey(data, starts[first:last], counts[first:last], high, width, rows, page.fillorder)
            decoded += [pixels[top : top + rows].tobytes() for top in range(0, high, rows)]
    return decoded


def _grey(
    data: bytes, starts: Sequence[int], counts: Sequence[int], height: int, width: int, rows: int, fillorder: int
) -> np.ndarray:
    """uint8 (height, width): strips of so many rows, as libtiff reads them from a grey file with the same bytes.

    The file is the old one behind another header, with a directory at its end.
    """
    place = len(data) + len(data) % 2
    entries = {256: width, 257: height, 258: 8, 259: LZW, 262: 1, 266: fillorder, 277: 1, 278: rows}
    behind = place + 2 + 12 * (len(entries) + 2) + 4
    many = len(starts) > 1
    rest = struct.pack(f"<{2 * len(starts)}I", *starts, *counts) if many else b""
    lists = {273: behind if many else starts[0], 279: behind + 4 * len(starts) if many else counts[0]}
    tags = b"".join(
        struct.pack("<HHII", tag, _LONG, len(starts) if tag in lists else 1, value)
        for tag, value in sorted((entries | lists).items())
    )
    directory = struct.pack("<H", len(entries) + 2) + tags + bytes(4) + rest
    header = b"II*\0" + struct.pack("<I", place)
    file = b"".join((header, memoryview(data)[8:], bytes(len(data) % 2), directory))
    # libtiff writes of damage to the terminal by itself; what is wrong becomes a BadImage.
    silence_libtiff()
    with Image.open(io.BytesIO(file), formats=("TIFF",)) as image:
        return np.asarray(image)
