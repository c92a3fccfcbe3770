import time

from mpp.curation.pool import in_processes


def megabytes(_: int) -> bytes:
    return bytes(30_000_000)


def test_closing_does_not_wait_for_results_that_are_half_sent():
    results = in_processes(megabytes, range(20), 2)
    assert len(next(results)) == 30_000_000
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 10
