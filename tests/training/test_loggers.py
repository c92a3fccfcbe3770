"""What loggers are told, and that a service cannot end a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.config import parse
from mpp.errors import ConfigError
from mpp.pretraining.settings import PretrainConfig
from mpp.training.log import RunLog
from mpp.training.loggers import Logger, Service, flat, tag


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "loss/all"),
        ("loss_masked", "loss/masked"),
        ("accuracy", "accuracy/all"),
        ("accuracy_unchanged", "accuracy/unchanged"),
        ("accuracy_baseline_frequent", "accuracy/trivial_frequent"),
        ("mse_baseline_neighbours", "mse/trivial_neighbours"),
        ("lr", "schedule/lr"),
        ("epoch", "schedule/epoch"),
        ("grad_norm", "train/grad_norm"),
        ("fewshot/5shot", "fewshot/5shot"),
        ("fewshot/5shot_std", "fewshot_spread/5shot_std"),
        ("time/images_per_second", "time/images_per_second"),
        ("test/top1", "test/top1"),
    ],
)
def test_figures_are_grouped_by_what_is_compared(name: str, expected: str) -> None:
    assert tag(name) == expected


@dataclass(frozen=True)
class Inner:
    source: str = "shards:https://user:secret@host/a.tar"
    sizes: tuple[int, ...] = (224, 192)
    workers: int = field(default=2, metadata={"free": True})
    cache: str = field(default="auto", metadata={"free": ("auto", "none")})


@dataclass(frozen=True)
class Config:
    lr: float = 0.1
    on: bool = True
    limit: int | None = None
    run_dir: str = field(default="runs/first", metadata={"free": True})
    data: Inner = Inner()


def test_a_config_is_told_by_dotted_names_without_credentials() -> None:
    assert list(flat(Config())) == [
        ("lr", 0.1, False),
        ("on", True, False),
        ("run_dir", "runs/first", True),
        ("data.source", "shards:https://host/a.tar", False),
        ("data.sizes", "224 192", False),
        ("data.workers", 2, True),
        ("data.cache", "auto", False),
    ]


def test_where_to_log_is_a_setting_that_a_resumed_run_may_change() -> None:
    config = parse(PretrainConfig, ["--log.to", "tensorboard", "mlflow"], "x", "", {})
    assert config.log.to == ("tensorboard", "mlflow")
    assert next(setting for setting in flat(config) if setting.name == "log.to").free
    with pytest.raises(ConfigError, match=r"log\.to takes different loggers, got wandb wandb"):
        parse(PretrainConfig, ["--log.to", "wandb", "wandb"], "x", "", {})
    with pytest.raises(ConfigError, match=r"log\.to"):
        parse(PretrainConfig, ["--log.to", "comet"], "x", "", {})


class Notebook(Logger):
    """Remembers what it is told, until it breaks."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.broken = False

    def _note(self, *what: Any) -> None:
        if self.broken:
            raise RuntimeError("https://me:secret@host/api:\n  no answer.")
        self.told.append(what)

    def settings(self, settings: Any) -> None:
        self._note("settings", settings)

    def scalars(self, step: int, figures: Any) -> None:
        self._note(step, figures)

    def picture(self, name: str, step: int, picture: Any) -> None:
        self._note(name, step)

    def features(self, name: str, features: Any, labels: Any, thumbnails: Any) -> None:
        self._note(name, labels)

    def flush(self) -> None:
        self._note("flush")

    def close(self, failed: bool) -> None:
        self._note("close", failed)


def test_the_first_failure_of_a_service_is_said_once_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = Notebook()
    service = Service("wandb", lambda: (notebook, False), [])
    service.scalars(5, {"loss/all": 1.0})
    assert capsys.readouterr().err == ""
    notebook.broken = True
    service.scalars(10, {"loss/all": 1.0})
    expected = "log.to wandb: https://host/api: no answer; the run goes on without it\n"
    assert capsys.readouterr().err == expected
    notebook.broken = False
    service.settings([])
    service.picture("x", 5, np.zeros((2, 2, 3), np.uint8))
    service.features("x", np.zeros((1, 1), np.float32), None, None)
    service.flush()
    service.close(False)
    assert capsys.readouterr().err == ""
    assert notebook.told == [(5, {"loss/all": 1.0})]


def test_a_service_that_does_not_answer_at_the_start_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def connect() -> Any:
        raise ConnectionError

    service = Service("mlflow", connect, [])
    service.scalars(5, {"loss/all": 1.0})
    service.close(False)
    assert capsys.readouterr().err == "log.to mlflow: ConnectionError; the run goes on without it\n"


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_an_earlier_start_told_is_not_told_twice(goes_on: bool) -> None:
    notebook = Notebook()
    dropped = [(10, {"loss/all": 2.0, "accuracy/all": 0.5, "time/left": 7.0}), (15, {"loss/all": 1.0})]
    service = Service("wandb", lambda: (notebook, goes_on), dropped)
    again = {"loss/all": 2.0, "accuracy/all": 0.25, "time/left": 8.0}  # another config's accuracy
    service.scalars(10, again)
    service.scalars(15, {"loss/all": 1.0})
    service.scalars(20, {"loss/all": 1.0})
    first = [(10, {"accuracy/all": 0.25})] if goes_on else [(10, again), (15, {"loss/all": 1.0})]
    assert notebook.told == [*first, (20, {"loss/all": 1.0})]


def test_an_error_of_the_run_is_told_to_the_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = {"ended": Notebook(), "failed": Notebook()}
    for name, book in books.items():
        monkeypatch.setattr("mpp.training.log._logger", lambda *_, book=book: book)
        log = RunLog(tmp_path / name)
        try:
            if name == "failed":
                raise ValueError
        except ValueError:
            log.close()
        else:
            log.close()
    assert [book.told[-1] for book in books.values()] == [("close", False), ("close", True)]
