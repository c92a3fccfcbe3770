"""The time that a save takes from training: what is measured, and what is refused; the seconds are the machine's."""

import re
from pathlib import Path

import pytest
from bench import bench


@pytest.mark.slow
def test_it_prints_stops_and_writing_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model vit_tiny_patch16_224 --device cpu --repeats 2 --folder"
    assert bench(["saving", *words.split(), str(tmp_path)]) == 0
    out = capsys.readouterr().out
    # 5.6 M parameters, three times four bytes each.
    assert re.search(r"vit_tiny_patch16_224 with Adam's moments, 0\.0[67]\d* GB, from cpu", out)
    for line in ("training stops, later", "until it is on disk", "written at once"):
        assert re.search(rf"  {line} +\S+ s \(\S+ to \S+\)\n", out)
    assert not list(tmp_path.iterdir())
