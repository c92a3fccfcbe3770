"""DICOM against pydicom's own tables and windows, on the files that pydicom brings for its tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.data.decoding import BadImage, decode, open_picture
from mpp.data.settings import DecodeOptions
from tests.data.picture_files import as_dicom

pydicom = pytest.importorskip("pydicom")
GREY = DecodeOptions(1)
FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def read(name: str) -> bytes:
    return (FILES / name).read_bytes()


def eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(np.rint((values.astype(np.float64) - low) * 255 / (high - low)), 0, 255).astype(np.uint8)


VALUES = np.arange(0, 4096, 16).reshape(16, 16).astype(np.uint16)
STEP = {"RescaleSlope": "2", "RescaleIntercept": "-1024"}


@pytest.mark.parametrize(
    ("tags", "value_range", "expected"),
    [
        ({}, (), eight_bits(VALUES, 0, 4095)),
        ({"BitsStored": 16}, (), eight_bits(VALUES, 0, 65535)),
        ({"PhotometricInterpretation": "MONOCHROME1"}, (), 255 - eight_bits(VALUES, 0, 4095)),
        (STEP, (), eight_bits(VALUES, 0, 4095)),
        (STEP, (-1000.0, 1000.0), eight_bits(2 * VALUES.astype(int) - 1024, -1000, 1000)),
        # PS3.3 C.11.2.1.2.1: black is centre - 0.5 - (width - 1) / 2, white so much above it.
        ({"WindowCenter": 1000, "WindowWidth": 401}, (), eight_bits(VALUES, 799.5, 1199.5)),
        (
            STEP | {"WindowCenter": [40, 7], "WindowWidth": [401, 9]},
            (),
            eight_bits(2 * VALUES.astype(int), 863.5, 1263.5),
        ),
        (
            {"WindowCenter": 1000, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"},
            (),
            eight_bits(VALUES, 800, 1200),
        ),
        (
            {"WindowCenter": 1000, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"},
            (),
            eight_bits(1 / (1 + np.exp(-4 * (VALUES.astype(float) - 1000) / 400)), 0, 1),
        ),
        ({"WindowCenter": 1000, "WindowWidth": 401}, (0.0, 4095.0), eight_bits(VALUES, 0, 4095)),
        (
            {"PixelRepresentation": 1, "BitsStored": 16, "WindowCenter": 1000, "WindowWidth": 401},
            (),
            eight_bits(VALUES, 799.5, 1199.5),
        ),
    ],
)
def test_grey_values_go_through_rescale_and_window(
    tags: dict[str, Any], value_range: tuple[float, ...], expected: np.ndarray
) -> None:
    found = decode(as_dicom(VALUES, **tags), DecodeOptions(1, value_range))[:, :, 0]
    assert np.abs(found.astype(int) - expected).max() <= (1 if "VOILUTFunction" in tags else 0)


def test_a_table_is_applied() -> None:
    def lut(first: int, bits: int, values: list[int]) -> Any:
        table = pydicom.Dataset()
        table.add_new("LUTDescriptor", "US", [len(values), first, bits])
        table.add_new("LUTData", "US", values)
        return [table]

    voi, modality = lut(0, 8, [0, 100, 200, 255]), lut(0, 8, [3, 2, 1, 0])
    values = np.array([[0, 1], [2, 3]], dtype=np.uint16)
    assert decode(as_dicom(values, VOILUTSequence=voi), GREY).reshape(-1).tolist() == [0, 100, 200, 255]
    both = as_dicom(values, VOILUTSequence=voi, ModalityLUTSequence=modality)
    assert decode(both, GREY).reshape(-1).tolist() == [255, 200, 100, 0]


@pytest.mark.parametrize("name", ["examples_ybr_color.dcm", "SC_ybr_full_422_uncompressed.dcm", "examples_jpeg2k.dcm"])
def test_colours_are_rgb(name: str) -> None:
    assert np.array_equal(decode(read(name), DecodeOptions()), pydicom.pixels.pixel_array(FILES / name, index=0))
    other = {"SC_ybr_full_422_uncompressed.dcm": "SC_rgb_rle.dcm"}.get(name)
    if other:  # the same picture, in RGB
        assert np.abs(decode(read(name), DecodeOptions()).astype(int) - decode(read(other), DecodeOptions())).mean() < 2


def test_a_palette_is_colours() -> None:
    image = pydicom.dcmread(FILES / "examples_palette.dcm")
    colours = pydicom.pixels.apply_color_lut(image.pixel_array, image)
    assert np.array_equal(decode(read("examples_palette.dcm"), DecodeOptions()), eight_bits(colours, 0, 65535))


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless"])
def test_transfer_syntaxes_give_the_same_pixels(name: str) -> None:
    if "jp2k" in name:
        pytest.importorskip("openjpeg")
    assert np.array_equal(decode(read(f"{name}.dcm"), GREY), decode(read("MR_small.dcm"), GREY))


def test_the_window_of_an_enhanced_frame_is_found() -> None:
    inner = pydicom.Dataset()
    inner.WindowCenter, inner.WindowWidth = 1000, 401
    group = pydicom.Dataset()
    group.FrameVOILUTSequence = [inner]
    found = decode(as_dicom(VALUES, SharedFunctionalGroupsSequence=[group]), GREY)
    assert np.array_equal(found[:, :, 0], eight_bits(VALUES, 799.5, 1199.5))


BAD = {
    "CT_small.dcm": ("no range", "state data.value_range"),  # signed, without a window
    "MR_truncated.dcm": ("damaged", "less than expected"),
    "test-SR.dcm": ("not an image", "a DICOM file without pixels .SR."),
    "no_meta.dcm": ("not an image", "known format"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_shown_is_a_bad_image(name: str) -> None:
    kind, reason = BAD[name]
    with pytest.raises(BadImage, match=reason) as error:
        decode(read(name), GREY)
    assert (error.value.kind, "\n" in str(error.value)) == (kind, False)


def test_a_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(BadImage, match="max_image_mb") as error:
        open_picture(as_dicom(VALUES, Rows=60000, Columns=60000), GREY)
    assert error.value.kind == "too large"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_dicom(VALUES)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(BadImage, match=r"needs the package pydicom: .*pip install"):
        decode(data, GREY)
