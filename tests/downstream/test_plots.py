"""Pictures: what stands in them, and that they stay readable with few as with many classes."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from mpp.downstream import plots
from mpp.downstream.estimates import Estimate, estimate
from mpp.downstream.fewshot import Readout
from mpp.downstream.plots import plot_bars, plot_confusion, plot_layers, plot_shots
from mpp.downstream.settings import Pool


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, which are saved nonetheless, at a quarter of the size."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_DPI", plots._DPI // 4)
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def result(base: float, seeds: int = 3, shots: tuple[int, ...] = (1, 5, 25)) -> dict[int, Estimate]:
    noise = np.random.default_rng(0).normal(0, 0.02, (seeds, len(shots)))
    drawn = np.clip(base + 0.1 * np.log2(np.array(shots)) + noise, 0, 1)
    return {k: estimate(of.tolist(), f"{seeds} draws") for k, of in zip(shots, drawn.T, strict=True)}


def texts(labels: Iterable[Any]) -> list[str]:
    return [label.get_text() for label in labels]


def test_shots_picture(tmp_path: Path, drawn: list[Any]) -> None:
    results = {"scratch": result(0.1), "pre$trained": result(0.3, shots=(10, 1)), "one draw": result(0.4, seeds=1)}
    plot_shots(tmp_path / "shots.png", results)
    with Image.open(tmp_path / "shots.png") as picture:
        assert picture.size == (1800 // 4, 1080 // 4)
    (axes,) = drawn[0].axes
    assert texts(axes.get_xticklabels()) == ["1", "5", "10", "25"]
    assert texts(axes.get_legend().get_texts()) == ["scratch", r"pre\$trained", "one draw"]
    low, high = axes.get_ylim()
    assert 0 <= low < high <= 102
    for container, by_shots in zip(axes.containers, results.values(), strict=True):
        line, _, (bars,) = container
        ordered = [by_shots[k] for k in sorted(by_shots)]
        np.testing.assert_allclose(line.get_ydata(), [100 * of.mean for of in ordered])
        assert (np.abs(np.log2(line.get_xdata() / np.sort(list(by_shots)))) < 0.1).all()
        lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments() if len(segment)]
        expected = [200 * of.half for of in ordered if of.half is not None]  # of one draw there is none
        assert [length for length in lengths if length > 0] == pytest.approx(expected)
    assert axes.get_title(loc="right") == "bars: 95 % interval of the mean, over 3 draws"


def test_more_models_than_colours_are_told_apart(tmp_path: Path, drawn: list[Any]) -> None:
    plot_shots(tmp_path / "many.png", {str(i): result(0.1 + i / 50) for i in range(16)})
    lines = [container[0] for container in drawn[0].axes[0].containers]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 16


def test_layers_picture(tmp_path: Path, drawn: list[Any]) -> None:
    ways = {("run", "mean"): 4, ("run", "token"): 4, ("random:run", "mean"): 2}  # and how many layers they have
    results = {
        Readout(init, layer, pool, depth): result(0.02 * layer + 0.3)
        for (init, pool), depth in ways.items()
        for layer in range(-1, -depth - 1, -1)
    }
    plot_layers(tmp_path / "layers.png", results)
    panels = drawn[0].axes
    titles = [f"{k} per class" for k in ("1 labelled image", "5 labelled images", "25 labelled images")]
    assert [axes.get_title() for axes in panels] == titles
    for shots, axes in zip((1, 5, 25), panels, strict=True):
        for line, band, ((init, pool), depth) in zip(axes.lines, axes.collections, ways.items(), strict=True):
            of = [results[Readout(init, layer, pool)][shots] for layer in range(-depth, 0)]
            mean, std = (100 * np.array([getattr(r, part) for r in of]) for part in ("mean", "spread"))
            assert line.get_xdata().tolist() == list(range(depth))
            np.testing.assert_allclose(line.get_ydata(), mean)
            corners = band.get_paths()[0].vertices[:, 1]
            np.testing.assert_allclose((corners.min(), corners.max()), ((mean - std).min(), (mean + std).max()))
    first, second, third = panels[0].lines
    assert first.get_color() == second.get_color() != third.get_color()
    assert first.get_linestyle() == third.get_linestyle() != second.get_linestyle()
    (legend,) = drawn[0].legends
    assert texts(legend.get_texts()) == ["run", "random:run", "mean of the patches", "class token"]
    assert drawn[0].get_supxlabel().endswith("bands: standard deviation over 3 draws")


def test_every_pooling_has_a_line_of_its_own(tmp_path: Path, drawn: list[Any]) -> None:
    pools = get_args(Pool)
    plot_layers(
        tmp_path / "layers.png", {Readout("run", at, pool, 2): result(0.3) for pool in pools for at in (-2, -1)}
    )
    (legend,) = drawn[0].legends
    assert len(set(texts(legend.get_texts()))) == 1 + len(pools)
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn[0].axes[0].lines}) == len(pools)


def test_bars_picture(tmp_path: Path, drawn: list[Any]) -> None:
    scratch, one, all_labels = estimate([0.08, 0.12], "2 seeds"), estimate([0.3], "1 seed"), estimate([0.9], "1 seed")
    groups = {"1 %": {"scratch": scratch, "pretrained": one}, "100 %": {"pretrained": all_labels}}
    plot_bars(tmp_path / "bars.svg", groups, "top-1 (%)")
    assert (tmp_path / "bars.svg").read_text().startswith("<?xml")
    (axes,) = drawn[0].axes
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([10, 30, 90])
    first, second, third = (patch.get_facecolor() for patch in axes.patches)
    assert first != second == third
    assert texts(axes.texts) == ["10.0", "30.0", "90.0"]
    lengths = [np.ptp(s[:, 1]) for _, _, (bars,) in axes.containers[1::2] for s in bars.get_segments() if len(s)]
    np.testing.assert_allclose(lengths, [200 * scratch.spread])  # neither of one seed has a bar
    assert axes.get_title(loc="right") == "bars: standard deviation, over 2 seeds"
    assert texts(axes.get_xticklabels()) == ["1 %", "100 %"]


def matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 3, (rows, columns)) + 40 * np.eye(rows, columns, dtype=int)


@pytest.mark.parametrize(
    ("rows", "columns", "named", "counted"),
    [(3, 10, 10, True), (9, 3, 3, True), (5, 40, 40, False), (100, 100, 0, False)],
)
def test_confusion_picture(
    tmp_path: Path, drawn: list[Any], rows: int, columns: int, named: int, counted: bool
) -> None:
    counts = matrix(rows, columns)
    plot_confusion(tmp_path / "c.png", counts, [f"class {i}" for i in range(max(rows, columns))])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width == 1800 // 4
    axes, bar = drawn[0].axes
    np.testing.assert_allclose(axes.images[0].get_array(), 100 * counts / counts.sum(1, keepdims=True))
    labels = [text for text in texts(axes.get_xticklabels()) if "class" in text]
    assert labels == [f"class {i}" for i in range(named)]
    assert bool(axes.texts) == counted
    assert bar.get_ylabel() == "% of the true class"
    if counted:
        renderer = drawn[0].canvas.get_renderer()
        boxes = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_a_thousand_classes_hide_no_confusion(tmp_path: Path, drawn: list[Any]) -> None:
    counts = 50 * np.eye(1001, dtype=int)
    counts[500], counts[700] = 0, 0
    counts[500, 203] = 50  # always taken for another
    plot_confusion(tmp_path / "c.png", counts, [str(i) for i in range(1001)])
    axes, bar = drawn[0].axes
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (201, 201)
    assert shown[100, 40] == 100
    assert np.count_nonzero(shown) == 202
    assert bar.get_ylabel() == "% of the true class, largest of 5 x 5 classes"
    # The last cells are of one class and must not stretch the axes.
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 1000.5), (1000.5, -0.5))


def test_names_that_are_no_text_are_drawn_in_one_line_without_warnings(tmp_path: Path, drawn: list[Any]) -> None:
    names = ["\udcff\n", "狗", "$x_", "a\nb", "a very long name that nobody could read at the side"]
    plot_confusion(tmp_path / "c.png", matrix(5, 5), names)
    plot_shots(tmp_path / "s.png", {names[0]: result(0.1)})
    two = estimate([0.1, 0.2], "2 seeds")
    plot_bars(tmp_path / "b.png", {"a\nb": {names[0]: two, "other": two}}, "top-1 (%)")
    confusion, shots, bars = (figure.axes[0] for figure in drawn)
    assert texts(confusion.get_xticklabels())[::3] == [r"\xff\n", r"a\nb"]
    assert texts(shots.get_legend().get_texts()) == [r"\xff\n"]
    assert texts(bars.get_xticklabels()) == [r"a\nb"]
