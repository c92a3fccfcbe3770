"""States of runs: dicts and lists with tensors and plain values in them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Place = tuple[str | int, ...]
"""Where a value stands in a state: ("optimizer", "state", 3, "exp_avg")."""


def map_tensors(state: Any, function: Callable[[Place, Tensor], Any], at: Place = ()) -> Any:
    """The same state in dicts and lists of its own, each tensor replaced by what `function` makes of it."""
    if isinstance(state, dict):
        return {key: map_tensors(value, function, (*at, key)) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map_tensors(value, function, (*at, number)) for number, value in enumerate(state))
    return function(at, state) if isinstance(state, Tensor) else state
