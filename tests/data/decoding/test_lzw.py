import io
import itertools
from typing import Any

import numpy as np
import pytest
import tifffile

from mpp.data.decoding.lzw import lzw_values


def page_of(data: bytes) -> tifffile.TiffPage:
    page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    assert isinstance(page, tifffile.TiffPage)
    return page


@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 7}, {"tile": (16, 32)}], ids=["one strip", "strips", "tiles"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_equals_tifffile(dtype, planar, layout):
    image = (np.random.default_rng(0).random((37, 53, 5)) * 100).astype(dtype)
    if planar == "separate":
        image = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    for order, big, predictor in itertools.product("<>", (False, True), (False, True)):
        buffer = io.BytesIO()
        options: dict[str, Any] = {"byteorder": order, "bigtiff": big, "predictor": predictor, **layout}
        tifffile.imwrite(buffer, image, photometric="minisblack", planarconfig=planar, compression="lzw", **options)
        values = lzw_values(page_of(buffer.getvalue()), buffer.getvalue())
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, image)


def test_strips_beyond_one_group(monkeypatch):
    monkeypatch.setattr("mpp.data.decoding.lzw._GROUP", 2000)
    image = np.random.default_rng(0).integers(0, 4000, (40, 50, 3), dtype=np.uint16)
    layouts: tuple[dict[str, Any], ...] = {"rowsperstrip": 3}, {"tile": (16, 16)}
    for layout in layouts:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, image, photometric="rgb", compression="lzw", **layout)
        np.testing.assert_array_equal(lzw_values(page_of(buffer.getvalue()), buffer.getvalue()), image)


def test_a_stream_that_ends_too_early_is_refused(capfd):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.random.default_rng(0).random((40, 50)).astype("float32"), compression="lzw")
    data, page = buffer.getvalue(), page_of(buffer.getvalue())
    page.databytecounts = tuple(count // 2 for count in page.databytecounts)
    with pytest.raises(OSError, match="decoder error"):
        lzw_values(page, data)
    assert capfd.readouterr() == ("", "")
