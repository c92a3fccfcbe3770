"""Random numbers of very many images at once, each by its own key alone.

keys (purpose, seed, pass, index) -> one 64-bit seed an image -> as many uniform numbers as its transform takes

A generator object for each image would cost more than a small image itself. SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014) is a few multiplications, and does a whole batch in one go.
"""

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: uint64 to uint64, one to one, any shape."""
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def seeds(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 an image from the parts of its key; integers stand for all images, arrays (n,) for one each."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix(state * _STEP + np.asarray(part).astype(np.uint64) + _STEP)
    return state


def uniforms(seed: np.ndarray, count: int) -> np.ndarray:
    """float64 (n, count) in [0, 1): the first numbers of SplitMix64 with each of the seeds, uint64 (n,)."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    return (mix(seed[:, None] + steps) >> np.uint64(11)) * 2.0**-53
