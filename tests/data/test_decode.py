import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mpp.data.decode import MAX_PIXELS, BadImage, decode

CORNERS = ((2, 2), (2, -3), (-3, 2), (-3, -3))


def corners(image):
    return np.array([image[place] for place in CORNERS], dtype=int)


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("container", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 95}),
        ("JPEG", "RGB", {"quality": 95, "progressive": True}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("BMP", "RGB", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("TIFF", "RGB", {}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
    ],
)
def test_containers_and_modes(container, mode, options, quadrants, encode):
    data = encode(Image.fromarray(quadrants).convert(mode), container, **options)
    pixels = decode(data, 3)
    assert pixels.dtype == np.uint8
    assert pixels.shape == quadrants.shape
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_allclose(corners(pixels), corners(quadrants), atol=6)
    grey = decode(data, 1)
    assert grey.shape == (32, 48, 1)
    np.testing.assert_allclose(
        corners(grey)[:, 0], corners(np.asarray(opened(data).convert("RGB").convert("L"))), atol=3
    )


def test_jpeg_equals_pillow(shared):
    for path in sorted(shared("data/photos").glob("*.jpg"))[:8]:
        data = path.read_bytes()
        reference = np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB")).astype(int)
        assert np.abs(decode(data, 3) - reference).max() <= 2
        grey = opened(data)
        grey.draft("L", grey.size)  # the file's own luma, as it is before clipped colours are made of it
        reference = np.asarray(ImageOps.exif_transpose(grey)).astype(int)
        assert np.abs(decode(data, 1)[..., 0] - reference).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, container, quadrants, encode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(quadrants, container, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB"))
    pixels = decode(data, 3)
    assert pixels.shape == (expected.shape if orientation else None)
    np.testing.assert_allclose(corners(pixels), corners(expected), atol=8)
    assert pixels.shape[:2] == ((48, 32) if orientation >= 5 else (32, 48))


def test_damaged_exif_is_ignored(quadrants, encode):
    data = encode(quadrants, "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30)
    np.testing.assert_allclose(corners(decode(data, 3)), corners(quadrants), atol=8)


@pytest.mark.parametrize("container", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composited_on_white(container, encode):
    image = np.zeros((6, 6, 4), dtype=np.uint8)
    image[:, 2:4] = (200, 0, 0, 128)
    image[:, 4:] = (0, 0, 200, 255)
    options = {"lossless": True, "exact": True} if container == "WEBP" else {}
    pixels = decode(encode(image, container, **options), 3)[3]
    assert pixels[0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(pixels[2], [227, 127, 127], atol=1)
    assert pixels[5].tolist() == [0, 0, 200]


def test_transparent_palette_grey_and_colour_key(encode):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 90, 80, 70])
    palette.putpixel((0, 0), 1)
    pixels = decode(encode(palette, "PNG", transparency=0), 3)
    assert pixels[0, 0].tolist() == [90, 80, 70]
    assert pixels[2, 2].tolist() == [255, 255, 255]
    grey = Image.new("LA", (4, 4), (50, 0))
    grey.putpixel((1, 1), (50, 255))
    assert decode(encode(grey, "PNG"), 1)[..., 0].tolist()[1] == [255, 50, 255, 255]
    key = Image.new("RGB", (4, 4), (1, 2, 3))
    key.putpixel((0, 0), (9, 9, 9))
    pixels = decode(encode(key, "PNG", transparency=(1, 2, 3)), 3)
    assert [pixels[0, 0, 0], pixels[3, 3, 0]] == [9, 255]


def test_one_bit(encode):
    image = Image.new("1", (8, 8))
    image.putpixel((0, 0), 1)
    for container in ("PNG", "TIFF", "PPM"):
        pixels = decode(encode(image, container), 3)
        assert [pixels[0, 0].tolist(), pixels[7, 7].tolist()] == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("container", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_by_their_range(container, encode):
    wide = np.array([[0, 128, 129, 257], [32767, 32768, 65534, 65535]], dtype=np.uint16)
    pixels = decode(encode(wide, container), 1)[..., 0]
    np.testing.assert_array_equal(pixels, np.rint(wide / 257).astype(np.uint8))
    assert decode(encode(wide, container), 3).shape == (2, 4, 3)


def test_big_endian_sixteen_bits(encode):
    wide = np.array([[0, 65535], [257, 25700]], dtype=np.uint16)
    image = Image.frombytes("I;16B", (2, 2), wide.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(encode(image, "TIFF"), 1)[..., 0], wide // 257)


@pytest.mark.parametrize("container", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(container, encode):
    first, second = Image.new("RGB", (9, 7), (250, 0, 0)), Image.new("RGB", (9, 7), (0, 0, 250))
    options = {"lossless": True} if container == "WEBP" else {}
    pixels = decode(encode(first, container, save_all=True, append_images=[second], **options), 3)
    assert pixels.shape == (7, 9, 3)
    np.testing.assert_allclose(pixels[3, 3], [250, 0, 0], atol=2)


def test_one_pixel(encode):
    assert decode(encode(np.full((1, 1, 3), 77, dtype=np.uint8)), 3).tolist() == [[[77, 77, 77]]]
    assert decode(encode(np.full((1, 1, 3), 77, dtype=np.uint8), "JPEG"), 3).shape == (1, 1, 3)


@pytest.mark.parametrize("container", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(container, share, encode):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, container)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * share)], 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image, " * 20, "not an image in a known format"),
        (b"\xff\xd8\xff\xe0 no more of a JPEG", "Truncated File Read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n", "not an image in a known format"),
        (b"\0" * 500, "not an image in a known format"),
    ],
)
def test_not_an_image(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, 3)


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_decompression_bombs(quadrants, encode):
    with pytest.raises(BadImage, match="bomb"):
        decode(png_header(50_000, 50_000), 3)
    data = bytearray(encode(quadrants, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadImage, match="bomb"):
        decode(bytes(data), 3)
    # Pillow itself only warns from here on; it must neither warn nor be refused before its pixels are missing.
    side = int(MAX_PIXELS**0.5) - 3000
    with pytest.raises(BadImage, match=r"truncated|broken|incomplete|not enough"):
        decode(png_header(side, side), 3)


def test_float_pixels_have_no_range(encode):
    with pytest.raises(BadImage, match="no fixed range"):
        decode(encode(Image.new("F", (4, 4)), "TIFF"), 3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), draws=st.data())
def test_damaged_bytes_give_pixels_or_bad_image(choice, draws, quadrants, encode):
    data = bytearray(encode(quadrants, choice))
    for _ in range(draws.draw(st.integers(1, 4))):
        data[draws.draw(st.integers(0, len(data) - 1))] = draws.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode(bytes(data), 3)
        except BadImage as error:
            text = str(error)
            assert text == " ".join(text.split()) != ""
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (3,)


def test_arrays():
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
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
    with pytest.raises(BadImage, match=r"has 4 channels, the model takes 3 \(model.in_chans\)"):
        decode(np.zeros((5, 4, 4), dtype=np.uint8), 3)
    with pytest.raises(BadImage, match=r"gives 1 or 3 channels, the model takes 5 \(model.in_chans\)"):
        decode(encode(quadrants), 5)
    for unfit in (np.zeros((5, 4), dtype=np.float32), np.zeros(5, dtype=np.uint8), np.zeros((0, 4, 3), dtype=np.uint8)):
        with pytest.raises(BadImage, match="expected uint8"):
            decode(unfit, 3)
