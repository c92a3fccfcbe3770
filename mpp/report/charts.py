"""Charts as SVG: text stays text, and the colours follow the page's light or dark.

Matplotlib draws with colours that stand for roles, and `_svg` puts CSS variables in their place, each with its light
colour as fallback for a chart outside a page. Matplotlib is loaded only when a chart is drawn.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from mpp.data.sources.names import printable
from mpp.downstream.plots import PALETTE
from mpp.report.page import Picture
from mpp.system.process import shared, without_warnings

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_POINTS = 400
"""Points of a line; of more, each point drawn is the mean of consecutive ones."""

_WIDTH, _HEIGHT = 440, 264  # CSS pixels of a chart without its legend: the letters are still legible at a width of 350
_SHOWN = 600  # CSS pixels of a chart's width on the page, at most
_LEGEND_ROW, _LETTER, _LONGEST = 19, 7.4, 48  # a row's height, a letter's usual width, letters of a name
_MARKERS = "osD^vPX"
_DASHES = ("-", (0, (1, 1.6)), (0, (6, 1.5, 1, 1.5)))  # past the last colour, the dashes distinguish lines
_INK, _MUTED, _RULE, _PAPER = "#fe0101", "#fe0103", "#fe0105", "#fe0107"
_SERIES = tuple(f"#fe02{2 * i + 1:02x}" for i in range(len(PALETTE)))
_ROLES = {
    _INK: "var(--ink, #222222)",
    _MUTED: "var(--muted, #5c5c5c)",
    _RULE: "var(--rule, #dddddd)",
    _PAPER: "var(--paper, #ffffff)",
} | {role: f"var(--series-{i}, {PALETTE[i - 1]})" for i, role in enumerate(_SERIES, start=1)}


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart."""

    label: str
    """Its name in the legend; "" for none."""
    x: Float[np.ndarray, " n"]
    """In the order in which they are joined."""
    y: Float[np.ndarray, " n"]
    """NaN leaves a gap."""
    spread: Float[np.ndarray, " n"] | None = None
    """The half-height of a band around the line."""
    dashed: bool = False
    """For comparisons such as trivial baselines."""
    colour: int | None = None
    """Number in the palette from 0; None: the line's own position among the lines."""


@dataclass(frozen=True, eq=False)
class Points:
    """One group of points: label, x and y (n,), colour as in `Line`. `faint` puts them behind the others."""

    label: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    colour: int
    faint: bool = False


def line_chart(
    name: str,
    alt: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    percent_y: bool = False,
    log_x: bool = False,
    caption: str = "",
    markers: bool = False,
) -> Picture:
    """Draws one or more lines over a common axis, with a legend below; past the seventh with other dashes.

    A line of more than `MOST_POINTS` points is thinned to means that leave out NaN. A point without neighbours is
    drawn as a dot. `percent_y`: y is a fraction, 0 to 1, and shown in percent; `markers`: a dot at every point.
    """
    with _drawing([line.label for line in lines], _HEIGHT) as (figure, axes):
        handles, lowest = [], np.inf
        for i, line in enumerate(lines):
            lap, colour = divmod(i if line.colour is None else line.colour, len(_SERIES))
            spread = np.zeros(len(line.x)) if line.spread is None else line.spread
            at, height, spread = _thinned(np.array([line.x, line.y, spread], dtype=np.float64))
            if percent_y:
                height, spread = 100 * height, 100 * spread
            lowest = min(lowest, np.nanmin(height - np.nan_to_num(spread), initial=np.inf))
            style: dict[str, Any] = {"color": _SERIES[colour], "markersize": 5, "markeredgewidth": 0}
            handles += axes.plot(
                at, height, linewidth=1.6 if line.dashed else 2, marker=_MARKERS[(i + lap) % 7] if markers else "",
                linestyle=(0, (4, 2.4)) if line.dashed else _DASHES[lap % 3], **style,
            )  # fmt: skip
            if not markers:
                known = np.pad(np.isfinite(height), 1)
                alone = known[1:-1] & ~known[:-2] & ~known[2:]
                axes.plot(at[alone], height[alone], linestyle="", marker="o", **style)
            if line.spread is not None:
                axes.fill_between(at, height - spread, height + spread, color=_SERIES[colour], alpha=0.18, linewidth=0)
        if log_x:
            axes.set_xscale("log")
        if percent_y and lowest >= 0:
            axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.grid(axis="y", color=_RULE, linewidth=0.8)
        _write_axes(axes, x, y, " %" if percent_y else "")
        _add_legend(figure, handles, [line.label for line in lines])
        return Picture(name, alt, _svg(figure), caption, width=_SHOWN)


def scatter_chart(name: str, alt: str, groups: Sequence[Points], *, x: str, y: str, caption: str = "") -> Picture:
    """Draws groups of points, each with a colour and a marker, and a legend below; arguments as of `line_chart`."""
    with _drawing([group.label for group in groups], _HEIGHT + 30) as (figure, axes):
        handles = []
        for group in groups:
            handles += axes.plot(
                group.x, group.y, linestyle="none", color=_SERIES[group.colour % 7], marker=_MARKERS[group.colour % 7],
                markersize=4 if group.faint else 5.5, markeredgewidth=0 if group.faint else 0.6,
                markeredgecolor=_PAPER, alpha=0.5 if group.faint else 0.9, zorder=2 if group.faint else 3,
            )  # fmt: skip
        axes.grid(color=_RULE, linewidth=0.8)
        _write_axes(axes, x, y)
        _add_legend(figure, handles, [group.label for group in groups])
        return Picture(name, alt, _svg(figure), caption, width=_SHOWN)


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
    """Draws bars in the order given, each in its own colour; other arguments as of `line_chart`."""
    with _drawing([], _HEIGHT) as (figure, axes):
        axes.bar(np.arange(len(heights)), heights, 1.0, color=colours / 255, linewidth=0, clip_on=False)
        # A thin outline, for white bars on white and black ones on black.
        axes.stairs(heights, np.arange(len(heights) + 1) - 0.5, color=_MUTED, linewidth=min(0.6, 100 / len(heights)))
        axes.set_xlim(-0.5, len(heights) - 0.5)
        axes.grid(axis="y", color=_RULE, linewidth=0.8)
        _write_axes(axes, x, y)
        return Picture(name, alt, _svg(figure), caption, width=_SHOWN)


@shared
def _settings() -> AbstractContextManager[None]:
    """Our settings of matplotlib, instead of the user's."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "mpp", "text.parse_math": False, "font.size": 13,
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.labelcolor": _MUTED, "ytick.labelcolor": _MUTED,
        "axes.edgecolor": _RULE, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
        "ytick.minor.size": 0, "axes.axisbelow": True, "path.simplify_threshold": 0.3, "legend.fontsize": 12.5,
    }  # fmt: skip
    return matplotlib.rc_context(settings)


@contextmanager
def _drawing(labels: Sequence[str], height: float) -> "Iterator[tuple[Figure, Axes]]":
    """A figure with one pair of axes and room for a legend of these labels."""
    from matplotlib.figure import Figure

    # The reader's fonts may have the glyphs.
    with without_warnings("Glyph .* missing from font"), _settings():
        names = list(filter(None, _names(labels)))
        height += _LEGEND_ROW * -(-len(names) // _columns(names))
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained")
        axes = figure.subplots()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        yield figure, axes


def _thinned(columns: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, "3 m"]:
    """Means of consecutive values without NaN, at most `MOST_POINTS`."""
    step = max(1, -(-columns.shape[1] // MOST_POINTS))
    groups = np.pad(columns, ((0, 0), (0, -columns.shape[1] % step)), constant_values=np.nan).reshape(3, -1, step)
    number = np.isfinite(groups).sum(axis=-1)
    return np.where(number > 0, np.nan_to_num(groups).sum(axis=-1) / np.maximum(number, 1), np.nan)


def _write_axes(axes: "Axes", x: str, y: str, unit_y: str = "") -> None:
    """Names the axes and formats their figures."""
    axes.set_xlabel(printable(x))
    axes.set_ylabel(printable(y))
    points = np.concatenate([np.column_stack(line.get_data()) for line in axes.lines] or [np.zeros((1, 2))])
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=_MUTED)
        return
    _write_ticks(axes.xaxis, "", integer=bool((points[:, 0] % 1 == 0).all()))
    _write_ticks(axes.yaxis, unit_y)


def _write_ticks(axis: "Axis", unit: str, integer: bool = False) -> None:
    """Figures such as 0.25, 2000 or 200k, in the same manner along an axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if axis.get_scale() == "log":
        wide = np.ptp(np.log10(axis.get_view_interval())) > 2.5
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(6 if integer else 5, steps=[1, 2, 2.5, 5, 10], integer=integer))
    largest = float(np.abs(axis.get_view_interval()).max())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _figure_text(value, largest) + unit))


def _figure_text(value: float, largest: float) -> str:
    """One figure of an axis that goes to `largest`."""
    size = abs(value)
    if size < 1e-9 * largest:
        return "0"
    text = f"{size:.6g}"
    if largest >= 10_000:
        text = f"{size / 1e6:.4g}M" if size >= 1e6 else f"{size / 1e3:.4g}k"
    return "\u2212" + text if value < 0 else text


def _names(labels: Sequence[str]) -> list[str]:
    """The labels as the legend shows them, in one line each. A first "_" would hide one from matplotlib."""
    short = [printable(label) for label in labels]
    short = [label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…" for label in short]
    return ["\u200b" + label if label.startswith("_") else label for label in short]


def _columns(names: Sequence[str]) -> int:
    """Columns of the legend."""
    widest = max(map(len, names), default=0)
    return max(1, min(len(names), int(_WIDTH / (40 + _LETTER * widest))))


def _add_legend(figure: "Figure", handles: "Sequence[Artist]", labels: Sequence[str]) -> None:
    """Below the axes, where it covers nothing."""
    named = [(handle, name) for handle, name in zip(handles, _names(labels), strict=True) if name]
    if named:
        shown, names = zip(*named, strict=True)
        figure.legend(
            shown, names, loc="outside lower center", ncols=_columns(names), frameon=False, borderpad=0.3,
            labelspacing=0.35, columnspacing=1.6, handlelength=1.7, handletextpad=0.6,
        )  # fmt: skip


def _svg(figure: "Figure") -> str:
    """The figure as an SVG element, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # A style element would hold for the whole page.
    text = re.sub(r"^.*?(?=<svg)|<!--.*?-->|<style.*?</style>", "", file.getvalue().decode(), flags=re.DOTALL)
    text = text.replace("<svg ", '<svg style="stroke-linejoin: round; stroke-linecap: butt" ', 1).replace('pt"', '"', 2)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    # Attributes, not texts, to a tenth of a pixel.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.4g}", tag[0]), text)
    text = re.sub(r"\s*\n\s*", " ", text)
    return re.sub("|".join(_ROLES), lambda role: _ROLES[role[0]], text)
