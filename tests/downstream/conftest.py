"""What several files of fine-tuning start from."""

from pathlib import Path

import pytest

from mpp.cli import pretrain
from mpp.downstream.finetune_result import read_result
from mpp.downstream.plots import plot_confusion
from tests import runs
from tests.downstream.tuned import Done, read_csv, write_split


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Labelled images with all that goes wrong."""
    return write_split(tmp_path_factory.mktemp("split") / "images")


@pytest.fixture(scope="session")
def pretrained(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run."""
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    assert pretrain(runs.command(source, run_dir, train__length="3 steps", fewshot__data="")[1:]) == 0
    return run_dir


@pytest.fixture(scope="session")
def done(split: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """From scratch on a folder of files."""
    run_dir = tmp_path_factory.mktemp("runs") / "scratch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpp.downstream.finetune.plot_confusion", plot_confusion)
        more = {"data__workers": "2", "log__evaluate": "20 steps", "log__to": "tensorboard"}
        out, err = runs.call(runs.finetune_command(split, run_dir, **more))
    result = read_result(run_dir)
    assert result is not None
    return Done(split, run_dir, out, err, result, read_csv(run_dir / "predictions.csv"))
