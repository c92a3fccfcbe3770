"""How much of a run went into waiting for images, and what to do about it."""

import pytest

from mpp.data.settings import DataConfig
from mpp.training.data_stalls import advice, waited


def test_the_share_is_of_the_time() -> None:
    rows = [
        {"images": 1000, "time/images_per_second": 100, "time/data_wait": 0.5},  # 10 s of which half
        {"images": 1000, "fewshot/1shot": 0.5},
        {"images": 2000, "time/images_per_second": 25, "time/data_wait": 0.1},  # 40 s of which a tenth
    ]
    assert waited(rows) == pytest.approx((5 + 4) / 50)
    assert waited([]) == 0


@pytest.mark.parametrize(
    ("source", "cache", "keep", "workers", "expected", "unexpected"),
    [
        ("folder:/a", "none", False, 2, "--data.workers (it was 2, there are 8|mpp shard --resize|cache auto", "keep"),
        ("folder:/a", "auto", False, 8, "more cores|mpp shard --resize", "--data.workers|--data.cache"),
        ("shards:s3://a/b.tar", "none", False, 8, "--data.keep true", "mpp shard --resize"),
        ("shards:s3://a/b.tar", "auto", True, 8, "more cores", "--data.keep|--data.cache"),
        ("array:/a.npy", "none", False, 2, "--data.workers", "cache|shard"),
    ],
)
def test_advice_fits_the_source(
    source: str, cache: str, keep: bool, workers: int, expected: str, unexpected: str
) -> None:
    data = DataConfig(source=source, cache=cache, keep=keep)
    text = advice(0.34, data, workers, 8)
    assert text.startswith("34% of the training time was spent waiting for images: ")
    assert all(words in text for words in expected.split("|"))
    assert not any(words in text for words in unexpected.split("|"))
    assert advice(0.09, data, workers, 8) == ""
