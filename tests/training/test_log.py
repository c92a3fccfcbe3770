"""Meters, rows, events and lines on the terminal, also across a resumption."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mpp.errors import ConfigError
from mpp.training.log import RunLog, Terminal
from mpp.training.meter import Clock, Meter
from mpp.training.rows import last_part, read_rows


def figure(total: float, count: float) -> Tensor:
    return torch.tensor([total, count], dtype=torch.float64)


def test_a_meter_gives_means_weighted_by_count_and_begins_anew() -> None:
    meter, given = Meter(), figure(9, 3)
    for figures in ({"loss": given, "loss_random": figure(0, 0)}, {"loss": given, "accuracy": figure(8, 2)}):
        meter.add(figures)
    meter.add({"loss": figure(10, 1)})
    assert given.tolist() == [9, 3]
    assert meter.read() == {"loss": 28 / 7, "accuracy": 4.0}  # not what counted nothing
    assert meter.read() == {}


@pytest.mark.parametrize(("ranks", "mean"), [(1, 11 / 4), (2, 18 / 7)])
def test_a_meter_goes_on_from_the_states_of_any_number_of_ranks(ranks: int, mean: float) -> None:
    meters = [Meter() for _ in range(ranks)]
    for number, meter in enumerate(meters):
        meter.add({"loss": figure(6 + number, 3)})
    meter = Meter()
    meter.load_state_dict([other.state_dict() for other in meters], torch.device("cpu"))
    meter.add({"loss": figure(5, 1)})
    assert meter.read() == {"loss": mean}


def test_a_clock_counts_images_and_time_apart_from_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now, names = [100.0], ("time/images_per_second", "time/data_wait", "time/elapsed", "time/left")
    monkeypatch.setattr("mpp.training.meter.time.perf_counter", lambda: now[0])
    clock = Clock()
    clock.begin(1000)
    now[0] += 14
    clock.waited(1)
    clock.paused(4)
    assert clock.read(1500, 3000) == pytest.approx(dict(zip(names, (50, 0.1, 10, 30), strict=True)))
    now[0] += 5
    assert clock.read(2000, 3000) == pytest.approx(dict(zip(names, (100, 0, 15, 15), strict=True)))


def write(folder: Path, steps: Any, resume: int = 0, loss: float = 0.1) -> None:
    log = RunLog(folder, resume)
    for step in steps:
        log.row(step, 8 * step, {"loss": loss})
        assert steps_of(folder)[-1] == step  # on disk at once
    log.close()


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("resume", "kept"), [(0, []), (5, [5]), (12, [5, 10]), (20, [5, 10, 15, 20]), (99, [5, 10, 15, 20])]
)
def test_rows_are_written_and_those_after_the_resumed_step_dropped(
    resume: int, kept: list[int], tmp_path: Path
) -> None:
    assert steps_of(tmp_path) == []
    write(tmp_path, (5, 10, 15, 20))
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 5, "images": 40, "loss": 0.1}\n{"step": 10,')
    RunLog(tmp_path, resume).close()
    assert steps_of(tmp_path) == kept
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "torn",
    [
        '{"step": 10, "lo{"step": 15, "loss": 0.2}',
        '{"step": 10, "lo\n{"step": 15, "loss": 0.2}',
        "\0" * 9 + '{"step": 15}',
    ],
)
def test_torn_lines_cost_no_row_after_them(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 5, "images": 40}\n' + torn + '\n3\nnull\n{"loss": 1}\n{"step": 20, "images": 160}\n{"step": 2'
    )
    assert steps_of(tmp_path) == [5, 15, 20]
    write(tmp_path, [25], resume=15)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 15, 25]


def test_the_last_part_is_a_twentieth_of_the_run_and_counts_steps() -> None:
    rows = [{"step": step, "accuracy": step / 1000} for step in (900, 940, 970, 1000)]
    rows[-1] |= {"accuracy_masked": math.nan}
    assert last_part(rows, "accuracy") == ({"accuracy": pytest.approx((30 * 0.97 + 30 * 1.0) / 60)}, 60)


@pytest.mark.parametrize("folder", ["run", None])
def test_without_loggers_rows_and_pictures_are_all_there_is_and_without_a_folder_nothing(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog(Path(folder) if folder else None, to=())
    log.row(5, 40, {"loss": 1.5})
    path = log.picture("x", 5, np.zeros((4, 4, 3), np.uint8))
    log.features("features", np.zeros((2, 3), np.float32))
    log.flush()
    log.close()
    assert {str(file) for file in Path().rglob("*.*")} == ({"run/metrics.jsonl", str(path)} if folder else set())


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_finite_numbers_and_pictures(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    log = RunLog(tmp_path)
    log.row(5, 40, {"loss": 1.5, "time/elapsed": 3, "broken": math.nan, "event": "words"})
    log.row(10, 80, {"loss": 1.25})
    path = log.picture("reconstruction", 50, picture, {"layout": '{"rows": 1}'})
    log.close()
    read = events(tmp_path)
    assert set(read.Tags()["scalars"]) == {"loss/all", "time/elapsed"}
    assert [(event.step, event.value) for event in read.Scalars("loss/all")] == [(5, 1.5), (10, 1.25)]
    (image,) = read.Images("reconstruction")
    assert (image.step, image.height, image.width) == (50, 8, 6)
    with Image.open(path or "") as written:
        np.testing.assert_array_equal(np.asarray(written), picture)
        assert written.info == {"layout": '{"rows": 1}'}


def test_tensorboard_too_forgets_the_rows_after_the_resumed_step(tmp_path: Path) -> None:
    for resume, steps in ((0, (5, 10, 15, 20)), (10, (15,))):
        for path in tmp_path.glob("tensorboard/*"):  # as if written a second earlier: files are read in order of names
            path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
        write(tmp_path, steps, resume, loss=float(resume))
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss/all")] == [(5, 0), (10, 0), (15, 10)]


@pytest.mark.parametrize("folder", ["run", None])
def test_a_logger_that_is_not_installed_is_named_before_anything_is_written(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpp.training.loggers.find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(ConfigError, match=r"^log\.to mlflow: mlflow is not installed; pip install mlflow-skinny$"):
        RunLog(tmp_path / folder if folder else None, to=("tensorboard", "mlflow"))
    assert list(tmp_path.iterdir()) == []


def test_the_line_of_a_row_shows_the_score_beside_its_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"loss": 3.21, "accuracy": 0.25, "accuracy_baseline_frequent": 0.1, "accuracy_baseline_neighbours": 0.2,
               "lr": 2e-4, "time/images_per_second": 812.0, "time/data_wait": 0.03, "time/left": 3725.0}  # fmt: skip
    Terminal(100, 0).row(7, figures, "accuracy")
    assert capsys.readouterr().err == (
        "step 7/100  loss 3.2100  accuracy 25.0%  (baselines 10.0%, 20.0%)  lr 2.00e-04  812 images/s  data wait 3%  "
        "1:02:05 left\n"
    )
    terminal = Terminal(100, 0, on=False)  # as of other ranks
    terminal.say("words")
    terminal.advance(3)
    terminal.close()
    assert capsys.readouterr() == ("", "")
