"""Images packed, and what was packed read."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mpp.cli import shard


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


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
