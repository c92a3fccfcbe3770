"""Images made for the tools, and what they print and pack read."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp.cli import shard
from tests.data.picture_files import encoded

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3, seed: int | None = None) -> np.ndarray:
    """uint8 (height, width, channels): another one at each call, but for the same seed."""
    rng = RNG if seed is None else np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, **options)
    return path


def pictures(folder: Path, number: int) -> Path:
    """Make 0.png, 1.png, ... of noise, 40 x 40."""
    for each in range(number):
        save(folder / f"{each}.png", noise(40, 40))
    return folder


def write_pictures(folder: Path) -> Path:
    """Write 40 small pictures of several formats and sizes in three classes."""
    formats = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP"), ("gif", "GIF"), ("tif", "TIFF")]
    for number in range(40):
        extension, container = formats[number % len(formats)]
        path = folder / f"class {number % 3}" / f"{number:02d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(8 + number, 30 - number // 2, seed=number), container))
    return folder


def under(lines: list[str], title: str) -> list[str]:
    """What the report says under a title."""
    found: list[str] = []
    inside = False
    for line in lines:
        inside = line.startswith(f"{title:<13}") or (inside and line.startswith(" " * 13))
        if inside:
            found.append(line[13:])
    return found


def pack(images: Path | str, out: Path, *flags: str, workers: int = 2) -> int:
    data = images if isinstance(images, str) else f"folder:{images}"
    return shard(["--data", data, "--out", str(out), "--workers", str(workers), *flags])


def shards(out: Path) -> str:
    return f"shards:{out}/*.tar"


def members(out: Path) -> dict[str, bytes]:
    held: dict[str, bytes] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            held |= {member.name: tar.extractfile(member).read() for member in tar}
    return held


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shard: error: ")]
    assert len(lines) == 1
    return lines[0]


def each_alike(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, scaled to 0 to 1, every image counting alike."""
    scaled = [image.reshape(-1, image.shape[-1]) / 255 for image in images]
    mean = np.mean([pixels.mean(axis=0) for pixels in scaled], axis=0)
    return mean, np.sqrt(np.mean([((pixels - mean) ** 2).mean(axis=0) for pixels in scaled], axis=0))
