"""What decoding gives beside the files of the zoo (tests/data/test_zoo.py): sizes, forms, ranges, limits, arrays."""

import tracemalloc

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from mpp.data.decoding import BadImage, formats, open_picture, to_uint8
from mpp.data.settings import DecodeOptions
from tests.data.picture_files import exif, noise, npy, png, resized_jpeg, tiff


def decode(data, channels, **options):
    return formats.decode(data, DecodeOptions(channels, **options))


def test_the_size_and_a_region(quadrants, encode):
    """The size is known before the pixels, and upright; a region of anything but JPEG is exact."""
    for container in ("JPEG", "PNG", "WEBP", "TIFF"):
        picture = open_picture(encode(np.zeros((64, 48, 3), np.uint8), container, exif=exif(6)), DecodeOptions())
        assert (picture.height, picture.width) == (48, 64)
    picture = open_picture(encode(quadrants, "PNG"), DecodeOptions())
    assert picture.step(32, 48, (2, 2)) == 1
    np.testing.assert_array_equal(picture.region(1, 2, 20, 30, (2, 2)), quadrants[1:21, 2:32])
    np.testing.assert_array_equal(picture.pixels(), quadrants)  # may be asked again
    with pytest.raises(BadImage, match="cut off"):
        open_picture(encode(noise(), "PNG")[:1000], DecodeOptions()).pixels()
    picture = open_picture(tiff(noise(), "rgb", compression="lzw", extrasamples=()), DecodeOptions())
    np.testing.assert_array_equal(picture.pixels(), picture.region(0, 0, 64, 64))


def test_forms(quadrants, encode):
    grey = quadrants[..., 0]
    forms = {
        "JPEG": encode(quadrants, "JPEG"),
        "JPEG grey": encode(grey, "JPEG"),
        "JPEG CMYK": encode(Image.fromarray(quadrants).convert("CMYK"), "JPEG"),
        "PNG RGB": encode(quadrants, "PNG"),
        "GIF P": encode(Image.fromarray(quadrants).quantize(4), "GIF"),
        "TIFF 1 x uint16": encode(grey.astype(np.uint16), "TIFF"),
        "TIFF CMYK": tiff(quadrants[..., [0, 1, 2, 0]].astype(np.uint16), "separated"),
        "array uint8 x 3": quadrants,
        "array float32 x 1": grey.astype(np.float32),
    }
    assert {form: open_picture(data, DecodeOptions()).form for form, data in forms.items()} == {k: k for k in forms}


def test_values_are_scaled_by_the_formula():
    rng = np.random.default_rng(0)
    for dtype, low, high in (("uint8", 10, 200), ("uint16", 100, 3000), ("int32", -500, 900), ("float64", -1.5, 2.5)):
        image = rng.uniform(low - 20, high + 20, (40, 40, 2)).clip(0 if dtype[0] == "u" else None).astype(dtype)
        if dtype == "uint8":
            image = rng.integers(0, 256, (40, 40, 2), dtype=np.uint8)
        scaled = decode(image, 2, value_range=(low, high, low, 2 * high))
        for channel, end in enumerate((high, 2 * high)):
            exact = (image[..., channel].astype(float) - low) / (end - low) * 255
            assert np.abs(scaled[..., channel] - exact.clip(0, 255)).max() <= 0.5 + 1e-6


def test_images_of_too_many_bytes(monkeypatch):
    allowed = r"more than data.max_image_mb 700 allows"
    with pytest.raises(BadImage, match=rf"^2,500,000,000 pixels, 10,000.0 MB, {allowed}$"):
        decode(png(50_000, 50_000, b"\0" * 99), 3)
    with pytest.raises(BadImage, match=rf"^60000 x 60000 pixels, 14,400.0 MB, {allowed}$"):
        decode(resized_jpeg(60_000, 60_000), 3)
    # Pillow itself only warns from here on; it must neither warn nor be refused before its pixels are missing.
    with pytest.raises(BadImage, match=r"truncated|broken|incomplete|not enough"):
        decode(png(10_000, 10_000, b"\0" * 99), 3)
    # A limit above Pillow's own is the user's.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match=r"^10,000 pixels, 0\.0 MB"):
        decode(png(100, 100, b"\0" * 99), 3, max_bytes=8000)
    with pytest.raises(BadImage, match=r"truncated|broken|incomplete|not enough"):
        decode(png(100, 100, b"\0" * 99), 3, max_bytes=40_000)


def forms_of_every_decoder(quadrants, encode):
    """Files of 48 x 32 pixels, with the channels to ask for and the bytes that a pixel takes."""
    wide = quadrants.astype(np.uint16) << 8
    height, width, _ = quadrants.shape
    yield from ((encode(quadrants, form), 3, 4) for form in ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF"))
    yield imagecodecs.png_encode(wide), 3, 6
    yield f"P6 {width} {height} 65535\n".encode() + wide.astype(">u2").tobytes(), 3, 6
    for dtype in (np.uint16, np.float32, np.float64):
        yield tiff((quadrants > 99).astype(dtype), "rgb"), 3, 3 * dtype().itemsize
    yield tiff(np.zeros((5, height, width), dtype=np.float64), "minisblack"), 5, 40
    yield tiff(quadrants, "rgb", compression="jpeg"), 3, 4
    yield npy(quadrants / 255), 3, 24
    yield quadrants / 255, 3, 24  # an array
    yield quadrants[:, :, 0], 3, 4
    yield np.zeros((height, width, 9), dtype=np.uint8), 9, 9


def test_a_limit_in_bytes_reaches_every_decoder(quadrants, encode):
    for data, channels, bytes_a_pixel in forms_of_every_decoder(quadrants, encode):
        size = quadrants[:, :, 0].size * bytes_a_pixel
        with pytest.raises(BadImage, match=r"MB, more than data.max_image_mb \S+ allows$") as caught:
            decode(data, channels, max_bytes=size - 1)
        assert caught.value.kind == "too large"
        assert decode(data, channels, max_bytes=size).shape == (*quadrants.shape[:2], channels)


def test_scaling_takes_little_memory_of_its_own(monkeypatch, encode):
    """And gives the same some rows at a time."""
    values = np.random.default_rng(0).random((1000, 300, 4))
    cases = [
        (values, 4, {}),
        (values[:, :, :3], 1, {}),
        ((values * 1000).astype(np.int32), 4, {"value_range": (0, 999)}),
        (encode((values * 255).astype(np.uint8), "PNG"), 3, {}),  # transparent
    ]
    whole = [decode(each, channels, **options) for each, channels, options in cases]
    monkeypatch.setattr(to_uint8, "_BLOCK", 5000)
    for (each, channels, options), expected in zip(cases, whole, strict=True):
        tracemalloc.start()
        found = decode(each, channels, **options)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(found, expected)
        assert isinstance(each, bytes) or most < 2.5 * each.size


def test_arrays():
    image = noise((5, 4, 3))
    np.testing.assert_array_equal(decode(image, 3), image)
    np.testing.assert_array_equal(decode(image, 1)[..., 0], np.asarray(Image.fromarray(image).convert("L")))
    np.testing.assert_array_equal(decode(image[..., 0], 3), np.repeat(image[..., :1], 3, axis=2))
    np.testing.assert_array_equal(decode(image[..., :1], 1), image[..., :1])
    assert decode(np.zeros((5, 4, 7), dtype=np.uint8), 7).shape == (5, 4, 7)
    image.flags.writeable = False
    turned = decode(image.transpose(1, 0, 2), 3)
    assert turned.flags.writeable
    assert turned.flags.c_contiguous


def test_unfit_channels_and_arrays(quadrants, encode):
    for data, channels, reason in (
        (np.zeros((5, 4, 4), dtype=np.uint8), 3, r"has 4 channels, the model takes 3 \(model.in_chans\)"),
        (encode(quadrants), 5, r"has 3 channels, the model takes 5 \(model.in_chans\)"),
        (np.array([[0, 7]], dtype=np.float32), 3, r"from 0 to 7; floating point is taken as 0 to 1: state data.value_"),
        (np.zeros((5, 4), "datetime64[s]"), 3, "expected numbers of shape"),
        (np.zeros(5, dtype=np.uint8), 3, "expected numbers of shape"),
        (np.zeros((0, 4, 3), dtype=np.uint8), 3, "expected numbers of shape"),
    ):
        with pytest.raises(BadImage, match=reason):
            decode(data, channels)
