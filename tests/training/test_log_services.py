"""Runs in Weights & Biases and MLflow, written by their own libraries and read back."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.training.log import RunLog
from tests.training.test_loggers import Config

STARTS = ((0, range(1, 7)), (3, range(4, 9)))
"""A run that was killed after step 6 and went on from its checkpoint of step 3."""


def write(folder: Path, name: str, resume: int, steps: range) -> None:
    """What a run writes from its start, or from the step after `resume`."""
    log = RunLog(folder, resume, (name,), Config(lr=0.2 if resume else 0.1))
    for step in steps:
        log.row(step, 8 * step, {"loss": 1 / step, "time/left": 9.0 + resume, "event": "words"})
    log.picture("reconstruction", steps[-1], np.full((4, 6, 3), 7, np.uint8))
    log.flush()
    log.close()


def records(path: Path) -> Iterator[Any]:
    """What an offline run of Weights & Biases has written: a LevelDB log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    held, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(held):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", held[at : at + 7])
        part += held[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


PASSWORD = "sesame-open"  # of an address on the command line


def write_elsewhere(folder: Path, resume: int, steps: range, **environment: str) -> str:
    """`write` for Weights & Biases in a process of its own, as that remembers the environment; what it says."""
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = folder.parent / "home"  # without an account
    home.mkdir(exist_ok=True)
    call = f"write(Path({str(folder)!r}), 'wandb', {resume}, {steps!r})"
    code = f"from pathlib import Path; from tests.training.test_log_services import write; {call}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "--data", f"shards:http://bob:{PASSWORD}@host/a.tar"],
        env={**kept, "HOME": str(home), "WANDB_SILENT": "true", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


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
    rows = [row_of(record.history) for start in read for record in start if record.HasField("history")]
    losses = [(row["step"], row["loss/all"]) for row in rows if "loss/all" in row]
    assert losses == [(step, 1 / step) for step in range(1, 9)]
    assert all("event" not in name for row in rows for name in row)
    pictures = [(row["step"], row["reconstruction.width"]) for row in rows if "reconstruction.width" in row]
    assert pictures == [(6, 6), (8, 6)]
    assert {"lr", "data.sizes"} <= {key for start in read for key in settings_of(start)}
    assert "secret" not in "".join(str(record) for start in read for record in start)
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "pictures", "wandb.json", "wandb"}
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not [held for held in files if PASSWORD.encode() in held]


def row_of(history: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}


def settings_of(start: list[Any]) -> set[str]:
    updates = [record.config.update for record in start if record.HasField("config")]
    return {item.key or ".".join(item.nested_key) for update in updates for item in update}


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
    err = capsys.readouterr().err
    assert err.startswith("log.to mlflow: ")
    assert "127.0.0.1" in err
    assert "secret" not in err
    assert err.count("\n") == 1
    assert len((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()) == 2
