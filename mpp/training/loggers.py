"""Where figures, pictures and settings go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

All get the same names, grouped by what is compared. Project, server and account of the two services come from their
own settings (WANDB_..., MLFLOW_...); how they call the run is kept in the run folder, so that a resumed run goes on in
the same one. Any method of a service may raise what its library raises.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mpp.errors import ConfigError, without_credentials
from mpp.system.files import write_whole

EarlierRows: TypeAlias = Sequence[tuple[int, Mapping[str, float]]]
"""Steps and figures, by `tag`, of rows that an earlier start of the run wrote."""
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_PROJECT = "mpp"


class Setting(NamedTuple):
    """One value of a config: dotted name, value, and whether it may change between a run and its resumption."""

    name: str
    value: str | float | bool
    free: bool


class Logger:
    """One of the places that a run is written to; it ignores what it has no use for."""

    def settings(self, settings: Sequence[Setting]) -> None:
        """Take the run's config, once, before anything else."""

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Take finite figures, by `tag`."""

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """Take a picture (H, W, 3) uint8."""

    def features(
        self, name: str, features: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray | None
    ) -> None:
        """Take image features (M, D), labels and thumbnails (M, H, W, 3) uint8."""

    def flush(self) -> None:
        """Write out what waits to be written."""

    def close(self, failed: bool) -> None:
        """End the writing; `failed`: the run ended by an error."""


def check_installed(to: Sequence[str]) -> None:
    """Look for the packages of `log.to`, without importing them; raises ConfigError where one is missing."""
    for name in to:
        if find_spec(name) is None:
            raise ConfigError(f"log.to {name}: {name} is not installed; pip install {_PACKAGES[name]}")


def open_logger(name: str, folder: Path, resume_step: int, kept: EarlierRows, dropped: EarlierRows) -> Logger:
    """Open the logger of that name in `log.to`; `kept` and `dropped`: rows up to `resume_step`, and after it."""
    if name == "tensorboard":
        from mpp.training.log_tensorboard import TensorBoard  # takes a second

        return TensorBoard(folder, resume_step, kept)
    path = folder / f"{name}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    service = {"wandb": WandB, "mlflow": MLflow}[name](folder, known)
    write_whole(path, json.dumps(service.identity))
    if service.identity == known:
        service.sent = {(step, name): value for step, figures in dropped for name, value in figures.items()}
    return service


def settings_of(config: Any, prefix: str = "", free: bool = False) -> Iterator[Setting]:
    """Yield the settings of a config dataclass, without credentials in addresses, and without those of no value."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        may_change = free or field.metadata.get("free") is True  # not: among some values
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{name}.", may_change)
        elif isinstance(value, tuple):
            yield Setting(name, without_credentials(" ".join(map(str, value))), may_change)
        elif value is not None:
            yield Setting(name, without_credentials(value) if isinstance(value, str) else value, may_change)


def tag(name: str) -> str:
    """Return the name of a figure of metrics.jsonl in the loggers, which group by the part before the slash.

    accuracy -> accuracy/all, mse_baseline_frequent -> mse/trivial_frequent, lr -> schedule/lr, grad_norm ->
    train/grad_norm; the spread of few-shot accuracies stands apart: fewshot/5shot_std -> fewshot_spread/5shot_std.
    """
    group, slash, rest = name.partition("/")
    if slash:
        return f"fewshot_spread/{rest}" if group == "fewshot" and rest.endswith("_std") else name
    group, _, rest = name.partition("_")
    if group in ("accuracy", "mse", "loss"):
        return f"{group}/{rest.replace('baseline_', 'trivial_') or 'all'}"
    return f"schedule/{name}" if name in ("lr", "epoch") else f"train/{name}"


class Service(Logger):
    """A logger that cannot take back what an earlier start sent, so the same figures are not sent again."""

    identity: dict[str, str]
    """How it calls the run."""
    sent: Mapping[tuple[int, str], float] = {}

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        # Times differ from start to start; any other figure that differs is another config's, and worth sending.
        known = {name: self.sent[step, name] for name in figures if (step, name) in self.sent}
        new = {n: v for n, v in figures.items() if n not in known or not (n.startswith("time/") or known[n] == v)}
        if new:
            self.send(step, new)

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        raise NotImplementedError


class WandB(Service):
    """A run of Weights & Biases; its own files, and all there is in offline mode, lie in run_dir/wandb."""

    def __init__(self, folder: Path, known: Mapping[str, str]) -> None:
        import wandb

        self._image = wandb.Image
        self._run: Any = wandb.init(
            dir=str(folder),
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=os.environ.get("WANDB_NAME") or folder.resolve().name,
            # Not the command line, of which wandb would keep the passwords in addresses; the config has the settings.
            settings=wandb.Settings(x_disable_meta=True),
            id=known.get("run"),
            resume="allow",
        )
        # Its own count of calls must rise; the steps are an axis, on which rows of the same step may come apart.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.identity = {"run": self._run.id}

    def settings(self, settings: Sequence[Setting]) -> None:
        self._run.config.update({setting.name: setting.value for setting in settings}, allow_val_change=True)

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        self._run.log({"step": step, name: self._image(picture)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow(Service):
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI or else in files in run_dir/mlruns."""

    def __init__(self, folder: Path, known: Mapping[str, str]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._param = Metric, Param
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            # SQLite would need the whole of mlflow, and locks that the shared disks of clusters often lack.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (folder / "mlruns").resolve().as_uri()
        self._client = MlflowClient(address)
        server = without_credentials(address)
        self._run = known["run"] if known.get("server") == server else self._create(folder)
        self._client.update_run(self._run, status="RUNNING")
        self.identity = {"server": server, "run": self._run}

    def _create(self, folder: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        return self._client.create_run(number, run_name=folder.resolve().name).info.run_id

    def settings(self, settings: Sequence[Setting]) -> None:
        # A parameter of MLflow keeps its first value; one that a later start has changed becomes a tag as well.
        before = self._client.get_run(self._run).data.params
        values = {setting.name: str(setting.value) for setting in settings}
        new = [self._param(name, value) for name, value in values.items() if name not in before]
        for first in range(0, len(new), 100):  # the most that one request takes
            self._client.log_batch(self._run, params=new[first : first + 100])
        for name, value in values.items():
            if before.get(name, value) != value:
                self._client.set_tag(self._run, f"changed.{name}", value)

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        self._client.log_batch(self._run, [self._metric(name, value, now, step) for name, value in figures.items()])

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        self._client.log_image(self._run, picture, key=name, step=step)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
