"""The time that a save takes from training: what is measured, and what is refused; the seconds are the machine's."""

import re
from pathlib import Path

import pytest
from bench import bench

TINY = ("saving", "--model", "vit_tiny_patch16_224", "--device", "cpu", "--repeats", "2")


def test_it_prints_stops_and_writing_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([*TINY, "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    # 5.6 M parameters, three times four bytes each.
    assert re.search(r"vit_tiny_patch16_224 with Adam's moments, 0\.0[67]\d* GB, from cpu", out)
    for line in ("training stops, later", "until it is on disk", "written at once"):
        assert re.search(rf"  {line} +\S+ s \(\S+ to \S+\)\n", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        (("--folder", "/nowhere"), 1, "cannot write to /nowhere: No such file or directory"),
        (("--model", "vit_huge"), 2, "has no model 'vit_huge'"),
        (("--repeats", "0"), 2, "repeats must be at least 1, got 0"),
    ],
)
def test_what_is_refused(changed: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([*TINY, *changed]) == code
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
