"""The curves of a run over the images that it has seen, and the same figures as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mpp.report.page.charts import Line, line_chart
from mpp.report.page.parts import Gallery, Picture, Section, Table, Text
from mpp.report.run_page.reading import Record, Row
from mpp.report.run_page.wording import NONE, figure, percent, score_text

SEEN = "images seen"
BAND = "band: standard deviation over the draws"
_TABLE_ROWS = 10
_KINDS = (("_masked", "masked"), ("_random", "random"), ("_unchanged", "unchanged"), ("", "all corrupted"))
_TRIVIAL = (("_baseline_neighbours", "nearest visible patches"), ("_baseline_frequent", "most frequent colour"))
_TRIVIAL_PIXELS = (("_baseline_neighbours", "nearest visible patches"), ("_baseline_frequent", "mean patch"))


@dataclass(frozen=True)
class Chart:
    """What one chart shows of a run: names in metrics.jsonl and in the legend."""

    name: str
    title: str
    y: str
    figures: tuple[tuple[str, str], ...]
    beside: tuple[tuple[str, str], ...] = ()
    """Trivial baselines, drawn dashed."""
    percent: bool = False
    markers: bool = False
    spread: str = ""
    """What is added to a figure's name for that of its spread."""

    def text(self, value: float) -> str:
        return percent(value) if self.percent else figure(value)


def series(rows: Sequence[Row], name: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Images seen and values of one figure; what is not finite is NaN. Empty where no value is finite."""
    found = [(row["images"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    x, y = np.array(found, dtype=np.float64).reshape(-1, 2).T
    y = np.where(np.isfinite(y), y, np.nan)
    return (x, y) if np.isfinite(y).any() else (x[:0], y[:0])


def charts(record: Record) -> tuple[Chart, ...]:
    """The charts of a run's kind, whether it has the figures or not."""
    score = record.score
    running = (
        Chart("learning_rate", "Learning rate", "learning rate", (("lr", "learning rate"),)),
        Chart("speed", "Speed", "images a second", (("time/images_per_second", "images a second"),)),
        Chart(
            "data_wait",
            "Waiting for data",
            "share of the time",
            (("time/data_wait", "waiting for data"),),
            percent=True,
        ),
    )
    if not record.pretraining:
        shown = (("accuracy", "training images"), ("test/top1", "test images"))
        return (
            Chart("loss", "Loss", "loss", (("loss", "training images"),)),
            Chart("accuracy", "Accuracy", "accuracy", shown, percent=True),
            *running,
        )
    # Losses of different units, of runs that are compared, are no one chart.
    loss, unit = ("loss", "cross-entropy") if score == "accuracy" else ("loss_mse", "squared error")
    shots = tuple((f"fewshot/{k}shot", "1 shot" if k == 1 else f"{k} shots") for k in record.shots)
    several = any(name.endswith("shot_std") and row[name] for row in record.fewshot for name in row)
    frozen = "Few-shot accuracy" + f" ({BAND})" * several
    trivial = _TRIVIAL if score == "accuracy" else _TRIVIAL_PIXELS
    title = "Accuracy" if score == "accuracy" else "Mean squared error"
    return (
        Chart(loss, "Loss", f"loss ({unit})", tuple((f"loss{kind}", label) for kind, label in _KINDS)),
        Chart(
            score,
            title,
            title.lower(),
            tuple((score + kind, label) for kind, label in _KINDS),
            tuple((score + kind, label) for kind, label in trivial),
            percent=score == "accuracy",
        ),
        Chart("loss_detail", "Loss of the details", "squared error", (("loss_detail", "corrupted patches"),)),
        Chart(
            "few_shot", frozen, "test accuracy", shots, percent=True, markers=True, spread="_std"
        ),
        *running,
    )  # fmt: skip


def line_of(chart: Chart, rows: Sequence[Row], name: str, label: str, colour: int) -> Line | None:
    """The line of one figure of a chart, with its spread if that is known; None where no value is finite."""
    x, y = series(rows, name)
    if not len(x):
        return None
    spread = series(rows, name + chart.spread)[1] if chart.spread else y[:0]
    return Line(label, x, y, np.nan_to_num(spread) if len(spread) == len(y) else None, colour=colour)


def draw(chart: Chart, rows: Sequence[Row]) -> Picture | None:
    """The chart of one run's figures; None where it has none of them."""
    lines, told = [], []
    for number, (name, label) in enumerate((*chart.figures, *chart.beside)):
        line = line_of(chart, rows, name, label, number)
        if line is not None:
            lines.append(replace(line, dashed=number >= len(chart.figures)))
            told.append(f"{label} {_course(chart, line.y)}")
    if not lines:
        return None
    alt = f"{chart.title} over {SEEN}: {'; '.join(told)}."
    if len(chart.figures) == 1:  # the axis names it
        lines = [replace(line, label="") for line in lines]
    return line_chart(
        f"curve_{chart.name}",
        alt,
        lines,
        x=SEEN,
        y=chart.y,
        percent_y=chart.percent,
        caption=chart.title,
        markers=chart.markers,
    )


def _course(chart: Chart, y: Float[np.ndarray, " n"]) -> str:
    """`rises from 3.1 % to 41.2 %`, by the first and the last figure."""
    known = y[np.isfinite(y)]
    first, last = chart.text(known[0]), chart.text(known[-1])
    if first == last:
        return f"is {last}" if len(known) == 1 else f"begins and ends at {last}"
    return f"{'rises' if known[-1] > known[0] else 'falls'} from {first} to {last}"


def curves_section(record: Record) -> Section:
    """The curves of a run, what it says of failures, and a table of a few rows."""
    pictures = tuple(picture for chart in charts(record) if (picture := draw(chart, record.rows)) is not None)
    blocks = [Text(text) for text in _remarks(record)]
    blocks += [Gallery(pictures)] if pictures else []
    blocks += [_table(record)] if record.trained else []
    if record.pretraining:
        better = "stay above" if record.score == "accuracy" else "stay below"
        return Section(
            "curves",
            "Curves",
            "Each point is the mean since the point before it, by what had happened to the patch: masked, replaced by "
            f"a random other patch, or left unchanged; where the solid lines do not {better} the dashed ones, the "
            "model knows no more than a blur.",
            tuple(blocks),
            "section 4.6 and appendix B.1.2",
        )
    return Section(
        "curves",
        "Curves",
        "Each point of the training is the mean since the point before it, under augmentation, and those on test "
        "images are of single evaluations: what gets better on training images alone is learnt by heart.",
        tuple(blocks),
        "section 4.1 and appendix B.1.1",
    )


def _remarks(record: Record) -> list[str]:
    told = []
    if not record.trained:
        told.append("No figures of the training have been written yet.")
    elif not record.ended:
        told.append(f"This run has not ended; its last figures are those of step {record.trained[-1]['step']:,}.")
    for row in record.rows:
        if row.get("event") == "non_finite":
            tried = f"; the same batch in fp32 gave {row['fp32_loss']}" if "fp32_loss" in row else ""
            told.append(f"At step {row['step']:,} the loss was not finite in {row.get('precision')}{tried}.")
    return told


def _table(record: Record) -> Table:
    """About ten rows, evenly spread; the last is always there."""
    rows, score = record.trained, record.score
    kept = np.unique(np.linspace(0, len(rows) - 1, min(_TABLE_ROWS, len(rows))).round().astype(int))
    word, trivial = ("accuracy", "most frequent") if score == "accuracy" else ("squared error", "mean patch")
    columns = [
        ("step", lambda row: f"{row['step']:,}"),
        ("loss", lambda row: figure(row.get("loss"))),
        *([(word, lambda row: score_text(score, row.get(score)))] if any(score in row for row in rows) else []),
        *(
            [
                ("masked", lambda row: score_text(score, row.get(f"{score}_masked"))),
                ("neighbours", lambda row: score_text(score, row.get(f"{score}_baseline_neighbours"))),
                (trivial, lambda row: score_text(score, row.get(f"{score}_baseline_frequent"))),
            ]
            if record.pretraining
            else []
        ),
        ("learning rate", lambda row: NONE if "lr" not in row else f"{row['lr']:.2e}"),
        ("images/s", lambda row: figure(row.get("time/images_per_second"))),
        ("waiting", lambda row: percent(row.get("time/data_wait"))),
    ]
    return Table(
        (SEEN, *(name for name, _ in columns)),
        tuple((f"{rows[at]['images']:,}", *(text(rows[at]) for _, text in columns)) for at in kept.tolist()),
        "The figures of each row" if len(kept) == len(rows) else f"The figures of {len(kept)} of {len(rows):,} rows",
        folded=True,
    )
