"""Fixtures of the tests of the report."""

import pytest

from tests.report.run_folders import undrawn


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Curves are described, not drawn, but in tests with "drawn" in their name."""
    if "drawn" not in request.node.name:
        monkeypatch.setattr("mpp.report.curves.line_chart", undrawn)
