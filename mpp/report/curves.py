"""The curves of a run over the images seen, and the same figures as a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mpp.downstream.rankme import RANK, ranks
from mpp.report.charts import Line, line_chart
from mpp.report.page import Gallery, Picture, Section, Table, Text
from mpp.report.run_record import Row, RunRecord
from mpp.report.wording import NONE, figure, percent, score_text, shots_text

IMAGES_SEEN = "images seen"
BAND = " (band: standard deviation over the draws)"
_TABLE_ROWS = 10
_RANK = "effective rank"
_ON_RANK = (
    "The effective rank (RankMe, Garrido et al., 2023) counts, without labels, the directions that the features of "
    "some training images use, of {:,} possible. A fall to one or two is a collapse: images hardly differ in their "
    "features. A high one does not say that the features are useful; an untrained encoder's can be higher."
)
_KINDS = (("_masked", "masked"), ("_random", "random"), ("_unchanged", "unchanged"), ("", "all corrupted"))


@dataclass(frozen=True)
class Chart:
    """One chart of a run: names in metrics.jsonl with their names in the legend."""

    name: str
    title: str
    y: str
    figures: tuple[tuple[str, str], ...]
    baselines: tuple[tuple[str, str], ...] = ()
    """Drawn dashed."""
    percent: bool = False
    markers: bool = False
    spread: str = ""
    """Ending of the names of the spreads."""

    def text(self, value: float) -> str:
        return percent(value) if self.percent else figure(value)

    def line(self, rows: Sequence[Row], name: str, label: str, colour: int) -> Line | None:
        """The line of one figure, with its spread where that is known; None where no value is finite."""
        x, y = _series(rows, name)
        if not np.isfinite(y).any():
            return None
        spread = _series(rows, name + self.spread)[1] if self.spread else y[:0]
        return Line(label, x, y, np.nan_to_num(spread) if len(spread) == len(y) else None, colour=colour)

    def draw(self, name: str, alt: str, lines: Sequence[Line], caption: str) -> Picture:
        return line_chart(
            name, alt, lines, x=IMAGES_SEEN, y=self.y, percent_y=self.percent, caption=caption, markers=self.markers
        )


def _series(rows: Sequence[Row], name: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Images seen and values of one figure; NaN where it is not finite."""
    found = [(row["images"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    x, y = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return x, np.where(np.isfinite(y), y, np.nan)


def charts(record: RunRecord) -> tuple[Chart, ...]:
    """The charts of a run's kind, whether it has the figures or not."""
    wait = (("time/data_wait", "waiting for data"),)
    common = (
        Chart("learning_rate", "Learning rate", "learning rate", (("lr", "learning rate"),)),
        Chart("speed", "Speed", "images a second", (("time/images_per_second", "images a second"),)),
        Chart("data_wait", "Waiting for data", "share of the time", wait, percent=True),
    )
    if not record.pretraining:
        accuracies = (("accuracy", "training images"), ("test/top1", "test images"))
        return (
            Chart("loss", "Loss", "loss", (("loss", "training images"),)),
            Chart("accuracy", "Accuracy", "accuracy", accuracies, percent=True),
            Chart("mean_ap", "Mean average precision", "mAP", (("test/mean_ap", "test images"),), percent=True),
            *common,
        )
    score = record.score
    classes = score == "accuracy"
    # Losses of different units, of runs that are compared, get charts of their own.
    loss, unit = ("loss", "cross-entropy") if classes else ("loss_mse", "squared error")
    title = "Accuracy" if classes else "Mean squared error"
    scores = tuple((score + kind, label) for kind, label in _KINDS)
    baselines = (
        (f"{score}_baseline_neighbours", "nearest visible patches"),
        (f"{score}_baseline_frequent", "most frequent colour" if classes else "mean patch"),
    )
    shots = tuple((f"fewshot/{k}shot", shots_text(k)) for k in record.shots)
    several = any(name.endswith("shot_std") and row[name] for row in record.fewshot for name in row)
    frozen = "Few-shot accuracy" + BAND * several
    return (
        Chart(loss, "Loss", f"loss ({unit})", tuple((f"loss{kind}", label) for kind, label in _KINDS)),
        Chart(score, title, title.lower(), scores, baselines, percent=classes),
        Chart("loss_detail", "Loss of the details", "squared error", (("loss_detail", "corrupted patches"),)),
        Chart(
            "loss_words",
            "Loss of the visual words",
            "squared error",
            (
                ("loss_words", "corrupted patches"),
                ("loss_words_seen", "other patches"),
                ("loss_words_image", "whole images"),
            ),
        ),
        Chart("few_shot", frozen, "test accuracy", shots, percent=True, markers=True, spread="_std"),
        Chart("effective_rank", "Effective rank of the features", _RANK, ((RANK, _RANK),), markers=True),
        *common,
    )


def curves_section(record: RunRecord) -> Section:
    """The curves of a run, its failures, and a table of a few rows."""
    pictures = tuple(filter(None, (_draw(chart, record.rows) for chart in charts(record))))
    blocks = [Text(text) for text in _remarks(record)]
    blocks += [Gallery(pictures)] if pictures else []
    if found := ranks(record.rows):
        blocks.append(Text(_ON_RANK.format(found[-1][1])))
    blocks += [_table(record)] if record.trained else []
    if record.pretraining:
        reading = (
            "Each point is the mean since the point before it, by what had happened to the patch: masked, replaced by "
            "a random other patch, or left unchanged; where the solid lines do not stay "
            f"{'above' if record.score == 'accuracy' else 'below'} the dashed ones, the model knows no more than a "
            "blur."
        )
        paper = "section 4.6 and appendix B.1.2"
    else:
        reading = (
            "Each point of the training is the mean since the point before it, under augmentation, and those on test "
            "images are of single evaluations: what gets better on training images alone is learnt by heart."
        )
        paper = "section 4.1 and appendix B.1.1"
    return Section("curves", "Curves", reading, tuple(blocks), paper)


def _draw(chart: Chart, rows: Sequence[Row]) -> Picture | None:
    """The chart of one run's figures; None where it has none of them."""
    lines, courses = [], []
    single = len(chart.figures) == 1  # which the axis names
    for number, (name, label) in enumerate((*chart.figures, *chart.baselines)):
        line = chart.line(rows, name, "" if single else label, number)
        if line is not None:
            lines.append(replace(line, dashed=number >= len(chart.figures)))
            courses.append(f"{label} {_course(chart, line.y)}")
    alt = f"{chart.title} over {IMAGES_SEEN}: {'; '.join(courses)}."
    return chart.draw(f"curve_{chart.name}", alt, lines, chart.title) if lines else None


def _course(chart: Chart, y: Float[np.ndarray, " n"]) -> str:
    """`rises from 3.1 % to 41.2 %`, by the first and the last figure."""
    known = y[np.isfinite(y)]
    first, last = chart.text(known[0]), chart.text(known[-1])
    if first == last:
        return f"is {last}" if len(known) == 1 else f"begins and ends at {last}"
    return f"{'rises' if known[-1] > known[0] else 'falls'} from {first} to {last}"


def _remarks(record: RunRecord) -> list[str]:
    remarks = []
    if not record.trained:
        remarks.append("No figures of the training have been written yet.")
    elif not record.ended:
        remarks.append(f"This run has not ended; its last figures are those of step {record.trained[-1]['step']:,}.")
    for row in record.rows:
        if row.get("event") == "non_finite":
            tried = f"; the same batch in fp32 gave {row['fp32_loss']}" if "fp32_loss" in row else ""
            remarks.append(f"At step {row['step']:,} the loss was not finite in {row.get('precision')}{tried}.")
    return remarks


def _table(record: RunRecord) -> Table:
    """About ten rows, evenly spread; the last is always among them."""
    rows, score = record.trained, record.score
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(_TABLE_ROWS, len(rows))).round().astype(int)).tolist()
    word, trivial = ("accuracy", "most frequent") if score == "accuracy" else ("squared error", "mean patch")

    def of_score(ending: str) -> Callable[[Row], str]:
        return lambda row: score_text(score, row.get(score + ending))

    columns: dict[str, Callable[[Row], str]] = {
        IMAGES_SEEN: lambda row: f"{row['images']:,}",
        "step": lambda row: f"{row['step']:,}",
        "loss": lambda row: figure(row.get("loss")),
    }
    columns |= {word: of_score("")} if any(score in row for row in rows) else {}
    if record.pretraining:
        columns |= {"masked": of_score("_masked"), "neighbours": of_score("_baseline_neighbours")}
        columns[trivial] = of_score("_baseline_frequent")
    columns["learning rate"] = lambda row: f"{row['lr']:.2e}" if "lr" in row else NONE
    columns["images/s"] = lambda row: figure(row.get("time/images_per_second"))
    columns["waiting"] = lambda row: percent(row.get("time/data_wait"))
    cells = tuple(tuple(text(rows[i]) for text in columns.values()) for i in chosen)
    all_shown = len(chosen) == len(rows)
    caption = "The figures of each row" if all_shown else f"The figures of {len(chosen)} of {len(rows):,} rows"
    return Table(tuple(columns), cells, caption, folded=True)
