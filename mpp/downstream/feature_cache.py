"""Features of a frozen encoder, cached on disk: the second evaluation of the same weights on the same images is free.

    key (weights, images, transform, pooling, precision) -> its hash -> $MPP_CACHE/features/HASH.npz -> the same bits

What was used longest ago goes when the cache is full (see mpp/system/cache); all of it can be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mpp import dist
from mpp.system.cache import make_room
from mpp.system.files import cache_folder, write_whole

_FORMAT = 1  # of the files; with a new number the old ones are no longer used

Features = tuple[Float[np.ndarray, "n d"], Int64[np.ndarray, " n"]]
"""Features, and each row's index in its source."""


def cached_features(
    key: Mapping[str, Any], extract: Callable[[], tuple[np.ndarray, np.ndarray]], dtype: type[np.floating] = np.float32
) -> Features:
    """Gives the features that are cached under `key`, or else those of `extract`, which are then cached.

    Under several processes all must call this together, and `extract` must return the same on all of them: it runs on
    all of them as soon as one lacks the file, since it may be work that they share. One process of each machine writes.
    A damaged file, or a folder that cannot be written, costs a note on stderr and time.

    Args:
        key: everything that the features depend on, as JSON values.
        extract: features (n, d) of any float type and indices (n,), which become `dtype` and int64.
    """
    text = json.dumps({"format": _FORMAT, "key": dict(key)}, sort_keys=True, allow_nan=False)
    path = cache_folder() / "features" / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"
    cached = _load(path, text, dtype)
    # Ranks must agree, else some would wait for the others in `extract` for ever.
    if not dist.any_rank(cached is None) and cached is not None:
        return cached
    features, indices = extract()
    features = np.ascontiguousarray(features, dtype=dtype)
    indices = np.ascontiguousarray(indices, dtype=np.int64)
    if _writes():
        try:
            make_room(features.nbytes + indices.nbytes, "an array of features")
            columns = {"features": features, "indices": indices, "key": np.array(text)}
            write_whole(path, lambda file: np.savez(file, allow_pickle=False, **columns))
        except OSError as error:
            _say(f"note: cannot keep features in {path.parent} ({_reason(error)}); set MPP_CACHE to a folder with room")
    return features, indices


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Gives 64 hexadecimal digits that change with any name, type, shape or bit of the tensors, on any device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(path: Path, key: str, dtype: type[np.floating]) -> Features | None:
    """Reads the file; None where there is none, or none that can be used."""
    try:
        # numpy leaves a file of its own open when the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            features, indices, of = arrays["features"], arrays["indices"], str(arrays["key"])
        if of != key:
            raise ValueError("it holds the features of another key")
        if features.dtype != dtype or features.ndim != 2:
            raise ValueError(f"its features are {features.dtype} {features.shape}")
        if indices.dtype != np.int64 or indices.shape != features.shape[:1]:
            raise ValueError(f"its indices are {indices.dtype} {indices.shape}")
        with contextlib.suppress(OSError):
            os.utime(path)  # it is used again
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it can be made again
        _say(f"note: the cached features {path} cannot be used ({_reason(error)}); they are computed again")
        return None
    return features, indices


def _writes() -> bool:
    """Whether this is the one process of its machine that writes and complains."""
    return dist.world_from_environment().local_rank == 0


def _say(text: str) -> None:
    if _writes():
        print(text, file=sys.stderr)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
