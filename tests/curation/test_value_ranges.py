from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from mpp.curation.value_ranges import Kind, Spread, propose
from mpp.data.settings import DecodeOptions
from tests.curation.made import RNG, under


def write_tiff(path: Path, values: np.ndarray) -> None:
    planar = {"planarconfig": "separate", "photometric": "minisblack"} if values.shape[2] == 5 else {}
    tifffile.imwrite(f"{path}.tif", np.moveaxis(values, 2, 0).squeeze(), **planar)


def write_pages(path: Path, values: np.ndarray) -> None:
    with tifffile.TiffWriter(f"{path}.tif") as file:
        for page in np.moveaxis(values, 2, 0):
            file.write(page, photometric="minisblack")


def write_png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values[:, :, 0]).save(f"{path}.png")


def integers(low: int, high: int, channels: int) -> np.ndarray:
    return RNG.integers(low, high, (50, 60, channels), dtype=np.uint16)


Write = Callable[[Path, np.ndarray], object]
KINDS: dict[str, tuple[Write, Callable[[], np.ndarray]]] = {
    "uint16 tiff": (write_tiff, lambda: integers(100, 4096, 1)),
    "uint16 png": (write_png, lambda: integers(0, 1024, 1)),
    "planar tiff": (write_tiff, lambda: integers(0, 16384, 5)),
    "paged tiff": (write_pages, lambda: integers(0, 4096, 4)),
    "float tiff": (write_tiff, lambda: RNG.normal(0, 100, (50, 60, 1)).astype(np.float32)),
    "float npy": (np.save, lambda: (RNG.random((50, 60, 5)) * [10, 100, 1000, 1, 2]).astype(np.float32)),
}


@pytest.mark.parametrize(
    ("kind", "channels", "proposed"),
    [
        ("uint16 tiff", 3, (0, 4095)),
        ("uint16 png", 3, (0, 1023)),
        ("planar tiff", 5, (0, 16383)),
        pytest.param("paged tiff", 4, (0, 4095), marks=pytest.mark.slow),
        ("float tiff", 3, None),
        ("float npy", 5, None),
    ],
)
def test_values_and_the_range_to_state(
    check: Callable[..., Any], tmp_path: Path, kind: str, channels: int, proposed: tuple[int, int] | None
):
    write, make = KINDS[kind]
    images = [make() for _ in range(3)]
    (tmp_path / "data").mkdir()
    for number, values in enumerate(images):
        write(tmp_path / "data" / str(number), values)
    code, lines, report = check(tmp_path / "data", "--in-chans", str(channels))
    all_values = np.concatenate([values.reshape(-1, values.shape[2]) for values in images])
    (found,) = report["values"]
    for name, expected in (
        ("smallest", all_values.min(axis=0)),
        ("p0.1", np.percentile(all_values.astype(np.float64), 0.1, axis=0)),
        ("p99.9", np.percentile(all_values.astype(np.float64), 99.9, axis=0)),
        ("largest", all_values.max(axis=0)),
    ):
        np.testing.assert_allclose([channel[name] for channel in found["channels"]], expected, rtol=1e-12)
    assert found["images"] == 3
    assert code == (0 if proposed else 1)  # floating point beyond 0 to 1 has no range
    value_range = found["value_range"]
    if proposed:
        assert tuple(value_range) == proposed
    else:
        assert len(value_range) == 2 * (channels if channels == 5 else 1)
        low, high = np.array(value_range).reshape(-1, 2).T
        span = np.ptp(all_values, axis=0)
        assert (np.abs(low - np.percentile(all_values, 0.1, axis=0)) <= 0.002 * span).all()
        assert (np.abs(high - np.percentile(all_values, 99.9, axis=0)) <= 0.002 * span).all()
    flag = "--data.value-range " + " ".join(f"{value:g}" for value in value_range)
    assert any(flag in line for line in under(lines, "values"))
    # With the range that it proposes there is nothing left to say.
    ranged = ("--value-range", *(f"{value:g}" for value in value_range))
    code, _, report = check(tmp_path / "data", "--in-chans", str(channels), *ranged)
    assert (code, report["values"][0]["value_range"], report["bad"]) == (0, None, {})


def test_values_that_use_their_range_propose_nothing(check: Callable[..., Any], tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        tifffile.imwrite(tmp_path / "data" / f"{number}.tif", RNG.integers(0, 65536, (40, 40), dtype=np.uint16))
    _, lines, report = check(tmp_path / "data")
    assert report["values"][0]["value_range"] is None
    assert "value-range" not in "".join(lines)
    _, lines, report = check(tmp_path / "data", "--value-range", "0", "4095")
    assert "% of the values lie outside the stated range; --data.value-range 0 65535 would suit" in "".join(lines)


def test_values_that_are_not_finite_are_counted():
    spread = Spread(2)
    spread.add(np.array([[[0.0, np.nan], [4.0, np.inf]]]))
    assert spread.infinite == 2
    assert spread.smallest[0] == 0
    assert spread.largest[0] == 4
    assert np.isnan(spread.largest[1])
    assert propose(Kind("float64", 2), spread, DecodeOptions(2)) is None


def test_percentiles_of_many_values_stay_near_in_bounded_memory():
    spread = Spread(4)
    for side in [128] * 100 + [1] * 3000:
        part = Spread(4)
        part.add(RNG.integers(0, 10_000, (side, side, 4), dtype=np.uint16))
        spread.merge(part)
    assert sum(part.size for part in spread._parts) <= 2**22
    assert len(spread._parts) < 1_100  # arrays: very small ones take more room than their values
    low, high = spread.percentiles()
    np.testing.assert_allclose(low, 10, atol=3)
    np.testing.assert_allclose(high, 9989, atol=3)
