"""Charts: what the SVG holds, how large it is, and that it is the same each time."""

import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mpp.report.page.charts import MOST_POINTS, Line, Points, bar_chart, line_chart, scatter_chart
from mpp.report.page.drawing import ROLES
from mpp.report.page.parts import Picture

X = np.arange(6.0)


def chart(*lines: Line, **options: Any) -> Picture:
    names: dict[str, Any] = {"x": "step", "y": "loss"}
    return line_chart("loss", "the loss", lines, **names | options)


def texts(picture: Picture) -> list[str]:
    """What stands in the drawing, which must be well-formed XML for that."""
    assert isinstance(picture.image, str)
    return [
        element.text or "" for element in ElementTree.fromstring(picture.image).iter("{http://www.w3.org/2000/svg}text")
    ]


def lines_drawn(picture: Picture, series: int = 1) -> list[np.ndarray]:
    """Points (n, 2) of the strokes of a series, in the drawing's pixels; the first of the legend's are the last."""
    pattern = rf'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: var\(--series-{series},'
    found = re.findall(pattern, str(picture.image))
    return [np.array(re.findall(r"-?[\d.]+", path), dtype=float).reshape(-1, 2) for path in found]


def test_a_line_goes_where_its_figures_say() -> None:
    y = np.array([0.0, 1, 4, 2, 2, 5])
    drawn = lines_drawn(chart(Line("", X, y)))[0]
    for axis, values in enumerate((X, y)):
        slope, start = np.polyfit(values, drawn[:, axis], 1)
        np.testing.assert_allclose(drawn[:, axis], slope * values + start, atol=0.1)
        assert slope * (-1) ** axis > 0  # y downwards


def test_colours_are_variables_with_a_fallback_and_text_is_text() -> None:
    picture = chart(
        Line("masked", X, X), Line('a $x^2$ <b> & "c" \x07', X, X + 1, spread=X, dashed=True), caption="a caption"
    )
    text = str(picture.image)
    assert text.startswith("<svg ")
    assert not any(role in text for role in ROLES)
    assert set(re.findall(r"#[0-9a-f]{6}", text.lower())) == set(re.findall(r", (#[0-9a-f]{6})\)", text.lower()))
    assert "<style" not in text  # it would hold for the page around it
    assert "font-family: system-ui" in text
    assert {"step", "loss", "masked", 'a $x^2$ <b> & "c" \\x07'} <= set(texts(picture))
    assert (picture.name, picture.alt, picture.caption) == ("loss", "the loss", "a caption")


def test_the_same_figures_give_the_same_bytes() -> None:
    drawn = [chart(Line("a", X, X**2, spread=X), Line("b", X, X), markers=True).image for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_long_lines_are_thinned_to_means_and_small() -> None:
    n = 2 * MOST_POINTS
    zigzag = np.tile([1.0, 3.0], n // 2)
    (drawn, *_) = lines_drawn(chart(Line("", np.arange(float(n)), zigzag), Line("", X, X)))
    assert np.ptp(drawn[:, 1]) < 0.2  # each pair has the mean 2
    noise = np.random.default_rng(0).normal(size=(5, 500))
    picture = chart(*(Line(f"line {i}", np.arange(500.0), row, spread=row**2) for i, row in enumerate(noise)))
    assert len(str(picture.image)) < 60_000
    picture = chart(*(Line(f"line {i}", np.arange(500.0), row) for i, row in enumerate(noise)))
    assert len(str(picture.image)) < 40_000


def test_nan_leaves_a_gap_and_a_lone_point_a_dot() -> None:
    y = np.array([1.0, 2, np.nan, 3, np.nan, 4])
    picture = chart(Line("", X, y))
    strokes = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-1', str(picture.image))
    assert strokes[0].count("M") >= 1
    assert strokes[0].count("L") == 1
    assert str(picture.image).count("<use ") == 2
    assert str(chart(Line("", X[:1], X[:1])).image).count("<use ") == 1
    assert "no values" in texts(chart(Line("", X, np.full(6, np.nan)), log_y=True))
    assert "no values" in texts(chart(Line("", X[:0], X[:0])))


def test_ticks_are_short() -> None:
    assert {"0", "100k", "200k"} <= set(texts(chart(Line("", X * 4e4, X))))
    assert "1M" in texts(chart(Line("", X * 4e5, X)))
    assert {"0 %", "20 %", "40 %"} <= set(texts(chart(Line("", X, X / 10), percent_y=True)))
    assert "2·10⁻⁴" in texts(chart(Line("", X, X * 4e-5)))
    assert {"1", "10", "100"} <= set(texts(chart(Line("", X, 10 ** (X / 2)), log_y=True)))
    assert {"2", "5"} <= set(texts(chart(Line("", X + 1, X), log_x=True)))
    assert all(re.fullmatch(r"\d|layer|loss", text) for text in texts(chart(Line("", X, X * 0), x="layer"))[:7])


def test_few_places_on_a_logarithmic_axis_are_named() -> None:
    def figures(*x: float) -> set[str]:
        at = np.array(x)
        picture = chart(Line("", at, at * 0 + 0.5), Line("", at[:0], at[:0]), log_x=True, markers=True)
        return {text for text in texts(picture) if text.endswith("k")}

    assert figures(50_048, 99_968, 2e5, 4e5) == {"50k", "100k", "200k", "400k"}
    assert figures(5e4, 5.1e4, 4e5) == {"50k", "100k", "200k"}  # two would touch
    assert figures(5e4, 1e5, 1.45e5, 2e5, 2.9e5, 4e5) == {"50k", "100k", "145k", "200k", "290k", "400k"}
    assert len(figures(*(1e4 * 2 ** np.arange(12)))) < 12


def test_no_percent_below_zero() -> None:
    assert not any("\u2212" in text for text in texts(chart(Line("", X, X / 500), percent_y=True)))


def test_many_lines_are_told_apart() -> None:
    picture = chart(*(Line(f"_head {i}", X, X * i) for i in range(16)))
    styles = re.findall(
        r'<path d="[^"]*" clip-path[^>]*style="(fill: none; stroke[^"]*series[^"]*)"', str(picture.image)
    )
    assert len(set(styles)) == 16
    assert sum(text.endswith(f"_head {i}") for i in range(16) for text in texts(picture)) >= 16


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="one line or more"):
        chart()
    with pytest.raises(ValueError, match="6 x, 5 y"):
        chart(Line("a", X, X[:5]))
    with pytest.raises(ValueError, match="one group"):
        scatter_chart("d", "", [], x="", y="")
    with pytest.raises(ValueError, match="colour each"):
        bar_chart("d", "", X, np.zeros((5, 3), np.uint8), x="", y="")


def test_scatter() -> None:
    groups = [Points("one", X, X, colour=2), Points("two", X[:2], X[:2], faint=True)]
    picture = scatter_chart("d", "", groups, x="", y="", equal=True, limits=(0, 8, 0, 8))
    assert str(picture.image).count("<use ") == 6 + 2 + 2  # and two in the legend
    assert "var(--series-3," in str(picture.image)
    assert texts(picture) == ["one", "two"]
    ends = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', str(picture.image))[:6]
    (x0, y0), (x5, y5) = (map(float, ends[i]) for i in (0, 5))
    assert x5 - x0 == pytest.approx(y0 - y5, rel=0.01)
    many = np.random.default_rng(0).normal(size=(2, 2000))
    assert len(str(scatter_chart("d", "", [Points("", *many)], x="a", y="b").image)) < 120_000


def test_bars_have_their_own_colours() -> None:
    colours = np.array([[254, 1, 1], [18, 52, 86], [255, 255, 255], [0, 0, 9]], dtype=np.uint8)
    text = str(bar_chart("d", "", np.array([1.0, 2, 3, 0]), colours, x="colour", y="share").image)
    assert {"#fe0100", "#123456", "#ffffff"} <= set(re.findall(r'"fill: (#\w+)"', text))  # the first is a role's own
    assert "#000009" not in text
    heights = [
        float(path.split("L")[1].split()[1]) - float(path.split("L")[2].split()[1])
        for path in re.findall(r'd="([^"]*)" style="fill: #', text)
    ]
    np.testing.assert_allclose(np.array(heights) / heights[0], [1, 2, 3], rtol=0.01)


@pytest.mark.slow
def test_matplotlib_is_loaded_late() -> None:
    code = "import sys, mpp.report.page.charts; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
