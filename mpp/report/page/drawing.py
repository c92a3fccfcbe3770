"""How a chart is drawn: a figure in the colours of roles, its axes, its legend, and the SVG that comes of it.

Matplotlib paints with colours that stand for roles; `svg_text` puts CSS variables in their place, so that a chart
follows the light or dark of its page. Each has its light colour to fall back on, for a chart that stands alone.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mpp.data.sources.names import printable
from mpp.downstream.plots import PALETTE
from mpp.system.process import shared, without_warnings

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 440, 264
"""CSS pixels of a chart without its legend: the letters are still read where it is shown at 350."""

_LETTERS, _SMALL = 13, 12.5
_LEGEND_ROW, _LETTER = 19, 7.4  # a row's height and a letter's usual width in the legend, in CSS pixels
_LONGEST = 48  # letters of a name in the legend
_APART = 0.12  # share of a logarithmic axis between places whose figures do not touch

# What the drawing says, and what the page reads in its place.
INK, MUTED, RULE, PAPER = "#fe0101", "#fe0103", "#fe0105", "#fe0107"
SERIES = tuple(f"#fe02{2 * i + 1:02x}" for i in range(len(PALETTE)))
ROLES = {
    INK: "var(--ink, #222222)",
    MUTED: "var(--muted, #5c5c5c)",
    RULE: "var(--rule, #dddddd)",
    PAPER: "var(--paper, #ffffff)",
} | {said: f"var(--series-{i}, {PALETTE[i - 1]})" for i, said in enumerate(SERIES, start=1)}


@shared
def _settings() -> AbstractContextManager[None]:
    """Ours in the place of matplotlib's."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "mpp", "text.parse_math": False, "font.size": _LETTERS,
        "text.color": INK, "axes.labelcolor": INK, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
        "axes.edgecolor": RULE, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
        "ytick.minor.size": 0, "axes.axisbelow": True, "path.simplify_threshold": 0.3, "legend.fontsize": _SMALL,
    }  # fmt: skip
    return matplotlib.rc_context(settings)


@contextmanager
def drawing(labels: Sequence[str], height: float = HEIGHT) -> "Iterator[tuple[Figure, Axes]]":
    """A figure with its axes, with room for a legend of these labels, drawn in memory and with settings of its own."""
    from matplotlib.figure import Figure

    # The reader's fonts may have the glyphs.
    with without_warnings("Glyph .* missing from font"), _settings():
        rows = _legend_rows(labels)
        figure = Figure(figsize=(WIDTH / 72, (height + _LEGEND_ROW * rows) / 72), dpi=72, layout="constrained")
        axes = figure.subplots()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        yield figure, axes


def write_axes(axes: "Axes", x: str, y: str, percent_y: bool = False, measured: Sequence[float] = ()) -> None:
    """Names the axes and has their figures written out.

    Where the `measured` places along x, ascending, are far enough apart on a logarithmic axis, the figures are theirs.
    """
    axes.set_xlabel(printable(x))
    axes.set_ylabel(printable(y))
    points = np.concatenate([np.column_stack(line.get_data()) for line in axes.lines] or [np.zeros((1, 2))])
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=MUTED)
        return
    places = np.log(measured)
    told = bool((np.diff(places) >= _APART * np.ptp(places)).all()) if len(measured) else False
    whole = bool((points[:, 0] % 1 == 0).all())
    _write_ticks(axes.xaxis, integer=whole, at=measured if told else ())
    _write_ticks(axes.yaxis, " %" if percent_y else "")


def _write_ticks(axis: "Axis", unit: str = "", integer: bool = False, at: Sequence[float] = ()) -> None:
    """Figures such as 0.25, 2000, 200k or 3·10⁻⁴, in the same manner along an axis; `at` these places, if there are."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if at:
        axis.set_major_locator(FixedLocator(at))
        axis.set_minor_locator(NullLocator())
    elif axis.get_scale() == "log":
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
    if largest >= 10_000:
        text = f"{size / 1e6:.4g}M" if size >= 1e6 else f"{size / 1e3:.4g}k"
    elif size >= 1e-3:
        text = f"{size:.6g}"
    else:
        digits, exponent = f"{size:.3e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = ("" if float(digits) == 1 else f"{float(digits):g}·") + f"10{power}"
    return "\u2212" + text if value < 0 else text


def _names(labels: Sequence[str]) -> list[str]:
    """The labels as the legend has them, in one line each. A first "_" would hide one from matplotlib."""
    short = [printable(label) for label in labels]
    short = [label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…" for label in short]
    return ["\u200b" + label if label.startswith("_") else label for label in short]


def _columns(labels: Sequence[str]) -> int:
    widest = max(len(label) for label in labels)
    return max(1, min(len(labels), int(WIDTH / (40 + _LETTER * widest))))


def _legend_rows(labels: Sequence[str]) -> int:
    names = [label for label in _names(labels) if label]
    return -(-len(names) // _columns(names)) if names else 0


def add_legend(figure: "Figure", handles: "Sequence[Artist]", labels: Sequence[str]) -> None:
    """Below the axes, where it covers nothing."""
    named = [(handle, label) for handle, label in zip(handles, _names(labels), strict=True) if label]
    if named:
        shown, names = zip(*named, strict=True)
        figure.legend(
            shown, names, loc="outside lower center", ncols=_columns(names), frameon=False, borderpad=0.3,
            labelspacing=0.35, columnspacing=1.6, handlelength=1.7, handletextpad=0.6,
        )  # fmt: skip


def svg_text(figure: "Figure") -> str:
    """The figure as an SVG element, the same bytes for the same figure, without what a page has no use for."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue().decode()
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _shortened, text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    text = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", text)  # nothing refers to them
    text = re.sub(r"<g/>\n|<defs>\n</defs>\n", "", text)
    text = re.sub(r"<g>\n(<[^\n]*/>)\n</g>", r"\1", text)
    text = re.sub(r"<g([^>]*)>\n((?:<use [^\n]*/>\n)+)</g>", _styled_once, text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub("|".join(ROLES), lambda found: ROLES[found[0]], text)
    width, height = (f"{inches * 72:g}" for inches in figure.get_size_inches())
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" style="stroke-linejoin: round; stroke-linecap: butt">'
    )
    return head + text


def _shortened(found: re.Match[str]) -> str:
    """An attribute with its figures to a tenth of a pixel or better and its lines joined; no turn by 0 degrees."""
    attribute = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.4g}", found[0])
    attribute = re.sub(r"\s*\n\s*", "", attribute)
    return "" if attribute.startswith(' transform="rotate(-0 ') else attribute


def _styled_once(found: re.Match[str]) -> str:
    """A group of markers that all have one style, which the group takes."""
    attributes, markers = found.groups()
    styles = re.findall(r' style="[^"]*"', markers)
    if len(set(styles)) != 1:
        return found[0]
    return f"<g{attributes}{styles[0]}>\n{markers.replace(styles[0], '')}</g>"
