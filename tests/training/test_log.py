"""Meters, rows and events, also across a resumption."""

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
from mpp.training.log import Clock, Meter, RunLog, Terminal, read_rows


def figure(total: float, count: float) -> Tensor:
    return torch.tensor([total, count], dtype=torch.float64)


def test_a_meter_weights_by_count() -> None:
    meter = Meter()
    values = [(np.array([1.0, 2.0, 6.0])), np.array([10.0])]
    for batch in values:
        meter.add({"loss": figure(batch.sum(), len(batch))})
    assert meter.read() == {"loss": pytest.approx(np.concatenate(values).mean())}


def test_a_meter_leaves_out_what_counted_nothing() -> None:
    meter = Meter()
    meter.add({"loss": figure(6, 3), "loss_random": figure(0, 0)})
    assert meter.read() == {"loss": 2.0}


def test_a_meter_takes_figures_that_come_later() -> None:
    meter = Meter()
    meter.add({"a": figure(1, 1)})
    meter.add({"a": figure(3, 1), "b": figure(8, 2)})
    assert meter.read() == {"a": 2.0, "b": 4.0}


def test_reading_a_meter_empties_it() -> None:
    meter = Meter()
    meter.add({"loss": figure(6, 3)})
    meter.read()
    assert meter.read() == {}
    meter.add({"loss": figure(5, 1)})
    assert meter.read() == {"loss": 5.0}


def test_a_meter_goes_on_from_its_state() -> None:
    meters = Meter(), Meter()
    meters[0].add({"loss": figure(6, 3)})
    meters[1].load_state_dict([meters[0].state_dict()], torch.device("cpu"))
    for meter in meters:
        meter.add({"loss": figure(5, 1)})
    assert meters[0].read() == meters[1].read() == {"loss": 11 / 4}


def test_a_meter_takes_the_sums_of_all_ranks_where_their_number_changed() -> None:
    meters = Meter(), Meter(), Meter()
    for number, meter in enumerate(meters[:2]):
        meter.add({"loss": figure(6 + number, 3)})
    meters[2].load_state_dict([meter.state_dict() for meter in meters[:2]], torch.device("cpu"))
    assert meters[2].read() == {"loss": 13 / 6}


def test_a_meter_does_not_change_the_figures_it_is_given() -> None:
    meter, given = Meter(), figure(6, 3)
    meter.add({"loss": given})
    meter.add({"loss": given})
    assert given.tolist() == [6, 3]


def test_rows_are_written_and_read(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.row(5, 40, {"loss": 1.5, "event": "words"})
    log.row(10, 80, {"loss": 1.25})
    log.close()
    expected = [{"step": 5, "images": 40, "loss": 1.5, "event": "words"}, {"step": 10, "images": 80, "loss": 1.25}]
    assert read_rows(tmp_path / "metrics.jsonl") == expected
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == expected


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.row(5, 40, {"loss": 1.5})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    log.close()


@pytest.mark.parametrize(
    ("resume", "kept"), [(0, []), (5, [5]), (12, [5, 10]), (20, [5, 10, 15, 20]), (99, [5, 10, 15, 20])]
)
def test_rows_after_the_resumed_step_are_dropped(resume: int, kept: list[int], tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (5, 10, 15, 20):
        log.row(step, 8 * step, {"loss": 0.1})
    log.close()
    RunLog(tmp_path, resume).close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == kept
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("torn", ['{"step": 15, "lo', "{", '{"step": 15, "loss": 0.1'])
def test_a_torn_last_line_is_left_out_and_the_next_row_is_whole(torn: str, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.row(5, 40, {"loss": 0.1})
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_rows(path)] == [5]
    resumed = RunLog(tmp_path, 10)
    resumed.row(15, 120, {"loss": 0.2})
    resumed.close()
    assert [row["step"] for row in read_rows(path)] == [5, 15]


@pytest.mark.parametrize(
    "torn",
    [
        '{"step": 10, "lo{"step": 15, "loss": 0.2}',
        '{"step": 10, "lo\n{"step": 15, "loss": 0.2}',
        "\0" * 9 + '{"step": 15}',
    ],
)
def test_a_torn_line_in_the_middle_costs_no_row_after_it(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "images": 40}\n' + torn + '\n3\nnull\n{"loss": 1}\n{"step": 20, "images": 160}\n')
    assert [row["step"] for row in read_rows(path)] == [5, 15, 20]
    RunLog(tmp_path, 15).close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 15]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.row(5, 40, {"loss": 0.1})
    assert log.picture("x", 5, np.zeros((4, 4, 3), np.uint8)) is None
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_the_finite_numbers(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.row(5, 40, {"loss": 1.5, "time/elapsed": 3, "broken": math.nan, "event": "words"})
    log.row(10, 80, {"loss": 1.25})
    log.close()
    read = events(tmp_path)
    assert set(read.Tags()["scalars"]) == {"loss/all", "time/elapsed"}
    assert [(event.step, event.value) for event in read.Scalars("loss/all")] == [(5, 1.5), (10, 1.25)]


def test_tensorboard_too_forgets_the_rows_after_the_resumed_step(tmp_path: Path) -> None:
    for resume, steps in ((0, (5, 10, 15, 20)), (10, (15,))):
        for path in tmp_path.glob("tensorboard/*"):  # as if written a second earlier: files are read in order of names
            path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
        log = RunLog(tmp_path, resume)
        for step in steps:
            log.row(step, 8 * step, {"loss": float(step + resume)})
        log.close()
    read = [(event.step, event.value) for event in events(tmp_path).Scalars("loss/all")]
    assert read == [(5, 5), (10, 10), (15, 25)]


def test_a_picture_is_a_png_and_an_event(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    log = RunLog(tmp_path)
    path = log.picture("reconstruction", 50, picture, {"layout": '{"rows": 1}'})
    log.close()
    assert path is not None
    with Image.open(path) as written:
        np.testing.assert_array_equal(np.asarray(written), picture)
        assert written.info == {"layout": '{"rows": 1}'}
    (image,) = events(tmp_path).Images("reconstruction")
    assert (image.step, image.height, image.width) == (50, 8, 6)


def test_without_loggers_the_rows_and_pictures_are_all_there_is(tmp_path: Path) -> None:
    log = RunLog(tmp_path, to=())
    log.row(5, 40, {"loss": 1.5})
    log.picture("x", 5, np.zeros((4, 4, 3), np.uint8))
    log.features("features", np.zeros((2, 3), np.float32))
    log.flush()
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "pictures"}


@pytest.mark.parametrize("folder", ["run", None])
def test_a_logger_that_is_not_installed_is_named_before_anything_is_written(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpp.training.loggers.find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(ConfigError, match=r"^log\.to mlflow: mlflow is not installed; pip install mlflow-skinny$"):
        RunLog(tmp_path / folder if folder else None, to=("tensorboard", "mlflow"))
    assert list(tmp_path.iterdir()) == []


def test_a_clock_counts_images_and_time_apart_from_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mpp.training.log.time.perf_counter", lambda: now[0])
    clock = Clock()
    clock.begin(1000)
    now[0] += 14
    clock.waited(1)
    clock.paused(4)
    expected = {"time/images_per_second": 50, "time/data_wait": 0.1, "time/elapsed": 10, "time/left": 30}
    assert clock.read(1500, 3000) == pytest.approx(expected)
    now[0] += 5
    expected = {"time/images_per_second": 100, "time/data_wait": 0, "time/elapsed": 15, "time/left": 1000 / (1000 / 15)}
    assert clock.read(2000, 3000) == pytest.approx(expected)


def test_the_line_of_a_row_shows_the_score_beside_its_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"loss": 3.21, "accuracy": 0.25, "accuracy_baseline_frequent": 0.1, "accuracy_baseline_neighbours": 0.2,
               "lr": 2e-4, "time/images_per_second": 812.0, "time/data_wait": 0.03, "time/left": 3725.0}  # fmt: skip
    Terminal(100, 0).row(7, figures, "accuracy")
    assert capsys.readouterr().err == (
        "step 7/100  loss 3.2100  accuracy 25.0%  (baselines 10.0%, 20.0%)  lr 2.00e-04  812 images/s  data wait 3%  "
        "1:02:05 left\n"
    )


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(100, 0, on=False)
    terminal.say("words")
    terminal.advance(3)
    terminal.close()
    assert capsys.readouterr() == ("", "")
