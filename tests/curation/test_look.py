from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from mpp.curation.scan import scan_chunk
from mpp.data.decoding import tiff
from mpp.data.settings import DecodeOptions
from mpp.data.sources.in_memory import ListSource
from tests.curation.made import RNG
from tests.data.zoo import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_file_is_looked_at_as_it_is_decoded(case: Case):
    part = scan_chunk(ListSource([case.make()]), case.reading, np.array([0]))
    assert [bad.kind for bad in part.bad] == ([case.kind] if case.kind else [])
    assert all(kind.dtype in form for kind in part.spreads for form in part.forms)
    if case.kind == "wrong channels":
        (held,) = part.channels
        assert held != case.reading.channels
        assert all(kind.channels == held for kind in part.spreads)


def test_values_are_decoded_once_and_lzw_never_by_imagecodecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whose decoder of LZW can crash the process."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    def counted(page: Any, data: bytes) -> np.ndarray:
        decoded.append(page)
        return right(page, data)

    decoded: list[Any] = []
    right = tiff._values
    values = RNG.integers(0, 4000, (40, 30, 5), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, compression="lzw", photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", never)
    monkeypatch.setattr(tiff, "_values", counted)
    part = scan_chunk(ListSource([(tmp_path / "a.tif").read_bytes()]), DecodeOptions(5), np.array([0]))
    assert part.bad == []
    assert len(decoded) == 1
    (found,) = part.spreads.items()
    assert found[0] == ("uint16", 5)
    np.testing.assert_array_equal(found[1].largest, values.max(axis=(0, 1)))


def test_opacity_has_no_range(tmp_path: Path):
    values = RNG.integers(0, 4000, (40, 30, 4), dtype=np.uint16)
    for extra in ("unassalpha", "assocalpha"):
        tifffile.imwrite(tmp_path / f"{extra}.tif", values, photometric="rgb", extrasamples=[extra])
    for data, reading, channels in (
        ((tmp_path / "unassalpha.tif").read_bytes(), DecodeOptions(), 3),
        ((tmp_path / "unassalpha.tif").read_bytes(), DecodeOptions(4), 4),
        (imagecodecs.png_encode(values), DecodeOptions(), 3),
    ):
        (kind,) = scan_chunk(ListSource([data]), reading, np.array([0])).spreads
        assert kind == ("uint16", channels)
