"""Where figures, pictures and settings go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

`RunLog` speaks to all of them through `Logger`, under the same names, grouped by what is compared. TensorBoard's files
are the run's own and share its fate. The other two are services: what befalls them is said once, and the run goes on.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from mpp.errors import ConfigError, without_credentials

Told: TypeAlias = Sequence[tuple[int, Mapping[str, float]]]
"""Steps and figures, by `tag`, of rows that an earlier start of the run wrote."""

_INSTALL = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}


class Setting(NamedTuple):
    """One value of a config: dotted name, value, and whether it may change between a run and its resumption."""

    name: str
    value: str | float | bool
    free: bool


class Logger(Protocol):
    """One of the places that a run is written to."""

    def settings(self, settings: Sequence[Setting]) -> None:
        """Takes the run's config, once, before anything else."""
        ...

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes finite figures, by `tag`."""
        ...

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """Takes a picture (H, W, 3) uint8."""
        ...

    def features(
        self, name: str, features: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray | None
    ) -> None:
        """Takes image features (M, D), labels and thumbnails (M, H, W, 3) uint8; some have no use for them."""
        ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None:
        """Ends the writing; `failed`: the run ended by an error."""
        ...


def check_installed(to: Sequence[str]) -> None:
    """Looks for the packages of `log.to`, without importing them.

    Raises:
        ConfigError: one is missing.
    """
    for name in to:
        if find_spec(name) is None:
            raise ConfigError(f"log.to {name}: {name} is not installed; pip install {_INSTALL[name]}")


def flat(config: Any, prefix: str = "", free: bool = False) -> Iterator[Setting]:
    """The settings of a config dataclass, without credentials in addresses; those without a value are left out."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        may_change = free or field.metadata.get("free") is True  # not: among some values
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{name}.", may_change)
        elif isinstance(value, tuple):
            yield Setting(name, without_credentials(" ".join(map(str, value))), may_change)
        elif value is not None:
            yield Setting(name, without_credentials(value) if isinstance(value, str) else value, may_change)


def tag(name: str) -> str:
    """The name of a figure of metrics.jsonl in the loggers, which group by the part before the slash.

    accuracy -> accuracy/all, mse_baseline_frequent -> mse/trivial_frequent, lr -> schedule/lr, grad_norm ->
    train/grad_norm; the spread of the few-shot accuracies stands apart from them: fewshot/5shot_std ->
    fewshot_spread/5shot_std.
    """
    group, slash, rest = name.partition("/")
    if slash:
        return f"fewshot_spread/{rest}" if group == "fewshot" and rest.endswith("_std") else name
    group, _, rest = name.partition("_")
    if group in ("accuracy", "mse", "loss"):
        return f"{group}/{rest.replace('baseline_', 'trivial_') or 'all'}"
    return f"schedule/{name}" if name in ("lr", "epoch") else f"train/{name}"


class Service:
    """A logger that must not end a run: its first failure is said on stderr, and the run goes on without it.

    A service cannot take back what an earlier start told it, so what this start comes to again is not told twice.
    """

    def __init__(self, name: str, connect: Callable[[], tuple[Logger, bool]], dropped: Told) -> None:
        """Connects.

        Args:
            connect: gives the logger, and whether an earlier start of this run has written to it.
            dropped: what that start wrote after the step that this one goes on from.
        """
        self._name = name
        self._logger: Logger | None = None
        self._told: dict[tuple[int, str], float] = {}
        connected = self._try(connect)
        if connected is not None:
            self._logger, goes_on = connected
            if goes_on:
                self._told = {(step, name): value for step, figures in dropped for name, value in figures.items()}

    def settings(self, settings: Sequence[Setting]) -> None:
        self._tell(lambda logger: logger.settings(settings))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        new = {name: value for name, value in figures.items() if not self._knows(step, name, value)}
        if new:
            self._tell(lambda logger: logger.scalars(step, new))

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        self._tell(lambda logger: logger.picture(name, step, picture))

    def features(
        self, name: str, features: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray | None
    ) -> None:
        self._tell(lambda logger: logger.features(name, features, labels, thumbnails))

    def flush(self) -> None:
        self._tell(lambda logger: logger.flush())

    def close(self, failed: bool) -> None:
        self._tell(lambda logger: logger.close(failed))

    def _knows(self, step: int, name: str, value: float) -> bool:
        """Times differ from start to start; anything else that differs is another config's, and worth telling."""
        told = self._told.get((step, name))
        return told is not None and (name.startswith("time/") or told == value)

    def _tell(self, act: Callable[[Logger], object]) -> None:
        logger = self._logger
        if logger is not None:
            self._try(lambda: act(logger))

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # whatever it is, it is not worth the run
            self._logger = None
            reason = without_credentials(" ".join(str(error).split()) or type(error).__name__)[:300]
            print(f"log.to {self._name}: {reason.rstrip('.')}; the run goes on without it", file=sys.stderr, flush=True)
            return None
