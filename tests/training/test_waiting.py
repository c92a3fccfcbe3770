"""How much of a run went into waiting for images, and what to do about it."""

import pytest

from mpp.training.waiting import advice, waited


def row(images: int, rate: float, wait: float) -> dict[str, float]:
    return {"images": images, "time/images_per_second": rate, "time/data_wait": wait}


def test_the_share_is_of_the_time() -> None:
    # 10 s of which half, then 40 s of which a tenth.
    assert waited([row(1000, 100, 0.5), {"images": 1000, "fewshot/1shot": 0.5}, row(2000, 25, 0.1)]) == pytest.approx(
        (5 + 4) / 50
    )
    assert waited([]) == 0


@pytest.mark.parametrize(
    ("source", "cache", "keep", "workers", "said", "unsaid"),
    [
        (
            "folder:/a",
            "none",
            False,
            2,
            ["--data.workers (it was 2, there are 8", "mpp-shard --resize", "--data.cache auto"],
            ["--data.keep"],
        ),
        (
            "folder:/a",
            "auto",
            False,
            8,
            ["more cores", "mpp-shard --resize"],
            ["--data.workers", "--data.cache"],
        ),
        ("shards:s3://a/b.tar", "none", False, 8, ["--data.keep true"], ["mpp-shard --resize"]),
        ("shards:s3://a/b.tar", "auto", True, 8, ["more cores"], ["--data.keep", "--data.cache"]),
        ("array:/a.npy", "none", False, 2, ["--data.workers"], ["cache", "shard"]),
    ],
)
def test_advice_fits_the_source(
    source: str, cache: str, keep: bool, workers: int, said: list[str], unsaid: list[str]
) -> None:
    text = advice(0.34, source, cache, keep, workers, 8)
    assert text.startswith("34% of the training time was spent waiting for images: ")
    assert all(words in text for words in said)
    assert not any(words in text for words in unsaid)


def test_a_little_waiting_is_not_worth_a_word() -> None:
    assert advice(0.09, "folder:/a", "none", False, 0, 8) == ""
