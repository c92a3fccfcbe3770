"""Pictures: what stands in them, and that they stay readable with few as with many classes."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpp.downstream import plots
from mpp.downstream.estimates import Estimate, estimate
from mpp.downstream.plots import plot_bars, plot_confusion, plot_layers, plot_shots
from mpp.downstream.shots import Readout


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, which are saved nonetheless."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def result(base: float, seeds: int = 3, shots: tuple[int, ...] = (1, 5, 25)) -> dict[int, Estimate]:
    noise = np.random.default_rng(0).normal(0, 0.02, (seeds, len(shots)))
    drawn = np.clip(base + 0.1 * np.log2(np.array(shots)) + noise, 0, 1)
    return {k: estimate(of.tolist(), f"{seeds} draws") for k, of in zip(shots, drawn.T, strict=True)}


def test_shots_picture(tmp_path: Path, drawn: list[Any]) -> None:
    results = {"scratch": result(0.1), "pre$trained": result(0.3, shots=(10, 1)), "one draw": result(0.4, seeds=1)}
    plot_shots(tmp_path / "shots.png", results)
    with Image.open(tmp_path / "shots.png") as picture:
        assert picture.size == (1800, 1080)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "10", "25"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["scratch", r"pre\$trained", "one draw"]
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low >= 0
    assert high <= 102
    for container, name in zip(axes.containers, results, strict=True):
        line, _, (bars,) = container
        ordered = [results[name][k] for k in sorted(results[name])]
        np.testing.assert_allclose(line.get_ydata(), [100 * of.mean for of in ordered])
        assert (np.abs(np.log2(line.get_xdata() / np.sort(list(results[name])))) < 0.1).all()
        lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments() if len(segment)]
        if name == "one draw":
            assert not np.nansum(lengths)
        else:
            np.testing.assert_allclose(lengths, [200 * of.half for of in ordered if of.half is not None])
    assert axes.get_title(loc="right") == "bars: 95 % interval of the mean, over 3 draws"
    assert len({container[0].get_color() for container in axes.containers}) == 3


def test_more_models_than_colours_are_told_apart(tmp_path: Path, drawn: list[Any]) -> None:
    plot_shots(tmp_path / "many.png", {str(i): result(0.1 + i / 50) for i in range(16)})
    lines = [container[0] for container in drawn[0].axes[0].containers]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 16


def test_layers_picture(tmp_path: Path, drawn: list[Any]) -> None:
    results = {
        Readout(init, layer, pool, depth): result(0.02 * layer + 0.3)
        for init, depth, pools in (("run", 4, ("mean", "token")), ("random:run", 2, ("mean",)))
        for pool in pools
        for layer in range(-1, -depth - 1, -1)
    }
    plot_layers(tmp_path / "layers.png", results)
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == [
        f"{k} per class" for k in ("1 labelled image", "5 labelled images", "25 labelled images")
    ]
    for number, axes in enumerate(panels):
        for line, band, (init, pool) in zip(
            axes.lines, axes.collections, (("run", "mean"), ("run", "token"), ("random:run", "mean")), strict=True
        ):
            shots = (1, 5, 25)[number]
            of = [results[Readout(init, layer, pool)][shots] for layer in range(-len(line.get_xdata()), 0)]
            mean, std = (100 * np.array([getattr(r, part) for r in of]) for part in ("mean", "spread"))
            assert line.get_xdata().tolist() == list(range(4 if init == "run" else 2))
            np.testing.assert_allclose(line.get_ydata(), mean)
            corners = band.get_paths()[0].vertices[:, 1]
            np.testing.assert_allclose((corners.min(), corners.max()), ((mean - std).min(), (mean + std).max()))
    first, second, third = panels[0].lines
    assert first.get_color() == second.get_color() != third.get_color()
    assert first.get_linestyle() == third.get_linestyle() != second.get_linestyle()
    (legend,) = drawn[0].legends
    told = ["run", "random:run", "mean of the patches", "class token"]
    assert [text.get_text() for text in legend.get_texts()] == told
    assert drawn[0].get_supxlabel().endswith("bands: standard deviation over 3 draws")


def test_bars_picture(tmp_path: Path, drawn: list[Any]) -> None:
    scratch, one, all_labels = estimate([0.08, 0.12], "2 seeds"), estimate([0.3], "1 seed"), estimate([0.9], "1 seed")
    groups = {"1 %": {"scratch": scratch, "pretrained": one}, "100 %": {"pretrained": all_labels}}
    plot_bars(tmp_path / "bars.svg", groups, "top-1 (%)")
    assert (tmp_path / "bars.svg").read_text().startswith("<?xml")
    (axes,) = drawn[0].axes
    bars = {patch.get_height(): patch.get_facecolor() for patch in axes.patches}
    assert [round(height, 9) for height in bars] == [10, 30, 90]
    first, second, third = bars.values()
    assert first != second == third
    assert [text.get_text() for text in axes.texts] == ["10.0", "30.0", "90.0"]
    lengths = [np.ptp(s[:, 1]) for _, _, (bars,) in axes.containers[1::2] for s in bars.get_segments() if len(s)]
    np.testing.assert_allclose(lengths, [200 * scratch.spread])  # neither of one seed has a bar
    assert axes.get_title(loc="right") == "bars: standard deviation, over 2 seeds"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 %", "100 %"]


def matrix(rows: int, columns: int) -> np.ndarray:
    counts = np.random.default_rng(1).integers(0, 3, (rows, columns))
    counts[np.arange(min(rows, columns)), np.arange(min(rows, columns))] += 40
    return counts


@pytest.mark.parametrize(
    ("rows", "columns", "named", "counted"),
    [(2, 2, 2, True), (10, 10, 10, True), (9, 3, 3, True), (5, 40, 40, False), (100, 100, 0, False)],
)
def test_confusion_picture(
    tmp_path: Path, drawn: list[Any], rows: int, columns: int, named: int, counted: bool
) -> None:
    counts = matrix(rows, columns)
    plot_confusion(tmp_path / "c.png", counts, [f"class {i}" for i in range(max(rows, columns))])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width == 1800
    axes, bar = drawn[0].axes
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, 100 * counts / counts.sum(1, keepdims=True))
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert (labels[:named] == [f"class {i}" for i in range(named)]) if named else ("class" not in "".join(labels))
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
    assert axes.get_xlim() == (-0.5, 1000.5)
    assert axes.get_ylim() == (1000.5, -0.5)


def test_names_of_any_letters_draw_without_warnings(tmp_path: Path) -> None:
    plot_confusion(
        tmp_path / "c.png", matrix(3, 3), ["狗", "$x_", "a very long name that nobody could read at the side"]
    )


def test_names_that_are_no_text_are_drawn_in_one_line(tmp_path: Path, drawn: list[Any]) -> None:
    plot_confusion(tmp_path / "c.png", matrix(2, 2), ["\udcff\n", "a\nb"])
    plot_shots(tmp_path / "s.png", {"\udcff\n": result(0.1)})
    two = estimate([0.1, 0.2], "2 seeds")
    plot_bars(tmp_path / "b.png", {"a\nb": {"\udcff\n": two, "other": two}}, "top-1 (%)")
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == [r"\xff\n", r"a\nb"]
    assert [text.get_text() for text in drawn[1].axes[0].get_legend().get_texts()] == [r"\xff\n"]
    assert [label.get_text() for label in drawn[2].axes[0].get_xticklabels()] == [r"a\nb"]


@pytest.mark.slow
def test_matplotlib_is_loaded_only_to_draw_and_never_pyplot(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import numpy as np
from mpp.downstream.plots import plot_confusion
assert "matplotlib" not in sys.modules
plot_confusion(Path({str(tmp_path / "c.png")!r}), np.eye(2, dtype=int), ["a", "b"])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
