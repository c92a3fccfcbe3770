"""Models without memory: shapes and names alone, on torch's meta device."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What initialisations call: each takes milliseconds on the meta device, of a ViT's many layers a part of a second.
_DRAWING = {"uniform_", "normal_", "kaiming_uniform_", "erfinv_", "constant_"}
_CHANGING = {"mul_", "add_", "clamp_", "zero_", "fill_"}


class _NotDrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (name in _DRAWING or name in _CHANGING) and args and getattr(args[0], "is_meta", False):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Makes what is built within of meta tensors, as `torch.device("meta")` does, without drawing their values."""
    with torch.device("meta"), _NotDrawn():
        yield


def building_on(device: torch.device | str) -> AbstractContextManager[object]:
    """Where a model that goes to `device` is built: on the CPU, so that its values are the same for every device; of
    meta, on meta."""
    return on_meta() if torch.device(device).type == "meta" else torch.device("cpu")
