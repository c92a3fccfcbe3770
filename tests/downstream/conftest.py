"""What several files of fine-tuning start from."""

from pathlib import Path

import pytest

from mpp.cli import pretrain
from tests import runs
from tests.downstream.tuned import write_split


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
