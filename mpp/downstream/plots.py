"""Pictures of accuracy and of confusion, as files. Matplotlib is loaded only when one is drawn."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from mpp.downstream.shots import FewshotResult, Readout
from mpp.sources.names import printable

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
_POOLED = {"mean": "mean of the patches", "token": "class token", "mean+token": "both side by side"}


def plot_shots(path: Path, results: Mapping[str, FewshotResult]) -> None:
    """Accuracy against the number of shots, one line per model.

    The bars are the 95 % interval of the mean over the draws. One draw has none, nor a standard deviation: no bar.

    Args:
        path: file to write; its ending tells the format, such as .png or .svg.
        results: name of the model -> its result; the names make the legend.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("plot_shots needs one result or more, got none")
    figure, axes = _new()
    ticks = sorted({k for result in results.values() for k in result.shots})
    for i, (name, result) in enumerate(results.items()):
        order = np.argsort(result.shots)
        # Side by side, a few percent apart: bars at the same shots would hide each other.
        x = np.array(result.shots, dtype=float)[order] * 2 ** (0.04 * (i - (len(results) - 1) / 2))
        mean, bars, colour = 100 * result.mean[order], 100 * result.interval[order], PALETTE[i % len(PALETTE)]
        lap = i // len(PALETTE)  # past the last colour, other lines and markers tell them apart
        axes.errorbar(
            x, mean, yerr=bars, label=_cut(name, 40), color=colour, marker=_MARKERS[(i + lap) % len(_MARKERS)],
            linestyle=_LINES[lap % len(_LINES)], markersize=7, linewidth=2.2, elinewidth=1.6, capsize=4,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labelled images per class")
    axes.set_ylabel("accuracy (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 102.0))  # a t interval of few draws may leave 0 to 100
    axes.legend(frameon=False, loc="best", fontsize=13)
    axes.set_title(_bars_text(results.values()), loc="right", fontsize=11, color="#555555")
    _save(figure, path)


def plot_layers(path: Path, results: Mapping[Readout, FewshotResult]) -> None:
    """Accuracy by the layer that is read: a panel per number of shots, a colour per encoder, a line style per pooling.

    The bands are the standard deviation over the draws. One draw has none: no band.

    Args:
        path: as in `plot_shots`.
        results: of any encoders, layers and poolings, with the same shots; layers are drawn numbered from 0.

    Raises:
        ValueError: no results, or readouts that do not tell the depth of their encoder.
    """
    if not results or any(of.depth < 1 for of in results):
        raise ValueError("plot_layers needs one result or more, each with the depth of its encoder")
    shots = next(iter(results.values())).shots
    columns = math.ceil(math.sqrt(len(shots)))
    rows = math.ceil(len(shots) / columns)
    figure = _figure((_WIDTH, max(_HEIGHT, 3.2 * rows + 1.0)))
    looks = _looks(results)
    for panel, number in enumerate(shots):
        axes = figure.add_subplot(rows, columns, panel + 1)
        _style(axes)
        for (init, pool), look in looks.items():
            line = sorted((of.depth + of.layer, of) for of in results if (of.init, of.pool) == (init, pool))
            x = [layer for layer, _ in line]
            mean = np.array([100 * results[of].mean[panel] for _, of in line])
            std = np.array([100 * results[of].spread[panel] for _, of in line])
            axes.plot(x, mean, **look)
            axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.12, linewidth=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_title(f"{number} labelled image{'s' * (number > 1)} per class", fontsize=13)
    several = any(len(result.accuracy) > 1 for result in results.values())
    bands = "; bands: standard deviation over the draws" if several else "; one draw of the shots each, so no bands"
    figure.supxlabel(f"layer that is read, from 0{bands}", fontsize=13)
    figure.supylabel("accuracy (%)", fontsize=14)
    _layers_legend(figure, looks)
    _save(figure, path)


def _looks(results: Iterable[Readout]) -> dict[tuple[str, str], dict[str, Any]]:
    """How the line of each encoder and pooling is drawn."""
    inits, pools = (list(dict.fromkeys(names)) for names in zip(*((of.init, of.pool) for of in results), strict=True))
    return {
        (init, pool): {
            "color": PALETTE[i % len(PALETTE)], "linestyle": _LINES[j % len(_LINES)],
            "marker": _MARKERS[(j + i // len(PALETTE)) % len(_MARKERS)], "markersize": 5, "linewidth": 2,
        }
        for i, init in enumerate(inits) for j, pool in enumerate(pools)
        if any((of.init, of.pool) == (init, pool) for of in results)
    }  # fmt: skip


def _layers_legend(figure: "Figure", looks: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Encoders by their colours, and poolings, in grey, by their lines."""
    from matplotlib.lines import Line2D

    colours = {init: look["color"] for (init, _), look in looks.items()}
    lines = {pool: {**look, "color": "#555555"} for (_, pool), look in looks.items()}
    handles = [Line2D([], [], label=_cut(init, 34), color=colour, linewidth=4) for init, colour in colours.items()]
    handles += [Line2D([], [], label=_POOLED[pool], **look) for pool, look in lines.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 3), frameon=False, fontsize=12)


def plot_bars(path: Path, groups: Mapping[str, Mapping[str, tuple[float, float]]], ylabel: str) -> None:
    """Groups of bars with their spread, such as 1 %, 10 %, 100 % of the labels, each from scratch and pretrained.

    Args:
        path: as in `plot_shots`.
        groups: group -> series -> (mean, half-width of the bar of spread), in the unit of `ylabel`; NaN: no such bar.
            A series has one colour in all groups, and a gap where it is missing.

    Raises:
        ValueError: no groups.
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not series:
        raise ValueError("plot_bars needs one group with one bar or more, got none")
    figure, axes = _new()
    width = 0.8 / len(series)
    top = max(mean + np.nan_to_num(spread) for group in groups.values() for mean, spread in group.values())
    for i, name in enumerate(series):
        present = [(at, *group[name]) for at, group in enumerate(groups.values()) if name in group]
        at, mean, spread = (np.array(column, dtype=float) for column in zip(*present, strict=True))
        x = at + (i - (len(series) - 1) / 2) * width
        axes.bar(x, mean, 0.92 * width, color=PALETTE[i % len(PALETTE)], label=_cut(name, 40), zorder=2)
        axes.errorbar(x, mean, yerr=spread, fmt="none", ecolor="#222222", elinewidth=1.6, capsize=4, zorder=3)
        if len(series) * len(groups) <= 24:  # more figures than that would run into each other
            for where, value, above in zip(x, mean, mean + np.nan_to_num(spread), strict=True):
                axes.annotate(
                    f"{value:#.3g}", (where, above), (0, 4), textcoords="offset points", ha="center", fontsize=11
                )
    axes.set_xticks(range(len(groups)), [_cut(name, _LONGEST) for name in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(ylabel)
    if top > 0:
        axes.set_ylim(top=1.12 * top)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(series), 4), frameon=False, fontsize=13)
    _save(figure, path)


def plot_confusion(path: Path, matrix: Int[np.ndarray, "C K"], names: Sequence[str]) -> None:
    """A confusion matrix, each row in percent of its class; rows are true classes, columns predicted ones.

    Up to 60 classes are named at the sides, up to 12 have their percentages in the cells. Of more classes only the
    pattern can be read: their numbers stand at the sides, small shares are drawn darker than in proportion, and from
    250 on a cell stands for several classes and shows the largest of their shares, as single ones would be too small
    to see.

    Args:
        path: as in `plot_shots`.
        matrix: counts, not negative. A row without images stays white.
        names: of the classes, at least as many as the longer side: row i and column i are of `names[i]`.

    Raises:
        ValueError: no matrix of counts, or too few names.
    """
    if matrix.ndim != 2 or not matrix.size or matrix.min() < 0 or len(names) < max(matrix.shape):
        raise ValueError(f"confusion needs counts (true, predicted) and their names, got {matrix.shape}, {len(names)}")
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows, columns = matrix.shape
    larger = max(rows, columns)
    figure, axes = _new((_WIDTH, 0.88 * _WIDTH * min(max(rows / columns, 0.4), 2.0)))
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    step = math.ceil(larger / _MOST_CELLS)
    unit = "% of the true class" + (f", largest of {step} x {step} classes" if step > 1 else "")
    gamma = 1.0 if larger <= _LARGEST_LABELLED else 0.5
    cells = _shrunk(share, step)
    edges = (-0.5, cells.shape[1] * step - 0.5, cells.shape[0] * step - 0.5, -0.5)
    colours, norm = colormaps["Blues"], PowerNorm(gamma, 0, 100)
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
                ink = "white" if value > 55 else "#222222"
                text = f"{value:.0f}" if value >= 0.5 else "<1"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=11)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(True)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, ax=axes, label=unit, fraction=0.045, pad=0.02)
    _save(figure, path)


def _shrunk(share: np.ndarray, step: int) -> np.ndarray:
    """Blocks of `step` x `step` cells as one, which is the largest of their shares."""
    for axis in (0, 1):
        share = np.maximum.reduceat(share, np.arange(0, share.shape[axis], step), axis=axis)
    return share


def _new(size: tuple[float, float] = (_WIDTH, _HEIGHT)) -> "tuple[Figure, Axes]":
    """A figure with one pair of axes."""
    figure = _figure(size)
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _figure(size: tuple[float, float]) -> "Figure":
    """A figure of its own, drawn into memory: no window, and no state shared with other plots of the process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=13)
    axes.xaxis.label.set_fontsize(14)
    axes.yaxis.label.set_fontsize(14)


def _save(figure: "Figure", path: Path) -> None:
    """Writes the picture. A letter that the font lacks becomes a box, not a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)


def _bars_text(results: Iterable[FewshotResult]) -> str:
    """What the bars are, which depends on whether there was more than one draw."""
    several = [len(result.accuracy) > 1 for result in results]
    if not any(several):
        return "one draw of the shots each, so no bars"
    return "bars: 95 % interval of the mean over the draws" + ("" if all(several) else ", where there are several")


def _cut(name: str, longest: int) -> str:
    """A name in one line, not too long, in which a dollar is a dollar and not the start of a formula."""
    name = printable(name)
    short = name if len(name) <= longest else name[: longest - 1] + "…"
    return short.replace("$", r"\$")
