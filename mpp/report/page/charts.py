"""Charts as SVG: text stays text, and the colours follow the page's light or dark.

Matplotlib is loaded only when a chart is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from mpp.report.page.drawing import (
    HEIGHT,
    MUTED,
    PAPER,
    ROLES,
    RULE,
    SERIES,
    WIDTH,
    add_legend,
    drawing,
    svg_text,
    write_axes,
)
from mpp.report.page.parts import Picture

MOST_POINTS = 400
"""Points of a line; of more, consecutive ones are drawn as their mean."""

_SHOWN = 600  # CSS pixels that a chart takes at most
_MARKERS = "osD^vPX"
_DASHES = ("-", (0, (1, 1.6)), (0, (6, 1.5, 1, 1.5)))  # past the last colour, other lines tell them apart
_DASHED = (0, (4, 2.4))


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart.

    Attributes:
        label: its name in the legend; "" for none.
        x: (n,), in the order in which they are joined.
        y: (n,); NaN leaves a gap.
        spread: (n,), the half-height of a band around the line, or None.
        dashed: for what stands beside, such as trivial baselines.
        colour: number in the palette, counted from 0; None: the line's own place among the lines.
    """

    label: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    spread: Float[np.ndarray, " n"] | None = None
    dashed: bool = False
    colour: int | None = None


@dataclass(frozen=True, eq=False)
class Points:
    """One group of points: label, x and y (n,), colour as in `Line`. `faint` puts them behind the others."""

    label: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    colour: int | None = None
    faint: bool = False


def line_chart(
    name: str,
    alt: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    percent_y: bool = False,
    log_y: bool = False,
    log_x: bool = False,
    caption: str = "",
    markers: bool = False,
) -> Picture:
    """Lines over a common axis, with a legend below.

    A line of more than `MOST_POINTS` points is thinned: each point that is drawn is the mean of as many consecutive
    ones, of those that are no NaN. A point without neighbours is drawn as a dot.

    Args:
        name: of the picture.
        alt: what it shows, in a sentence.
        lines: one or more; past the seventh, the colours come again with other dashes.
        x: what the axis shows, with its unit.
        y: the same of the other axis.
        percent_y: y is a fraction, 0 to 1, and shown in percent.
        log_y: logarithmic; values of 0 or less are left out.
        log_x: the same of the other axis.
        caption: a few words under it.
        markers: a dot at every point; with log_x, the axis names their places, rounded, where these are not too near.

    Raises:
        ValueError: no lines, or a line whose arrays differ in length.
    """
    if not lines:
        raise ValueError(f"the chart {name} needs one line or more")
    with drawing([line.label for line in lines]) as (figure, axes):
        handles = []
        lowest = np.inf
        for i, line in enumerate(lines):
            colour, lap = _colour(i if line.colour is None else line.colour)
            at, height, spread = _thinned(line)
            if percent_y:
                height, spread = 100 * height, 100 * spread
            at, height = _positive(at, log_x), _positive(height, log_y)
            lowest = min(lowest, np.nanmin(height - np.nan_to_num(spread), initial=np.inf))
            dash = _DASHED if line.dashed else _DASHES[lap % len(_DASHES)]
            marker = _MARKERS[(i + lap) % len(_MARKERS)]
            style: dict[str, Any] = {"color": colour, "markersize": 5, "markeredgewidth": 0}
            width = 1.6 if line.dashed else 2
            handles += axes.plot(at, height, linestyle=dash, linewidth=width, marker=marker if markers else "", **style)
            if not markers:
                alone = _alone(at, height)
                axes.plot(at[alone], height[alone], linestyle="", marker="o", **style)
            if line.spread is not None:
                low = _positive(height - spread, log_y)
                axes.fill_between(at, low, height + spread, color=colour, alpha=0.18, linewidth=0)
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        elif percent_y and lowest >= 0:
            axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        places = {float(f"{at:.3g}") for line in lines for at in line.x if at > 0} if log_x and markers else ()
        write_axes(axes, x, y, percent_y, sorted(places))
        add_legend(figure, handles, [line.label for line in lines])
        return Picture(name, alt, svg_text(figure), caption, width=_SHOWN)


def scatter_chart(
    name: str,
    alt: str,
    groups: Sequence[Points],
    *,
    x: str,
    y: str,
    caption: str = "",
    equal: bool = False,
    limits: tuple[float, float, float, float] | None = None,
) -> Picture:
    """Groups of points, each with a colour and a marker of its own, and a legend below.

    Args:
        name: of the picture.
        alt: what it shows, in a sentence.
        groups: one or more; past the seventh, the colours come again with other markers.
        x: what the axis shows, with its unit; with both "", the axes have no figures, as those of a projection.
        y: the same of the other axis.
        caption: a few words under it.
        equal: one unit is as long on both axes.
        limits: least and largest x, least and largest y; None: what holds all points.

    Raises:
        ValueError: no groups, or a group whose arrays differ in length.
    """
    if not groups:
        raise ValueError(f"the chart {name} needs one group of points or more")
    with drawing([group.label for group in groups], WIDTH - 60 if equal else HEIGHT + 30) as (figure, axes):
        handles = []
        for i, group in enumerate(groups):
            number = i if group.colour is None else group.colour
            colour, lap = _colour(number)
            handles += axes.plot(
                group.x, group.y, linestyle="none", color=colour, marker=_MARKERS[(number + lap) % len(_MARKERS)],
                markersize=4 if group.faint else 5.5, markeredgewidth=0 if group.faint else 0.6,
                markeredgecolor=PAPER, alpha=0.5 if group.faint else 0.9, zorder=2 if group.faint else 3,
            )  # fmt: skip
        if equal:
            axes.set_aspect("equal", adjustable="datalim" if limits is None else "box")
        if limits is not None:
            axes.set(xlim=limits[:2], ylim=limits[2:])
        if x or y:
            axes.grid(color=RULE, linewidth=0.8)
            write_axes(axes, x, y)
        else:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
        add_legend(figure, handles, [group.label for group in groups])
        return Picture(name, alt, svg_text(figure), caption, width=WIDTH if equal else _SHOWN)


def bar_chart(
    name: str,
    alt: str,
    heights: Float[np.ndarray, " n"],
    colours: UInt8[np.ndarray, "n 3"],
    *,
    x: str,
    y: str,
    caption: str = "",
) -> Picture:
    """Bars side by side in the order given, each in its own colour, such as a histogram of colours.

    Args:
        name: of the picture.
        alt: what it shows, in a sentence.
        heights: of the bars; those of 0 keep their place.
        colours: red, green, blue of each bar.
        x: what the bars are.
        y: what the heights are, with their unit.
        caption: a few words under it.

    Raises:
        ValueError: no bars, or as many colours as there are no bars.
    """
    if not len(heights) or colours.shape != (len(heights), 3):
        raise ValueError(f"the chart {name} needs bars with a colour each, got {heights.shape} and {colours.shape}")
    with drawing([]) as (figure, axes):
        shown = np.flatnonzero(heights)
        # A colour that stands for a role would be taken for it: the next blue is as good.
        own = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours[shown]]
        own = [colour[:-1] + "0" if colour in ROLES else colour for colour in own]
        axes.bar(shown, heights[shown], 1.0, color=own, linewidth=0, clip_on=False)
        # A thin outline, for white bars on white and black ones on black.
        axes.stairs(heights, np.arange(len(heights) + 1) - 0.5, color=MUTED, linewidth=min(0.6, 100 / len(heights)))
        axes.set_xlim(-0.5, len(heights) - 0.5)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        write_axes(axes, x, y)
        return Picture(name, alt, svg_text(figure), caption, width=_SHOWN)


def _colour(number: int) -> tuple[str, int]:
    """Of the palette, and how many times it has been gone through."""
    return SERIES[number % len(SERIES)], number // len(SERIES)


def _thinned(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and spread (zeros where there is none) of at most `MOST_POINTS` points."""
    spread = np.zeros(len(line.x)) if line.spread is None else line.spread
    if not len(line.x) == len(line.y) == len(spread):
        raise ValueError(f"the line {line.label!r} has {len(line.x)} x, {len(line.y)} y, {len(spread)} spreads")
    columns = np.array([line.x, line.y, spread], dtype=np.float64)
    step = -(-len(line.x) // MOST_POINTS)
    if step > 1:
        whole = np.pad(columns, ((0, 0), (0, -len(line.x) % step)), constant_values=np.nan).reshape(3, -1, step)
        known = ~np.isnan(whole)
        columns = np.where(known, whole, 0).sum(axis=-1) / np.where(known.any(axis=-1), known.sum(axis=-1), np.nan)
    x, y, around = columns
    return x, y, around


def _positive(values: np.ndarray, needed: bool) -> np.ndarray:
    """NaN for what a logarithm has no place for."""
    return np.where(values > 0, values, np.nan) if needed else values


def _alone(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points have no neighbour that a line could join them to."""
    there = np.pad(np.isfinite(x) & np.isfinite(y), 1)
    return there[1:-1] & ~there[:-2] & ~there[2:]
