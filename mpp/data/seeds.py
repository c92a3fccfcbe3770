"""Every random number of a run, by what it is for: no worker, rank or library has a random state of its own.

The order of an epoch comes from NumPy's generator of its key, and single seeds from NumPy's SeedSequence. A generator
object for each image would cost more than a small image itself: a batch's numbers come from SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014), a few multiplications for all images at once.
"""

import numpy as np

_ORDER = 1  # what the numbers are for; reader.py has the other purposes
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch: int64 (length,)."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(length)


def derive_seed(*parts: int) -> int:
    """A seed below 2^63 from several numbers; different numbers give unrelated seeds."""
    # With their count, for zeros at the end of a key do not change it.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0]) >> 1


def image_seeds(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 an image from the parts of its key; integers stand for all images, arrays (n,) for one each."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = splitmix(state * _STEP + np.asarray(part).astype(np.uint64) + _STEP)
    return state


def uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """float64 (n, count) in [0, 1): the first numbers of SplitMix64 with each of the seeds, uint64 (n,)."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    return (splitmix(seeds[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def splitmix(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: uint64 to uint64, one to one, any shape."""
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
