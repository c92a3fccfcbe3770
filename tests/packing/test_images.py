"""What becomes of each image that is packed."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.data.config import Reading
from mpp.data.decode import decode
from mpp.sources.opening import open_source
from tests.packing.packed import each_alike, manifest, members, noise, pack, shards


def test_extensions_are_by_content(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encode(noise(5, 5), "PNG"))
    (folder / "b.png").write_bytes(encode(noise(5, 5), "JPEG"))
    np.save(folder / "c.npy", noise(5, 5))
    assert pack(folder, tmp_path / "out", "--no-shuffle") == 0
    assert list(members(tmp_path / "out")) == ["000000000.png", "000000001.jpg", "000000002.npy"]
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_resizing_is_pillows_and_never_enlarges(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    small = encode(noise(20, 90), "PNG")
    (folder / "0.png").write_bytes(small)
    (folder / "1.png").write_bytes(encode(noise(50, 70)))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (folder / "2.jpg").write_bytes(encode(noise(60, 81), "JPEG", exif=exif))
    assert pack(folder, tmp_path / "out", "--resize", "24", "--no-shuffle") == 0
    held = members(tmp_path / "out")
    assert list(held) == ["000000000.png", "000000001.png", "000000002.jpg"]
    assert held["000000000.png"] == small
    expected = Image.fromarray(noise(50, 70)).resize((34, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(held["000000001.png"]))), np.asarray(expected))
    turned = Image.fromarray(decode((folder / "2.jpg").read_bytes(), Reading()))
    assert turned.size == (60, 81)
    jpeg = encode(turned.resize((24, 32), Image.Resampling.BICUBIC), "JPEG", quality=92)
    assert held["000000002.jpg"] == jpeg
    assert manifest(tmp_path / "out")["sizes"]["height"] == {"min": 20, "median": 24, "max": 32}


@pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_encoding_anew(form: str, extension: str, images: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    assert pack(images, tmp_path / "out", "--encode", form, "--quality", "80", "--no-shuffle") == 0
    before, after = open_source(f"folder:{images}"), open_source(shards(tmp_path / "out"))
    assert {name.partition(".")[2] for name in members(tmp_path / "out")} == {extension, "cls"}
    options = {} if form == "png" else {"quality": 80}
    for index in range(40):
        pixels = decode(before.read(index)[0], Reading())
        assert after.read(index)[0] == encode(pixels, form, **options)
    mean, std = each_alike([decode(after.read(i)[0], Reading()) for i in range(40)])
    held = manifest(tmp_path / "out")
    np.testing.assert_allclose([held["mean"], held["std"]], [mean, std], atol=1e-6)


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
        held = np.load(io.BytesIO(data)) if extension == "npy" else np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(held, image)


def test_many_channels_shrink_as_npy(tmp_path: Path) -> None:
    values = noise(40, 60, 5)
    np.save(tmp_path / "a.npy", values[None])
    assert pack(f"array:{tmp_path / 'a.npy'}", tmp_path / "out", "--in-chans", "5", "--resize", "20") == 0
    (data,) = members(tmp_path / "out").values()
    planes = [Image.fromarray(values[:, :, channel].copy()) for channel in range(5)]
    expected = np.stack([np.asarray(plane.resize((30, 20), Image.Resampling.BICUBIC)) for plane in planes], axis=2)
    np.testing.assert_array_equal(np.load(io.BytesIO(data)), expected)


def test_a_stated_range_is_used_up_once(tmp_path: Path) -> None:
    """With a range, small images are converted, too, for one setting must then read all of them."""
    folder = tmp_path / "images"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (40, 40, 3)).astype(np.uint16)
    np.save(folder / "0.npy", values[:10, :10])
    np.save(folder / "1.npy", values)
    told = ("--value-range", "0", "4095")
    assert pack(folder, tmp_path / "out", "--resize", "20", "--no-shuffle", *told) == 0
    small, large = (np.asarray(Image.open(io.BytesIO(data))) for data in members(tmp_path / "out").values())
    scaled = np.rint(values / 4095 * 255).astype(np.uint8)
    np.testing.assert_array_equal(small, scaled[:10, :10])
    assert large.shape == (20, 20, 3)
