"""Charts: what the SVG contains, its size, and that it is the same each time."""

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mpp.report.charts import MOST_POINTS, Line, Points, bar_chart, line_chart, scatter_chart
from mpp.report.page import Picture

X = np.arange(6.0)


def chart(*lines: Line, **options: Any) -> Picture:
    return line_chart("loss", "the loss", lines, **{"x": "step", "y": "loss"} | options)


def texts(picture: Picture) -> list[str]:
    """The texts of the drawing, which must be well-formed XML for that."""
    elements = ElementTree.fromstring(str(picture.image)).iter("{http://www.w3.org/2000/svg}text")
    return [element.text or "" for element in elements]


def first_stroke(picture: Picture) -> np.ndarray:
    """Points (n, 2) of the first line, in the drawing's pixels."""
    found = re.search(r'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: var\(--series-1,', str(picture.image))
    return np.array(re.findall(r"-?[\d.]+", found[1] if found else ""), dtype=float).reshape(-1, 2)


def test_a_line_goes_where_its_figures_say() -> None:
    y = np.array([0.0, 1, 4, 2, 2, 5])
    drawn = first_stroke(chart(Line("", X, y)))
    for axis, values in enumerate((X, y)):
        slope, start = np.polyfit(values, drawn[:, axis], 1)
        np.testing.assert_allclose(drawn[:, axis], slope * values + start, atol=0.1)
        assert slope * (-1) ** axis > 0  # y downwards


def test_colours_are_variables_with_a_fallback_and_text_is_text() -> None:
    dashed = Line('a $x^2$ <b> & "c" \x07', X, X + 1, spread=X, dashed=True)
    drawn = [chart(Line("masked", X, X), dashed, Line("_c", X, X), caption="a caption") for _ in range(2)]
    text = str(drawn[0].image)
    assert text == drawn[1].image  # the same bytes each time
    assert text.startswith("<svg ")
    assert set(re.findall(r"#[0-9a-f]{6}", text.lower())) == set(re.findall(r", (#[0-9a-f]{6})\)", text.lower()))
    assert "<style" not in text  # it would hold for the page around it
    assert "font-family: system-ui" in text
    assert {"step", "loss", "masked", 'a $x^2$ <b> & "c" \\x07', "\u200b_c"} <= set(texts(drawn[0]))


def test_long_lines_are_thinned_to_means_and_small() -> None:
    zigzag = Line("", np.arange(2.0 * MOST_POINTS), np.tile([1.0, 3.0], MOST_POINTS))
    assert np.ptp(first_stroke(chart(zigzag, Line("", X, X)))[:, 1]) < 0.2  # each pair has the mean 2
    noise = np.random.default_rng(0).normal(size=(5, 500))
    picture = chart(*(Line(f"line {i}", np.arange(500.0), row, spread=row**2) for i, row in enumerate(noise)))
    assert len(str(picture.image)) < 70_000


def test_nan_leaves_a_gap_and_a_lone_point_a_dot() -> None:
    text = str(chart(Line("", X, np.array([1.0, 2, np.nan, 3, np.nan, 4]))).image)
    assert re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-1', text)[0].count("L") == 1
    assert text.count("<use ") == 2
    for line in (Line("", X, np.full(6, np.nan)), Line("", X[:0], X[:0])):
        assert "no values" in texts(chart(line))


@pytest.mark.parametrize(
    ("x", "y", "options", "expected"),
    [
        (4e4 * X, X, {}, {"0", "100k", "200k"}),
        (4e5 * X, X, {}, {"1M"}),
        (X, 0.1 * X, {"percent_y": True}, {"0 %", "20 %", "40 %"}),
        (X, -X, {}, {"\u22122"}),
        (X, 4e-5 * X, {}, {"0.0002"}),
        (X, 3.61 + 5e-5 * X, {}, {"3.6101", "3.6102"}),
        (1e4 * (X + 1), X, {"log_x": True, "markers": True}, {"10k", "20k", "50k"}),
        (X, X * 0, {"x": "layer"}, {*"012345"}),  # whole numbers where all x are
    ],
)
def test_ticks_are_short(x: np.ndarray, y: np.ndarray, options: dict[str, Any], expected: set[str]) -> None:
    found = texts(chart(Line("", x, y), **options))
    assert expected <= set(found)
    assert not any(re.fullmatch(r"\u2212.*%|\d\.5", text) for text in found)  # no percent below zero


def test_many_lines_differ_and_are_named() -> None:
    picture = chart(*(Line(f"head {i}", X, X * i) for i in range(16)))
    pattern = r'<path d="[^"]*" clip-path[^>]*style="(fill: none; stroke[^"]*series[^"]*)"'
    assert len(set(re.findall(pattern, str(picture.image)))) == 16
    assert {f"head {i}" for i in range(16)} <= set(texts(picture))


def test_points_and_bars() -> None:
    groups = [Points("one", X, X, colour=2), Points("two", X[:2], X[:2], colour=1, faint=True)]
    picture = scatter_chart("d", "", groups, x="layer", y="distance")
    assert str(picture.image).count("<use ") == 6 + 2 + 2  # and two in the legend
    assert "var(--series-3," in str(picture.image)
    assert {"one", "two", "layer", "distance"} <= set(texts(picture))
    colours = np.array([[18, 52, 86], [255, 255, 255]], dtype=np.uint8)
    text = str(bar_chart("d", "", np.array([1.0, 2]), colours, x="colour", y="share").image)
    paths = re.findall(r'd="([^"]*)" [^>]*style="fill: (#\w+)"', text)
    assert [colour for _, colour in paths] == ["#123456", "#ffffff"]
    heights = [float(path.split("L")[1].split()[1]) - float(path.split("L")[2].split()[1]) for path, _ in paths]
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.01)
