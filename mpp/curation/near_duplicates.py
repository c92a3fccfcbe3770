"""Images of different splits that are nearly the same: resized, compressed again, a little brighter or less sharp.

    thumbnail 16 x 16 (scan.py) -> perceptual hash of 64 bits -> pairs that share 16 of them, give or take one
    -> those that differ in `most` bits or fewer -> those whose thumbnails correlate

A pair that differs in at most seven bits has one of four bands of 16 bits with at most one of them, so that none is
missed, and few others are looked at. Source: C. Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010 (pHash); M. Norouzi et al., "Fast search in Hamming space with multi-index hashing", CVPR 2012.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt64
from scipy import fft

from mpp.curation.scan import ScanResult
from mpp.data.sources.base import Source
from mpp.data.sources.names import Split, printable
from mpp.downstream.contact_sheet import Tile

HEAD = ("split", "index", "class", "file", "of_split", "of_index", "of_class", "of_file", "bits")
_BANDS, _WIDTH = 4, 16
_LOWEST = 8  # frequencies to either side
_CORRELATED = 0.98
_PAIRS = 2**14  # or thumbnails, looked at together; of frames of one scene, all pairs that there are correlate


@dataclass(frozen=True)
class Near:
    """One image of a pair, and its nearest in an earlier split."""

    split: Split
    index: int
    of_split: Split
    of_index: int
    bits: int
    """How many of the 64 differ."""

    @property
    def sides(self) -> tuple[tuple[Split, int], tuple[Split, int]]:
        """Split and index of both images."""
        return (self.split, self.index), (self.of_split, self.of_index)


def near_duplicates(splits: Mapping[Split, tuple[Source, ScanResult]], most: int) -> list[Near]:
    """Pairs each image of a later split with its nearest in an earlier one, if no more than `most` bits differ.

    Images of one colour throughout, and those with equal pixels, which `Duplicates` has, are left out.
    """
    found: list[Near] = []
    parts: dict[Split, _Part] = {}
    if len(splits) > 1:
        parts = {split: _Part(result) for split, (_, result) in splits.items()}
    pairs: list[tuple[Split, Split]] = [(later, earlier) for earlier, later in itertools.combinations(parts, 2)]
    for later, earlier in pairs:
        here, there = parts[later], parts[earlier]
        rows, others, bits = _nearest(here, there, most)
        chosen = zip(here.indices[rows], there.indices[others], bits, strict=True)
        found += [Near(later, int(index), earlier, int(of), int(far)) for index, of, far in chosen]
    return found


class _Part:
    """The images of a split that can be compared: hashes, standardised thumbnails, hashes of the pixels."""

    def __init__(self, result: ScanResult) -> None:
        usable = result.good.copy()
        usable[result.blank] = False
        self.indices, self.pixels = result.indices[usable], result.pixels[usable]
        self.thumbs = result.thumbs[usable]
        parts = np.split(self.thumbs, range(_PAIRS, len(self.thumbs), _PAIRS))
        self.hashes = np.concatenate([perceptual_hashes(part) for part in parts])


def perceptual_hashes(thumbs: UInt8[np.ndarray, "n 16 16"]) -> UInt64[np.ndarray, " n"]:
    """Hashes thumbnails: bit by bit, whether each of the 64 lowest frequencies is above their median."""
    waves: Any = fft.dctn(thumbs.astype(np.float32), axes=(1, 2))
    waves = waves[:, :_LOWEST, :_LOWEST].reshape(-1, _LOWEST**2)
    waves[:, 0] = 0  # the brightness
    bits = waves > np.median(waves, axis=1, keepdims=True)
    # Neighbouring frequencies in different bands, so that alike images do not share whole bands.
    bits = bits.reshape(-1, _WIDTH, _BANDS).transpose(0, 2, 1).reshape(-1, 64)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _nearest(here: _Part, there: _Part, most: int) -> tuple[Int64[np.ndarray, " p"], ...]:
    """Rows that have a near one, its row in the other split (the first of equally near), and how many bits differ."""
    others_number = max(1, len(there.hashes))
    none = (most + 1) * others_number
    best = np.full(len(here.hashes), none, dtype=np.int64)  # of each row, bits * others_number + row on the other side
    probes = np.array([0, *(1 << bit for bit in range(_WIDTH))], dtype=np.uint16)
    for band in range(_BANDS):
        keys, others = (part.hashes.view(np.uint16).reshape(-1, _BANDS)[:, band] for part in (here, there))
        order = np.argsort(others, kind="stable")
        for probe in probes if most >= _BANDS else probes[:1]:
            starts, ends = (np.searchsorted(others[order], keys ^ probe, side) for side in ("left", "right"))
            for rows, places in _ranges(starts, ends - starts):
                found = order[places]
                bits = np.bitwise_count(here.hashes[rows] ^ there.hashes[found]).astype(np.int64)
                far = bits * others_number + found
                nearer = (far < best[rows]) & (here.pixels[rows] != there.pixels[found])
                rows, found, far = rows[nearer], found[nearer], far[nearer]
                alike = _correlation(here.thumbs[rows], there.thumbs[found]) >= _CORRELATED
                np.minimum.at(best, rows[alike], far[alike])
    rows = np.flatnonzero(best < none)
    bits, found = np.divmod(best[rows], others_number)
    return rows, found, bits


def _ranges(starts: np.ndarray, counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows, and the places from start on of each, at most _PAIRS pairs at a time."""
    ends = np.cumsum(counts)
    for first in range(0, int(ends[-1]) if len(ends) else 0, _PAIRS):
        pairs = np.arange(first, min(first + _PAIRS, int(ends[-1])))
        rows = np.searchsorted(ends, pairs, side="right")
        yield rows, starts[rows] + pairs - (ends[rows] - counts[rows])


def _correlation(some: UInt8[np.ndarray, "p 16 16"], others: UInt8[np.ndarray, "p 16 16"]) -> Float32[np.ndarray, " p"]:
    """Pearson's correlation of each pair; 0 where one of them is of one grey."""
    one, other = (values.reshape(-1, 256).astype(np.float32) for values in (some, others))
    one, other = (values - values.mean(axis=1, keepdims=True) for values in (one, other))
    scale = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return (one * other).sum(axis=1) / np.where(scale > 0, scale, np.float32(np.inf))


def rows(found: list[Near], sources: Mapping[Split, Source]) -> Iterator[tuple[int | str, ...]]:
    """HEAD, and a row for each pair."""
    yield HEAD
    for near in found:
        cells = [(split, i, _class(sources[split], i), sources[split].location(i)) for split, i in near.sides]
        yield *cells[0], *cells[1], near.bits


def shown(near: Near, sources: Mapping[Split, Source]) -> str:
    """A pair in one line: `test/1.png of test ~ train/7.png of train`."""
    return " ~ ".join(f"{printable(sources[split].location(index))} of {split}" for split, index in near.sides)


def tiles(found: list[Near], sources: Mapping[Split, Source]) -> list[Tile]:
    """Both images of each pair, for a sheet."""
    sides = (side for near in found for side in near.sides)
    return [Tile(sources[split], index, f"{split} {_class(sources[split], index)}".rstrip()) for split, index in sides]


def _class(source: Source, index: int) -> str:
    label = source.label(index)
    return "" if label is None or not source.classes else source.classes[label]
