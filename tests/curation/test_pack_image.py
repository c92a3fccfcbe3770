"""What becomes of each image that is packed."""

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.config import parse
from mpp.data.decoding import decode
from mpp.data.settings import DecodeOptions
from mpp.data.sources.opening import open_source
from mpp.pretraining.settings import PretrainConfig
from tests.curation.made import each_alike, manifest, members, noise, pack, shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def opened(data: bytes) -> np.ndarray:
    """The pixels in a PNG, or an .npy."""
    return np.load(io.BytesIO(data)) if data.startswith(b"\x93NUMPY") else np.asarray(Image.open(io.BytesIO(data)))


def test_extensions_are_by_content(folder: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    (folder / "a.jpg").write_bytes(encode(noise(5, 5, seed=0), "PNG"))
    (folder / "b.png").write_bytes(encode(noise(5, 5, seed=0), "JPEG"))
    np.save(folder / "c.npy", noise(5, 5, seed=0))
    assert pack(folder, tmp_path / "out", "--no-shuffle") == 0
    assert list(members(tmp_path / "out")) == ["000000000.png", "000000001.jpg", "000000002.npy"]
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_resizing_is_pillows_and_never_enlarges(folder: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    small = encode(noise(20, 90, seed=0), "PNG")
    (folder / "0.png").write_bytes(small)
    (folder / "1.png").write_bytes(encode(noise(50, 70, seed=0)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (folder / "2.jpg").write_bytes(encode(noise(60, 81, seed=0), "JPEG", exif=exif))
    assert pack(folder, tmp_path / "out", "--resize", "24", "--no-shuffle") == 0
    held = members(tmp_path / "out")
    assert list(held) == ["000000000.png", "000000001.png", "000000002.jpg"]
    assert held["000000000.png"] == small
    expected = Image.fromarray(noise(50, 70, seed=0)).resize((34, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(opened(held["000000001.png"]), np.asarray(expected))
    turned = Image.fromarray(decode((folder / "2.jpg").read_bytes(), DecodeOptions()))
    assert turned.size == (60, 81)
    jpeg = encode(turned.resize((24, 32), Image.Resampling.BICUBIC), "JPEG", quality=92)
    assert held["000000002.jpg"] == jpeg
    assert manifest(tmp_path / "out")["sizes"]["height"] == {"min": 20, "median": 24, "max": 32}
    values = noise(40, 60, 5, seed=0)
    np.save(tmp_path / "a.npy", values[None])
    assert pack(f"array:{tmp_path / 'a.npy'}", tmp_path / "b", "--in-chans", "5", "--resize", "20") == 0
    (data,) = members(tmp_path / "b").values()
    planes = [Image.fromarray(values[:, :, channel].copy()) for channel in range(5)]
    expected = np.stack([np.asarray(plane.resize((30, 20), Image.Resampling.BICUBIC)) for plane in planes], axis=2)
    np.testing.assert_array_equal(opened(data), expected)


@pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_encoding_anew(form: str, extension: str, images: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    assert pack(images, tmp_path / "out", "--encode", form, "--quality", "80", "--no-shuffle") == 0
    before, after = open_source(f"folder:{images}"), open_source(shards(tmp_path / "out"))
    assert {name.partition(".")[2] for name in members(tmp_path / "out")} == {extension, "cls"}
    options = {} if form == "png" else {"quality": 80}
    for index in range(40):
        pixels = decode(before.read(index)[0], DecodeOptions())
        assert after.read(index)[0] == encode(pixels, form, **options)
    for axis, name in enumerate(("height", "width")):
        sides = [decode(before.read(index)[0], DecodeOptions()).shape[axis] for index in range(40)]
        expected = {"min": min(sides), "median": np.median(sides), "max": max(sides)}
        assert manifest(tmp_path / "out")["sizes"][name] == expected


@pytest.mark.parametrize(
    ("shape", "dtype", "extension"),
    [((6, 7, 3), "uint8", "png"), ((6, 7), "uint8", "png"), ((6, 7, 5), "uint8", "npy"), ((6, 7, 3), "uint16", "npy")],
)
def test_arrays_keep_their_values(shape: tuple[int, ...], dtype: str, extension: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (4, *shape)).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    channels = shape[2] if len(shape) == 3 else 1
    source = f"array:{tmp_path / 'a.npy'}"
    assert pack(source, tmp_path / "out", "--no-shuffle", "--in-chans", str(channels)) == 0
    for image, (name, data) in zip(values, members(tmp_path / "out").items(), strict=True):
        assert name.endswith(extension)
        np.testing.assert_array_equal(opened(data), image)


def test_a_stated_range_is_used_up_once(folder: Path, tmp_path: Path) -> None:
    """With a range, small images are converted, too, for one setting must then read all of them."""
    values = np.random.default_rng(0).integers(0, 4096, (40, 40, 3)).astype(np.uint16)
    np.save(folder / "0.npy", values[:10, :10])
    np.save(folder / "1.npy", values)
    assert pack(folder, tmp_path / "out", "--resize", "20", "--no-shuffle", "--value-range", "0", "4095") == 0
    small, large = map(opened, members(tmp_path / "out").values())
    np.testing.assert_array_equal(small, np.rint(values / 4095 * 255).astype(np.uint8)[:10, :10])
    assert large.shape == (20, 20, 3)


READ = [
    (4, "uint8", "--background 0"),
    (4, "uint8", "--background 200 10 90"),
    (2, "uint8", "--background 7 --in-chans 1"),
    (1, "uint16", "--value-range 0 4095"),
    (3, "uint16", "--value-range -12.25 4095.5 0 3000 100 1234567"),
    (5, "uint16", "--value-range 0 4095 --in-chans 5"),
]
FORMS = ["", "--resize 20", "--encode png", "--resize 20 --encode webp"]


@pytest.mark.parametrize(
    ("channels", "dtype", "flags"),
    [
        (channels, dtype, f"{read} {form}")
        for channels, dtype, read in READ
        for form in (FORMS if channels == 3 else FORMS[:2])
    ],
)
def test_the_command_that_it_prints_gives_the_statistics_that_it_prints(
    channels: int, dtype: str, flags: str, folder: Path, tmp_path: Path, encode: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Also of a mixture of images that are kept and that are packed anew."""
    for number, side in enumerate((12, 17, 40)):
        values = noise(side, side + 3, channels, number) * np.dtype(dtype).type(16 if dtype == "uint16" else 1)
        if dtype == "uint16":
            np.save(folder / f"{number}.npy", values)
        else:
            (folder / f"{number}.png").write_bytes(encode(values))
    assert pack(folder, tmp_path / "out", *flags.split()) == 0
    told = shlex.split(capsys.readouterr().out.splitlines()[-1])
    config = parse(PretrainConfig, told[told.index("--data") :], "pretrain", "", {"data": "data.source"})
    source, reading = open_source(config.data.source), config.data.decode_options(config.model.in_chans)
    pixels = [decode(source.read(index)[0], reading) for index in range(len(source))]
    mean, std = each_alike(pixels)
    assert (config.data.mean, config.data.std) == (tuple(mean.round(6)), tuple(std.round(6)))
