import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpp.cli import check_data
from tests.curation.made import write_pictures


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`check(data, "--images", "3")`: exit code, printed lines and report.json; `crops` of 512 are surveyed."""

    def run(data: str | Path, *flags: str, crops: int = 64) -> tuple[int, list[str], dict[str, Any]]:
        monkeypatch.setattr("mpp.curation.check_data.SURVEY_IMAGES", crops)
        monkeypatch.setattr("mpp.curation.check_data._TIMED_BATCHES", 1)
        out = tmp_path / "out"
        spec = data if isinstance(data, str) else f"folder:{data}"
        size = () if "--img-size" in flags else ("--img-size", "32")
        workers = () if "--workers" in flags else ("--workers", "0")
        code = check_data(["--data", spec, "--out", str(out), *size, *workers, *flags])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out.splitlines(), json.loads((out / "report.json").read_text())

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """40 small pictures of several formats and sizes in three classes."""
    return write_pictures(tmp_path / "images")
