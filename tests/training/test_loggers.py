"""What loggers get, that a service cannot end a run, and runs in Weights & Biases and MLflow read back."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.config import parse
from mpp.errors import ConfigError
from mpp.pretraining.settings import PretrainConfig
from mpp.training.log import RunLog
from mpp.training.loggers import Service, settings_of, tag


def test_figures_are_grouped_by_what_is_compared() -> None:
    words = """loss loss/all, loss_masked loss/masked, accuracy accuracy/all, lr schedule/lr, epoch schedule/epoch,
        accuracy_baseline_frequent accuracy/trivial_frequent, mse_baseline_neighbours mse/trivial_neighbours,
        grad_norm train/grad_norm, fewshot/5shot fewshot/5shot, fewshot/5shot_std fewshot_spread/5shot_std,
        time/images_per_second time/images_per_second"""
    for name, expected in map(str.split, words.split(",")):
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


def test_settings_have_dotted_names_and_no_credentials() -> None:
    assert list(settings_of(Config())) == [
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
    assert next(setting for setting in settings_of(config) if setting.name == "log.to").free
    for words, text in ((["wandb", "wandb"], r"log\.to takes different loggers, got wandb wandb"), (["comet"], "log")):
        with pytest.raises(ConfigError, match=text):
            parse(PretrainConfig, ["--log.to", *words], "x", "", {})


class Notebook(Service):
    """Notes what it gets, until it breaks."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.broken = False

    def send(self, step: int, figures: Any) -> None:
        if self.broken:
            raise RuntimeError("https://me:secret@host/api:\n  no answer.")
        self.notes.append((step, figures))

    def close(self, failed: bool) -> None:
        self.notes.append(("close", failed))


def test_the_first_failure_of_a_service_is_printed_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, notebook = [], Notebook()

    def open_logger(name: str, *_: Any) -> Notebook:
        opened.append(name)
        if name == "mlflow":
            raise ConnectionError
        return notebook

    monkeypatch.setattr("mpp.training.log.open_logger", open_logger)
    log = RunLog(tmp_path, to=("wandb", "mlflow"))
    assert capsys.readouterr().err == "log.to mlflow: ConnectionError; the run goes on without it\n"
    log.row(5, 40, {"loss": 1.0})
    notebook.broken = True
    log.row(10, 80, {"loss": 1.0})
    assert capsys.readouterr().err == "log.to wandb: https://host/api: no answer; the run goes on without it\n"
    notebook.broken = False
    log.row(15, 120, {"loss": 1.0})
    log.show("x", 5, np.zeros((2, 2, 3), np.uint8))
    log.features("x", np.zeros((1, 1), np.float32))
    log.flush()
    log.close()
    assert capsys.readouterr().err == ""
    assert opened == ["wandb", "mlflow"]
    assert notebook.notes == [(5, {"loss/all": 1.0})]


def test_what_an_earlier_start_sent_is_not_sent_again() -> None:
    notebook = Notebook()
    notebook.sent = {(10, "loss/all"): 2.0, (10, "accuracy/all"): 0.5, (10, "time/left"): 7.0, (15, "loss/all"): 1.0}
    notebook.scalars(10, {"loss/all": 2.0, "accuracy/all": 0.25, "time/left": 8.0})  # another config's accuracy
    notebook.scalars(15, {"loss/all": 1.0})
    notebook.scalars(20, {"loss/all": 1.0})
    assert notebook.notes == [(10, {"accuracy/all": 0.25}), (20, {"loss/all": 1.0})]


@pytest.mark.parametrize("failed", [False, True])
def test_loggers_are_closed_with_whether_the_run_failed(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Notebook()
    monkeypatch.setattr("mpp.training.log.open_logger", lambda *_: notebook)
    log = RunLog(tmp_path)
    with suppress(ValueError), closing(log):  # as the recipes do
        if failed:
            raise ValueError
    assert notebook.notes == [("close", failed)]


STARTS = ((0, range(1, 7)), (3, range(4, 9)))
"""A run that was killed after step 6 and went on from its checkpoint of step 3."""
PASSWORD = "sesame-open"  # of an address on the command line


def write(folder: Path, name: str, resume: int, steps: range) -> None:
    """Write what a run does from its start, or from the step after `resume`."""
    log = RunLog(folder, resume, (name,), Config(lr=0.2 if resume else 0.1))
    for step in steps:
        log.row(step, 8 * step, {"loss": 1 / step, "time/left": 9.0 + resume, "event": "words"})
    log.picture("reconstruction", steps[-1], np.full((4, 6, 3), 7, np.uint8))
    log.flush()
    log.close()


def records(path: Path) -> Iterator[Any]:
    """Read what an offline run of Weights & Biases has written: a LevelDB log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def write_elsewhere(folder: Path, resume: int, steps: range, **environment: str) -> str:
    """`write` for Weights & Biases in a process of its own, as it remembers the environment; returns its stderr."""
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = folder.parent / "home"  # without an account
    home.mkdir(exist_ok=True)
    call = f"write(Path({str(folder)!r}), 'wandb', {resume}, {steps!r})"
    code = f"from pathlib import Path; from tests.training.test_loggers import write; {call}"
    words = [sys.executable, "-W", "error", "-c", code, "--data", f"shards:http://bob:{PASSWORD}@host/a.tar"]
    env = {**others, "HOME": str(home), "WANDB_SILENT": "true", **environment}
    done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def named(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_an_offline_run_of_weights_and_biases_and_its_resumption_are_one(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    said = [write_elsewhere(folder, resume, steps, WANDB_MODE="offline") for resume, steps in STARTS]
    assert said == ["", ""]
    identity = json.loads((folder / "wandb.json").read_text())["run"]
    starts = sorted((folder / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(starts) == 2
    read = [list(records(start / f"run-{identity}.wandb")) for start in starts]
    runs = [next(record.run for record in start if record.HasField("run")) for start in read]
    assert [(run.project, run.display_name, run.run_id) for run in runs] == [("mpp", "first", identity)] * 2
    both = [record for start in read for record in start]
    rows = [named(record.history.item) for record in both if record.HasField("history")]
    losses = [(row["step"], row["loss/all"]) for row in rows if "loss/all" in row]
    assert losses == [(step, 1 / step) for step in range(1, 9)]
    assert all("event" not in name for row in rows for name in row)
    pictures = [(row["step"], row["reconstruction.width"]) for row in rows if "reconstruction.width" in row]
    assert pictures == [(6, 6), (8, 6)]
    settings = {name for record in both if record.HasField("config") for name in named(record.config.update)}
    assert {"lr", "data.sizes"} <= settings
    assert "secret" not in "".join(map(str, both))
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "pictures", "wandb.json", "wandb"}
    assert not [p for p in folder.rglob("*") if p.is_file() and PASSWORD.encode() in p.read_bytes()]


@pytest.mark.slow
def test_without_an_account_of_weights_and_biases_the_run_goes_on(tmp_path: Path) -> None:
    (line,) = write_elsewhere(tmp_path / "first", 0, range(1, 3)).splitlines()
    assert line.startswith("log.to wandb: No API key")
    assert "wandb login" in line
    assert line.endswith("; the run goes on without it")
    assert not (tmp_path / "first" / "wandb.json").exists()


@pytest.mark.slow
def test_a_run_of_mlflow_is_in_the_run_folder_and_goes_on_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # restored afterwards
    folder = tmp_path / "first"
    for resume, steps in STARTS:
        write(folder, "mlflow", resume, steps)
    assert capsys.readouterr().err == ""
    client = MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mpp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["data.source"] == "shards:https://host/a.tar"
    assert (run.data.params["lr"], run.data.tags["changed.lr"]) == ("0.1", "0.2")
    history = client.get_metric_history(run.info.run_id, "loss/all")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 9)]
    assert {"loss/all", "time/left"} == run.data.metrics.keys()
    assert any("reconstruction" in item.path for item in client.list_artifacts(run.info.run_id, "images"))


@pytest.mark.slow
def test_a_server_of_mlflow_that_does_not_answer_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write(tmp_path / "first", "mlflow", 0, range(1, 3))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("log.to mlflow: ")
    assert "127.0.0.1" in line
    assert "secret" not in line
    assert len((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()) == 2
