"""What TensorBoard, Weights & Biases and MLflow are told, and that the last two cannot end a run."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp.config import parse
from mpp.errors import ConfigError
from mpp.recipes import PretrainConfig
from mpp.train.log import RunLog
from mpp.train.log_tensorboard import TensorBoard, charts, sprite
from mpp.train.loggers import Logger, Service, Setting, flat, tag


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
        monkeypatch.setattr("mpp.train.log._logger", lambda *_, book=book: book)
        log = RunLog(tmp_path / name)
        try:
            if name == "failed":
                raise ValueError
        except ValueError:
            log.close()
        else:
            log.close()
    assert [book.told[-1] for book in books.values()] == [("close", False), ("close", True)]


def test_the_layout_has_a_chart_for_what_there_is_and_no_other() -> None:
    assert charts([]) == {}
    assert charts(["accuracy/masked", "accuracy/all", "train/grad_norm", "schedule/epoch"]) == {
        "What it learns": {"accuracy in training": ["Multiline", ["accuracy/all", "accuracy/masked"]]}
    }
    spread = [f"fewshot_spread/{shots}shot_{end}" for shots in (10, 5) for end in ("std", "low", "high")]
    found = charts(["fewshot/5shot", "fewshot/10shot", *spread, "time/data_wait", "mse/all"])
    assert list(found) == ["What it learns", "What it is worth", "How it runs"]
    assert list(found["What it is worth"].values()) == [
        ["Margin", [f"fewshot/{shots}shot", f"fewshot_spread/{shots}shot_low", f"fewshot_spread/{shots}shot_high"]]
        for shots in (5, 10)
    ]


@pytest.mark.parametrize(("number", "height", "width", "one"), [(5, 8, 6, (8, 6)), (4, 128, 96, (64, 48))])
def test_a_sprite_holds_the_thumbnails_row_by_row(number: int, height: int, width: int, one: tuple[int, int]) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (number, 1, 1, 3), dtype=np.uint8)
    sheet, size = sprite(np.broadcast_to(colours, (number, height, width, 3)))
    places = 3 if number == 5 else 2
    assert size == one
    assert sheet.shape == (places * one[0], places * one[1], 3)
    cells = sheet.reshape(places, one[0], places, one[1], 3).transpose(0, 2, 1, 3, 4).reshape(-1, *one, 3)
    np.testing.assert_array_equal(cells[:number], np.broadcast_to(colours, (number, *one, 3)))
    assert not cells[number:].any()


def test_a_sprite_of_very_many_images_is_no_larger_than_browsers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.train.log_tensorboard._SPRITE", 104)
    sheet, size = sprite(np.zeros((25, 32, 16, 3), np.uint8))
    assert size == (20, 10)
    assert sheet.shape == (100, 50, 3)


def test_an_embedding_takes_the_place_of_the_earlier_one_of_its_name(tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    rng = np.random.default_rng(0)
    for start in range(2):
        board = TensorBoard(tmp_path, start, [])
        features = rng.normal(size=(3, 4)).astype(np.float32)
        board.features("features", features, ["a\tb", "", "c"], None)
        board.features(f"other{start}", features, None, np.zeros((3, 8, 8, 3), np.uint8))
        board.close(False)
    folder = tmp_path / "tensorboard"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [entry.tensor_name for entry in config.embeddings] == ["other0", "features", "other1"]
    entry = config.embeddings[1]
    assert list(entry.tensor_shape) == [3, 4]
    np.testing.assert_array_equal(np.fromfile(folder / entry.tensor_path, np.float32).reshape(3, 4), features)
    assert (folder / entry.metadata_path).read_text().splitlines() == ["a b", "-", "c"]
    with Image.open(folder / config.embeddings[2].sprite.image_path) as image:
        assert image.size == (16, 16)


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
    code = f"from pathlib import Path; from tests.train.test_loggers import write; {call}"
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


def test_settings_that_may_change_are_no_hparams(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board = TensorBoard(tmp_path, 0, [])
    board.settings([Setting("lr", 0.1, False), Setting("on", True, False), Setting("empty", "", False)])
    board.settings([Setting("lr", 0.2, False)])  # a resumption by force: TensorBoard keeps what it was told first
    board.close(False)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    content = multiplexer.PluginRunToTagToContent("hparams")["tensorboard"]
    told = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in told.items()} == {"lr": 0.1, "on": "True"}
