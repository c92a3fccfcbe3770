"""LZW of TIFF, which libtiff decodes, beside what tifffile wrote."""

import io
import itertools

import numpy as np
import pytest
import tifffile

from mpp.data.decoding import BadImage, decode
from mpp.data.decoding.tiff import _lzw
from mpp.data.settings import DecodeOptions
from tests.data.picture_files import tiff


@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 7}, {"tile": (16, 32)}], ids=["one strip", "strips", "tiles"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_lzw_gives_what_was_written(dtype, planar, layout):
    for photometric, channels in (("minisblack", 5), ("separated", 4)):
        image = (np.random.default_rng(0).random((37, 53, channels)) * 100).astype(dtype)
        if planar == "separate":
            image = np.ascontiguousarray(np.moveaxis(image, -1, 0))
        for order, big, predictor in itertools.product("<>", (False, True), (False, True)):
            options = {"byteorder": order, "bigtiff": big, "predictor": predictor, "planarconfig": planar, **layout}
            data = tiff(image, photometric, compression="lzw", **options)
            values = _lzw(tifffile.TiffFile(io.BytesIO(data)).pages[0], data)
            assert values.dtype == dtype
            np.testing.assert_array_equal(values, image)


def test_lzw_that_ends_too_early_is_refused(capfd):
    data = bytearray(tiff(np.random.default_rng(0).random((40, 50)).astype("float32"), compression="lzw"))
    tag = tifffile.TiffFile(io.BytesIO(data)).pages[0].tags[279]
    data[tag.valueoffset : tag.valueoffset + 4] = (tag.value[0] // 2).to_bytes(4, "little")
    with pytest.raises(BadImage):
        decode(bytes(data), DecodeOptions(1))
    assert capfd.readouterr() == ("", "")
