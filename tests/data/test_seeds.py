"""Numbers that depend on their key alone, and look like chance."""

import itertools

import numpy as np
import pytest

from mpp.data.seeds import image_seeds, splitmix, uniforms


def test_mix_is_splitmix64() -> None:
    # Vigna's splitmix64.c started at 1234567, a sequence that many implementations are checked against.
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix(states).tolist() == list(known)
    expected = [[(value >> 11) / 2**53 for value in known]]
    assert uniforms(np.array([1234567], dtype=np.uint64), 5).tolist() == expected


def test_a_key_gives_the_same_whatever_stands_beside_it() -> None:
    index = np.array([5, 0, 10**7, 5])
    together = uniforms(image_seeds(2, 42, np.array([0, 0, 3, 1]), index), 7)
    alone = [
        uniforms(image_seeds(2, 42, epoch, i), 7)[0] for epoch, i in zip((0, 0, 3, 1), index.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(together, alone)
    assert ((together >= 0) & (together < 1)).all()


def test_every_part_of_a_key_counts() -> None:
    keys = list(itertools.product((2, 3), (0, 1, 42), (0, 1, 2), range(50)))
    found = {int(image_seeds(*key)[0]) for key in keys}
    assert len(found) == len(keys)
    assert int(image_seeds(1, 2)[0]) not in (int(image_seeds(2, 1)[0]), int(image_seeds(1, 2, 0)[0]))


@pytest.mark.parametrize("column", [0, 7, 25])
def test_neighbouring_keys_are_unrelated(column: int) -> None:
    drawn = uniforms(image_seeds(2, 0, 0, np.arange(100_000)), 26)[:, column]
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 180  # chi-squared with 99 degrees: above it once in a million
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
    epochs = uniforms(image_seeds(2, 0, np.arange(100_000), 0), 26)[:, column]
    assert abs(np.corrcoef(drawn, epochs)[0, 1]) < 0.02
