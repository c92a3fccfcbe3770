"""Fixtures of the tests of the report."""

from collections.abc import Sequence
from typing import Any

import pytest

from mpp.report.charts import Line
from mpp.report.page import Picture


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are described, not drawn, which takes a while and has tests of its own."""

    def described(name: str, alt: str, lines: Sequence[Line], **options: Any) -> Picture:
        assert all(len(line.x) == len(line.y) > 0 for line in lines)
        return Picture(name, alt, "<svg xmlns='http://www.w3.org/2000/svg'/>", options["caption"])

    monkeypatch.setattr("mpp.report.curves.line_chart", described)
