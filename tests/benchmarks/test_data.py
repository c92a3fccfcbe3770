"""The measurement of the data path: its parts print what they are to, and it refuses what it cannot measure."""

import re
from pathlib import Path

import numpy as np
import pytest
from bench import bench
from benchmarks.data import data
from benchmarks.settings import DataBench

from mpp.errors import UserError


@pytest.mark.slow
def test_every_part_is_measured(picture_folder, encode, capsys: pytest.CaptureFixture[str]) -> None:
    folder = picture_folder(*(f"{number}.jpg" for number in range(6)))
    rng = np.random.default_rng(0)
    for path in folder.glob("*.jpg"):
        path.write_bytes(encode(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), "JPEG"))
    (folder / "bad.jpg").write_text("no image")
    tiny = ("--size", "32", "--repeats", "2", "--entries", "5000", "--reads", "1000", "--workers", "2")
    assert bench(["data", "--data", f"folder:{folder}", *tiny]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"6 images of folder:{folder}, 0.00 megapixels" in out
    names = ("mpp: decode, crop, resize, flip", "Pillow and torchvision: the same", "mpp: decode alone")
    lines = [rf"  {name} +\S+ \(\S+ to \S+\)$" for name in (*names, "Pillow: decode alone", "1 worker", "2 workers")]
    names = ("mpp / Pillow and torchvision", "mpp / its decoding alone", "2 workers / 1")
    lines += [rf"  {name} +\S+ x \(\S+ to \S+\)$" for name in names]
    lines += [r"Crops of ours and Pillow's differ by \d+\.\d\d grey levels on average"]
    lines += [r"Shards of 5,000 images, indexed:$", r"  a worker over 1,000 reads +\S+ to \S+ MiB resident, [+-]"]
    for name in ("a fresh start", "in the middle of an epoch"):
        lines.append(rf"  {name} +\d\.\d\d s to open, \d+\.\d\d s more to the first batch")
    for line in lines:
        assert re.search(f"^{line}", out, re.MULTILINE), line


def test_what_it_cannot_measure(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="holds pixels already; the bench measures decoding"):
        data(DataBench(data=f"array:{tmp_path / 'a.npy'}"))
    (tmp_path / "bad.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"none of the images of .* could be decoded"):
        data(DataBench(data=f"folder:{tmp_path}"))
