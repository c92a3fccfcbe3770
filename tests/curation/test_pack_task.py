import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpp.curation.pack_image import PackOptions
from mpp.curation.pack_task import Figures, Plan, pack_task
from mpp.data.settings import DecodeOptions
from mpp.data.sources.in_memory import ListSource
from tests.curation.made import noise, pack


def test_no_standard_deviation_of_nought_is_proposed(
    picture_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(picture_folder("images/1.png") / "images", tmp_path / "out") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert "--data 'shards:" in told
    assert "--data.std" not in told


@pytest.mark.slow
def test_memory_is_that_of_a_shard_whatever_the_images(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    def peak(tasks: int) -> int:
        source = ListSource([encode(noise(8, 8, seed=0))] * 40 * tasks, [0] * 40 * tasks)
        plan = Plan(np.arange(len(source)), 40, 10**9, PackOptions(DecodeOptions()))
        figures = Figures(1, 3)
        gc.collect()
        tracemalloc.start()
        for task in range(tasks):
            figures.merge(pack_task(source, plan, tmp_path, task).figures)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    peak(1)  # what is made once
    assert peak(16) - peak(2) < 560 * 8 * 8 * 3  # less than the pixels of the further images
