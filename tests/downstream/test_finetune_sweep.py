"""Several learning rates: chosen on held-out images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mpp.downstream.finetune_result import read_result
from tests import runs
from tests.downstream.tuned import in_timm, pixels, read_csv, tune

SWEEP = {"optim__lr": "0.001,0.1,1e38", "train__length": "12 steps", "data__holdout": "50%"}


@pytest.mark.slow
def test_a_sweep_chooses_on_held_out_training_images(
    split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert tune(split, run_dir, **SWEEP) == 0
    told = capsys.readouterr()
    rows = read_csv(run_dir / "sweep.csv")
    assert [row["lr"] for row in rows] == ["0.001", "0.1", "1e+38"]
    assert rows[2] == {"lr": "1e+38", "held_out_top1": "diverged", "held_out_images": "", "chosen": "0"}
    # Half of 8, 8, 3 and 9 training images, the bad one perhaps among them.
    assert all(int(row["held_out_images"]) in (13, 14) for row in rows[:2])
    accuracy = [float(row["held_out_top1"]) for row in rows[:2]]
    best = rows[int(np.argmax(accuracy))]
    assert [row["chosen"] for row in rows] == ["1" if row is best else "0" for row in rows]
    assert "sweep: optim.lr 1e+38 diverged: the loss is not finite at step " in told.err
    assert "held-out images, by optim.lr:" in told.out
    assert f"best: optim.lr {float(best['lr']):g}; it trains on all 28 images" in told.out
    result = read_result(run_dir)
    assert result is not None
    assert (result.lr, result.train_images) == (float(best["lr"]), 28)
    # What the sweep leaves: results alone, of which none has met the test images.
    for lr in ("0.001", "0.1", "1e+38"):
        left = {path.name for path in (run_dir / "sweep" / f"lr_{lr}").iterdir()}
        assert not left & {"checkpoints", "model", "predictions.csv", "classes.csv"}
        assert ("result.json" in left) == (lr != "1e+38")

    # Again: nothing is trained, nothing changes.
    before = {path: path.read_bytes() for path in run_dir.rglob("*.csv")}
    assert tune(split, run_dir, **SWEEP) == 0
    told = capsys.readouterr()
    assert "sweep: optim.lr" not in told.err
    assert f"optim.lr {float(best['lr']):g} was chosen before, see sweep.csv" in told.out
    assert {path: path.read_bytes() for path in run_dir.rglob("*.csv")} == before

    # A new rate beside the chosen one is not tried, and told of.
    assert tune(split, run_dir, **{**SWEEP, "optim__lr": f"{result.lr},0.5"}) == 0
    new = "see sweep.csv; not tried: 0.5 (choose another --run-dir to try them)"
    assert new in capsys.readouterr().out
    # Another config is refused before the sweep begins.
    assert tune(split, run_dir, **SWEEP, loss__smoothing="0.1") == 2
    told = capsys.readouterr()
    assert "loss.smoothing: 0.0 -> 0.1" in told.err.splitlines()[-1]
    assert "sweep:" not in told.err
    assert tune(split, run_dir, **{**SWEEP, "optim__lr": "0.5,0.6"}) == 2
    assert f"optim.lr: [{result.lr}] -> [0.5, 0.6]" in capsys.readouterr().err.splitlines()[-1]
    assert not (run_dir / "sweep" / "lr_0.5").exists()


def test_a_sweep_of_which_nothing_is_left(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(source, tmp_path / "run", optim__lr="1e37,1e38", optim__clip_norm="0") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune: error: every learning rate of the sweep diverged (1e+37, 1e+38); try lower")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_two_processes_sweep_and_share_batch_statistics(split: str, tmp_path: Path) -> None:
    told = {"model__img_size": "32", "optim__lr": "0.01,1e38", "train__length": "6 steps", "log__evaluate": "2 steps"}
    out, _ = runs.finish(runs.finetune_command(split, tmp_path / "two", init="random:test_resnet", **told), ranks=2)
    assert out.count("best: optim.lr 0.01") == 1
    assert [row["chosen"] for row in read_csv(tmp_path / "two" / "sweep.csv")] == ["1", "0"]
    # What both tested together is what the exported model says.
    model = in_timm(tmp_path / "two")
    rows = read_csv(tmp_path / "two" / "predictions.csv")
    with torch.no_grad():
        best = model(pixels([row["path"] for row in rows], model)).softmax(dim=1).max(dim=1).values
    told_of = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(best, told_of, rtol=0, atol=1e-5)
