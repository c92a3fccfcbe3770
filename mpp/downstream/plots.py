"""Pictures of accuracy and of confusion, as files. Matplotlib is loaded only when one is drawn."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from mpp.data.sources.names import printable
from mpp.downstream.estimates import Estimate, over
from mpp.downstream.fewshot import Readout
from mpp.system.files import write_whole
from mpp.system.process import without_warnings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito, "Color Universal Design" (2008), for any colour vision; without their yellow, too pale on white."""

_MARKERS = "osD^vPX"
_LINES = ("-", "--", ":")  # of the first seven, of the next
_WIDTH, _HEIGHT, _DPI = 9.0, 5.4, 200  # inches; 1,800 pixels, which are still read when shown at half the size
_LARGEST_LABELLED = 60  # classes whose names fit beside a confusion matrix
_LARGEST_COUNTED = 12  # classes whose cells hold a figure
_MOST_CELLS = 250  # a side; of more, one cell would be a dot of three pixels
_LONGEST = 24  # characters of a name
_POOLED = {
    "mean": "mean of the patches",
    "token": "class token",
    "mean+token": "mean and class token",
    "quarters": "means of the quarters",
}

ByShots = Mapping[int, Estimate]
"""Accuracy, 0 to 1, by the number of shots."""


def plot_shots(path: Path, results: Mapping[str, ByShots], measured: str = "accuracy (%)") -> None:
    """Draws accuracy against the number of shots, one line per model, with bars of the mean's 95 % interval.

    The ending of `path` tells the format, such as .png or .svg. What was measured once has no bar.
    """
    figure = _figure()
    axes = _new_axes(figure)
    ticks = sorted({k for result in results.values() for k in result})
    for i, (name, result) in enumerate(results.items()):
        shots = sorted(result)
        # Side by side, a few percent apart: bars at the same shots would hide each other.
        x = np.array(shots, dtype=float) * 2 ** (0.04 * (i - (len(results) - 1) / 2))
        mean, bars = (_percent(getattr(result[k], part) for k in shots) for part in ("mean", "half"))
        lap = i // len(PALETTE)  # past the last colour, other lines and markers tell them apart
        axes.errorbar(
            x, mean, yerr=bars, label=_cut(name, 40), color=PALETTE[i % len(PALETTE)], markersize=7, linewidth=2.2,
            marker=_MARKERS[(i + lap) % len(_MARKERS)], linestyle=_LINES[lap % len(_LINES)], elinewidth=1.6, capsize=4,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labelled images per class")
    axes.set_ylabel(measured)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 102.0))  # a t interval of few draws may leave 0 to 100
    axes.legend(frameon=False, loc="best", fontsize=13)
    _bars_title(axes, "95 % interval of the mean", [of for result in results.values() for of in result.values()])
    _save(figure, path)


def plot_layers(path: Path, results: Mapping[Readout, ByShots], measured: str = "accuracy (%)") -> None:
    """Draws accuracy by layer, numbered from 0: a panel per number of shots, a colour per encoder, a line per pooling.

    The bands are the standard deviation. What was measured once has no band. All results have the same shots, and all
    readouts the depth of their encoder.
    """
    from matplotlib.lines import Line2D

    inits, pools = (list(dict.fromkeys(names)) for names in zip(*((of.init, of.pool) for of in results), strict=True))
    colours = {init: PALETTE[i % len(PALETTE)] for i, init in enumerate(inits)}
    lines: dict[tuple[str, str], dict[str, Any]] = {
        (init, pool): {
            "linestyle": _LINES[j % len(_LINES)], "marker": _MARKERS[(j + i // len(PALETTE)) % len(_MARKERS)],
            "markersize": 5, "linewidth": 2,
        }
        for i, init in enumerate(inits) for j, pool in enumerate(pools)
        if any((of.init, of.pool) == (init, pool) for of in results)
    }  # fmt: skip
    shots = list(next(iter(results.values())))
    columns = math.ceil(math.sqrt(len(shots)))
    rows = math.ceil(len(shots) / columns)
    figure = _figure(max(_HEIGHT, 3.2 * rows + 1.0))
    for panel, number in enumerate(shots):
        axes = _new_axes(figure, rows, columns, panel + 1)
        for (init, pool), look in lines.items():
            points = sorted((of.depth + of.layer, of) for of in results if (of.init, of.pool) == (init, pool))
            x = [layer for layer, _ in points]
            mean, std = (
                _percent(getattr(results[of][number], part) for _, of in points) for part in ("mean", "spread")
            )
            axes.plot(x, mean, color=colours[init], **look)
            axes.fill_between(x, mean - std, mean + std, color=colours[init], alpha=0.12, linewidth=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_title(f"{number} labelled image{'s' * (number > 1)} per class", fontsize=13)
    repeated = over(of for result in results.values() for of in result.values())
    bands = f"; bands: standard deviation over {repeated}" if repeated else ""
    figure.supxlabel(f"layer that is read, from 0{bands}", fontsize=13)
    figure.supylabel(measured, fontsize=14)
    handles = [Line2D([], [], label=_cut(init, 34), color=colour, linewidth=4) for init, colour in colours.items()]
    by_pool = {pool: look for (_, pool), look in lines.items()}
    handles += [Line2D([], [], label=_POOLED[pool], color="#555555", **look) for pool, look in by_pool.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 3), frameon=False, fontsize=12)
    _save(figure, path)


def plot_bars(path: Path, groups: Mapping[str, Mapping[str, Estimate]], ylabel: str) -> None:
    """Draws groups of bars with their standard deviation, such as 1 %, 100 % of the labels, scratch and pretrained.

    `groups` are group -> series -> accuracy, 0 to 1, drawn in percent; one that was measured once has no error bar. A
    series has one colour in all groups, and a gap where it is missing.
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure = _figure()
    axes = _new_axes(figure)
    width = 0.8 / len(series)
    estimates = [of for group in groups.values() for of in group.values()]
    for i, name in enumerate(series):
        present = {at: group[name] for at, group in enumerate(groups.values()) if name in group}
        mean, spread = (_percent(getattr(of, part) for of in present.values()) for part in ("mean", "spread"))
        x = np.array(list(present), dtype=float) + (i - (len(series) - 1) / 2) * width
        axes.bar(x, mean, 0.92 * width, color=PALETTE[i % len(PALETTE)], label=_cut(name, 40), zorder=2)
        axes.errorbar(x, mean, yerr=spread, fmt="none", ecolor="#222222", elinewidth=1.6, capsize=4, zorder=3)
        if len(series) * len(groups) <= 24:  # more figures than that would run into each other
            offset: Any = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 11}
            for at, value, above in zip(x, mean, mean + np.nan_to_num(spread), strict=True):
                axes.annotate(f"{value:#.3g}", (at, above), **offset)
    axes.set_xticks(range(len(groups)), [_cut(name, _LONGEST) for name in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(ylabel)
    _bars_title(axes, "standard deviation", estimates)
    top = max(100 * (of.mean + (of.spread or 0.0)) for of in estimates)
    if top > 0:
        axes.set_ylim(top=1.12 * top)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(series), 4), frameon=False, fontsize=13)
    _save(figure, path)


def plot_confusion(path: Path, matrix: Int[np.ndarray, "C K"], names: Sequence[str]) -> None:
    """Draws a confusion matrix, each row in percent of its class; rows are true classes, columns predicted ones.

    Up to 60 classes are named at the sides (row i and column i are of `names[i]`), up to 12 have their percentages in
    the cells. Of more only the pattern can be read: small shares are drawn darker than in proportion, and from 250 on a
    cell shows the largest share of several classes. A row without images stays white.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows, columns = matrix.shape
    larger = max(rows, columns)
    step = math.ceil(larger / _MOST_CELLS)
    cells = share
    for axis in (0, 1):
        cells = np.maximum.reduceat(cells, np.arange(0, share.shape[axis], step), axis=axis)
    figure = _figure(0.88 * _WIDTH * min(max(rows / columns, 0.4), 2.0))
    axes = _new_axes(figure)
    norm = PowerNorm(1.0 if larger <= _LARGEST_LABELLED else 0.5, 0, 100)
    edges = (-0.5, cells.shape[1] * step - 0.5, cells.shape[0] * step - 0.5, -0.5)
    colours = colormaps["Blues"]
    image = axes.imshow(cells, cmap=colours, norm=norm, interpolation="nearest", aspect="auto", extent=edges)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))  # the last cells may stand for fewer classes
    if larger <= _LARGEST_LABELLED:
        size = 13.0 if larger <= _LARGEST_COUNTED else max(13.0 - 0.14 * larger, 5.0)
        short = [_cut(name, _LONGEST) for name in names]
        turned = 0 if columns <= 12 and max(map(len, short[:columns])) <= 60 // columns else 90
        axes.set_xticks(range(columns), short[:columns], fontsize=size, rotation=turned)
        axes.set_yticks(range(rows), short[:rows], fontsize=size)
    if larger <= _LARGEST_COUNTED:
        for (row, column), value in np.ndenumerate(share):
            if value > 0:
                ink, text = "white" if value > 55 else "#222222", f"{value:.0f}" if value >= 0.5 else "<1"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=11)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    axes.set(xlabel="predicted class", ylabel="true class")
    unit = "% of the true class" + (f", largest of {step} x {step} classes" if step > 1 else "")
    figure.colorbar(image, ax=axes, label=unit, fraction=0.045, pad=0.02)
    _save(figure, path)


def _figure(height: float = _HEIGHT) -> "Figure":
    """Makes a figure that is drawn into memory: no window, and no state shared with other plots of the process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _new_axes(figure: "Figure", *place: int) -> "Axes":
    """Adds axes to a figure, alone or at (rows, columns, number)."""
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=13)
    axes.xaxis.label.set_fontsize(14)
    axes.yaxis.label.set_fontsize(14)
    return axes


def _save(figure: "Figure", path: Path) -> None:
    """Writes the picture. A letter that the font lacks becomes a box, not a warning for each."""
    with without_warnings("Glyph .* missing from font"):
        write_whole(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix(".")))


def _percent(shares: Iterable[float | None]) -> np.ndarray:
    """Gives percentages, and NaN, which is not drawn, for None."""
    return np.array([np.nan if share is None else 100 * share for share in shares])


def _bars_title(axes: "Axes", what: str, estimates: Iterable[Estimate]) -> None:
    """Writes at the right what the error bars are, where there are any."""
    if repeated := over(estimates):
        axes.set_title(f"bars: {what}, over {repeated}", loc="right", fontsize=11, color="#555555")


def _cut(name: str, longest: int) -> str:
    """Cuts a name to one short line, in which a dollar is a dollar and not the start of a formula."""
    name = printable(name)
    short = name if len(name) <= longest else name[: longest - 1] + "…"
    return short.replace("$", r"\$")
