import os
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from mpp.curation.scan import THUMB, scan, scan_chunk
from mpp.curation.value_ranges import Kind
from mpp.data.decoding import tiff
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.sources.in_memory import ListSource
from mpp.errors import RunError
from tests.curation.made import RNG, noise, save
from tests.data.zoo import CASES, Case


@pytest.mark.slow
def test_any_number_of_workers_says_the_same(check: Callable[..., Any], tmp_path: Path):
    data = tmp_path / "data"
    for number in range(70):
        save(data / ("a", "b")[number % 2] / f"{number}.png", noise(36, 40 + number % 7))
    (data / "a" / "x.png").write_bytes(b"")
    tifffile.imwrite(data / "b" / "y.tif", RNG.integers(0, 300, (40, 40), dtype=np.uint16))

    def found(workers: int) -> Any:
        code, lines, report = check(data, "--workers", str(workers))
        del report["rates"]
        tables = [(tmp_path / "out" / name).read_bytes() for name in ("bad_files.csv", "duplicates.csv")]
        return code, [line for line in lines if "images/s" not in line and "crops/s" not in line], report, tables

    assert found(0) == found(2)


class Made(Source):
    """16-bit images made as they are read, with no memory of their own; `act` at one of them."""

    def __init__(self, length: int, deadly: int = -1, act: Callable[[], object] = lambda: None) -> None:
        super().__init__("made")
        self.length, self.deadly, self.act = length, deadly, act

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> np.ndarray:
        if index == self.deadly:
            self.act()
        return np.full((128, 128), index % 4096, dtype=np.uint16)  # as many values as are kept of an image at most


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_flat(workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mpp.curation.value_ranges._KEPT", 2**18)

    def kept(length: int) -> int:
        tracemalloc.start()
        tally, _ = scan(Made(length), DecodeOptions(1), np.arange(length), workers)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert tally.spreads[Kind("uint16", 1)].images == length
        return held

    kept(64)
    assert kept(600) - kept(100) < 2**19


@pytest.mark.slow
def test_memory_grows_by_a_few_bytes_an_image():
    def peak(length: int) -> int:
        tracemalloc.start()
        scan(Made(length), DecodeOptions(1), np.arange(length), 0)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(4_000) - peak(1_000) < 3_000 * (THUMB**2 + 60)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed, .* memory: take fewer --workers \(2 now\)"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"crashed \(SIGSEGV\)"),
        (lambda: {}["what"], r"failed: KeyError: 'what' \(test_scan.py, line \d+\); with --workers 0"),
    ],
    ids=["killed", "crashed", "bug"],
)
def test_a_process_that_dies_or_fails_is_one_clear_error(act: Callable[[], object], said: str):
    with pytest.raises(RunError, match=f"^a process {said}"):
        scan(Made(200, 70, act), DecodeOptions(1), np.arange(200), 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_file_is_looked_at_as_it_is_decoded(case: Case):
    part = scan_chunk(ListSource([case.data]), case.reading, np.array([0]))
    assert [bad.kind for bad in part.bad] == ([case.kind] if case.kind else [])
    assert all(kind.dtype in form for kind in part.spreads for form in part.forms)
    if case.kind == "wrong channels":
        (held,) = part.channels
        assert held != case.reading.channels
        assert all(kind.channels == held for kind in part.spreads)


def test_values_are_decoded_once_and_lzw_never_by_imagecodecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whose decoder of LZW can crash the process."""
    decoded, right = [], tiff._values
    values = RNG.integers(0, 4000, (40, 30, 5), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, compression="lzw", photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_, **__: pytest.fail("by imagecodecs"))
    monkeypatch.setattr(tiff, "_values", lambda page, data: (decoded.append(page), right(page, data))[1])
    part = scan_chunk(ListSource([(tmp_path / "a.tif").read_bytes()]), DecodeOptions(5), np.array([0]))
    assert (part.bad, len(decoded)) == ([], 1)
    ((kind, found),) = part.spreads.items()
    assert kind == ("uint16", 5)
    np.testing.assert_array_equal(found.largest, values.max(axis=(0, 1)))


def test_opacity_has_no_range(tmp_path: Path):
    values = RNG.integers(0, 4000, (40, 30, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    tiff, png = (tmp_path / "a.tif").read_bytes(), imagecodecs.png_encode(values)
    for data, reading, channels in ((tiff, DecodeOptions(), 3), (tiff, DecodeOptions(4), 4), (png, DecodeOptions(), 3)):
        (kind,) = scan_chunk(ListSource([data]), reading, np.array([0])).spreads
        assert kind == ("uint16", channels)
