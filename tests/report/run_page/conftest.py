"""What the tests of run pages share."""

import pytest

from tests.report.run_page.run_folders import undrawn


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Charts are described, not drawn, but in tests that say drawn in their name."""
    if "drawn" not in request.node.name:
        monkeypatch.setattr("mpp.report.run_page.curves.line_chart", undrawn)
        monkeypatch.setattr("mpp.report.run_page.comparison.line_chart", undrawn)
