"""Several processes under torchrun do what one does."""

import signal
from pathlib import Path

import pytest
import torch

from mpp.cli import pretrain
from tests import runs

# fp32 without stochastic depth, whose draws depend on the split; and an epsilon well above rounding, or Adam would
# make whole steps of the gradients that are nothing but rounding (those of the keys' biases).
SPLIT = {"model__drop_path": "0", "train__precision": "fp32", "optim__eps": "1e-4"}


def test_two_processes_do_what_one_does(source: str, tmp_path: Path) -> None:
    settings = {**SPLIT, "train__length": "15 steps", "fewshot__shots": "1,5"}
    process = runs.torchrun(runs.command(source, tmp_path / "two", **settings))
    assert pretrain(runs.command(source, tmp_path / "one", **settings)[1:]) == 0
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.count("Finished: 15 steps, 240 images.") == 1
    one, two = runs.figures(tmp_path / "one"), runs.figures(tmp_path / "two")
    assert [(row["step"], sorted(row)) for row in two] == [(row["step"], sorted(row)) for row in one]
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=1e-4)
    first, second = (runs.final_state(tmp_path / name) for name in ("one", "two"))
    for part in ("model", "ema"):
        for name, value in first[part].items():
            torch.testing.assert_close(second[part][name], value, rtol=0, atol=1e-5, msg=f"{part}.{name}")
    assert second["images_seen"] == 240


@pytest.mark.slow
def test_torchrun_that_is_asked_to_stop_saves_for_any_number_of_processes(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SPLIT, "train__length": "150 steps", "fewshot__data": ""}
    run_dir = tmp_path / "run"
    process = runs.torchrun(runs.command(source, run_dir, **settings))
    runs.wait_for_checkpoint(process, run_dir, step=7)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("the same command again goes on") == 1
    stopped = runs.final_state(run_dir)["images_seen"]
    assert 7 * 16 <= stopped < 150 * 16
    assert pretrain(runs.command(source, run_dir, **settings)[1:]) == 0
    assert f"at step {stopped // 16} of 150" in capsys.readouterr().err
    assert runs.final_state(run_dir)["images_seen"] == 150 * 16
