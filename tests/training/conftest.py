"""Fixtures of the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpp import dist


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, over which a model can be sharded as over many."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.stop()
