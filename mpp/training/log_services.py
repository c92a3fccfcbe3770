"""Weights & Biases and MLflow. Project, server and account come from their own settings (WANDB_..., MLFLOW_...).

What they call the run is kept in the run folder, so that a resumed run goes on in the same one.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpp.errors import without_credentials
from mpp.system.files import write_whole
from mpp.training.loggers import Logger, Setting

_PROJECT = "mpp"


class WandB:
    """A run of Weights & Biases; its own files, and all there is in offline mode, lie in run_dir/wandb.

    Raises:
        Exception: what wandb raises, here and in the methods, as for a lack of an account or of an answer.
    """

    def __init__(self, folder: Path, known: Mapping[str, str]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT") or _PROJECT
        name = os.environ.get("WANDB_NAME") or folder.resolve().name
        self._image: Callable[[np.ndarray], Any] = wandb.Image
        # Not the command line, of which wandb would keep the passwords in addresses; the config has the settings.
        private = wandb.Settings(x_disable_meta=True)
        again = {"id": known.get("run"), "resume": "allow"}
        self._run = wandb.init(dir=str(folder), project=project, name=name, settings=private, **again)
        # Its own count of calls must rise; the steps are an axis, on which rows of the same step may come apart.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.identity = {"run": self._run.id}

    def settings(self, settings: Sequence[Setting]) -> None:
        values = {setting.name: setting.value for setting in settings}
        self._run.config.update(values, allow_val_change=True)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        self._run.log({"step": step, name: self._image(picture)})

    def features(
        self, name: str, features: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray | None
    ) -> None:
        pass

    def flush(self) -> None:
        pass  # it sends all the time

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI or else in files in run_dir/mlruns.

    Raises:
        Exception: what mlflow raises, here and in the methods, as for a server that does not answer.
    """

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
        """A parameter of MLflow keeps its first value; one that a later start has changed is a tag as well."""
        before = self._client.get_run(self._run).data.params
        values = {setting.name: str(setting.value) for setting in settings}
        new = [self._param(name, value) for name, value in values.items() if name not in before]
        for first in range(0, len(new), 100):  # the most that one request may bring
            self._client.log_batch(self._run, params=new[first : first + 100])
        for name, value in values.items():
            if before.get(name, value) != value:
                self._client.set_tag(self._run, f"changed.{name}", value)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        self._client.log_image(self._run, picture, key=name, step=step)

    def features(
        self, name: str, features: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray | None
    ) -> None:
        pass

    def flush(self) -> None:
        pass  # each call has been answered

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


_SERVICES = {"wandb": WandB, "mlflow": MLflow}


def connect(name: str, folder: Path) -> tuple[Logger, bool]:
    """The service of that name in `log.to`, and whether an earlier start of the run in `folder` has written to it.

    Raises:
        Exception: what the service raises.
    """
    path = folder / f"{name}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    logger = _SERVICES[name](folder, known)
    text = json.dumps(logger.identity)
    write_whole(path, lambda file: file.write(text.encode()))
    return logger, logger.identity == known
