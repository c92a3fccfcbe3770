"""Several runs side by side: the same curves, one line a run, and tables of what they came to and how they differ."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpp.config import differences, to_dict
from mpp.data.sources.patterns import shown
from mpp.report.page.charts import line_chart
from mpp.report.page.parts import Block, Gallery, Page, Picture, Section, Table, Text
from mpp.report.run_page.curves import BAND, SEEN, Chart, charts, line_of
from mpp.report.run_page.provenance import code, machine, times_told, versions
from mpp.report.run_page.reading import Record, read_record
from mpp.report.run_page.results import fewshot_accuracy, fewshot_ends
from mpp.report.run_page.wording import NONE, around, beginning, figure, listed, percent, score_text
from mpp.training.rows import last_part

_MANY = 6  # runs from which on a chart has no room for what stands beside them

_PREDICTIONS = "Predictions of corrupted patches, beside the mean colour of their nearest visible neighbours"

Runs = Mapping[str, Record]
"""By the name that the page has for it."""


def comparison(folders: Sequence[Path], names: Sequence[str]) -> Page:
    """A page that puts runs side by side, pretraining and fine-tuning runs apart.

    Args:
        folders: of one run or more.
        names: what the page calls them, different from each other.

    Raises:
        UserError: a folder that is no run.
        ValueError: no runs, or not one name of its own for each.
    """
    if not folders or len(set(names)) != len(folders) or len(names) != len(folders):
        raise ValueError(f"a comparison needs runs with a name each, got {len(folders)} and {list(names)}")
    runs = {name: read_record(folder) for name, folder in zip(names, folders, strict=True)}
    kinds = {
        "pretraining": {name: run for name, run in runs.items() if run.pretraining},
        "fine-tuning": {name: run for name, run in runs.items() if not run.pretraining},
    }
    present = {kind: of for kind, of in kinds.items() if of}
    told = " and ".join(f"{len(of)} {kind} run{'s' * (len(of) > 1)}" for kind, of in present.items())
    sections = [section for kind, of in present.items() for section in _sections(kind, of, len(present) > 1)]
    return Page("Runs side by side", f"{told}: {listed(list(runs), 20)}.", tuple(sections))


def short_names(folders: Sequence[Path]) -> list[str]:
    """What to call runs, as short as tells them apart: their paths below the folder that holds them all."""
    paths = [folder.absolute() for folder in folders]
    below = os.path.commonpath([path.parent for path in paths])
    short = [str(path.relative_to(below)) for path in paths]
    return short if len(set(short)) == len(short) else [f"{name} ({at})" for at, name in enumerate(short, 1)]


def _sections(kind: str, runs: Runs, several_kinds: bool) -> list[Section]:
    """The sections of the runs of one kind."""
    pretraining = kind == "pretraining"
    title = (lambda text: f"{text}: {kind}") if several_kinds else (lambda text: text)
    paper = "section 4.6 and appendix B.1.2" if pretraining else "section 4.1 and appendix B.1.1"
    pictures = _pictures(kind, runs)
    last = "over the last twentieth of each run; " if pretraining else "of each run; "
    found = [
        Section(
            f"{kind}-results",
            title("Results"),
            f"Figures {last}compare rows only where data and length are the same, which the settings below tell.",
            (_pretrained(runs), *_fewshot(runs)) if pretraining else (_finetuned(runs),),
            paper,
        ),
        Section(
            f"{kind}-curves",
            title("Curves"),
            "One line a run, over the images that it has seen: at the same place the runs have seen as many images.",
            (Gallery(pictures),) if pictures else (Text("No figures of the training have been written yet."),),
            paper,
        ),
        Section(
            f"{kind}-differences",
            title("What differs"),
            "What is not named here is the same in all of these runs, but for settings that leave the result as it is.",
            (*_settings(runs), *_environments(runs)),
        ),
    ]
    return found if len(runs) > 1 else found[:2]


def _pictures(kind: str, runs: Runs) -> tuple[Picture, ...]:
    """A chart for each figure that one run at least has."""
    wanted: dict[tuple[str, str], tuple[Chart, str, dict[str, tuple[int, Record]]]] = {}
    for number, (run, record) in enumerate(runs.items()):
        for chart in charts(record):
            for name, label in chart.figures:
                _, _, of = wanted.setdefault((chart.name, name), (chart, label, {}))
                of[run] = number, record
    drawn = (
        _draw(re.sub(r"\W+", "_", f"{kind}_{group}_{name}"), chart, name, label, of)
        for (group, name), (chart, label, of) in wanted.items()
    )
    return tuple(picture for picture in drawn if picture is not None)


def _draw(picture: str, chart: Chart, name: str, label: str, runs: Mapping[str, tuple[int, Record]]) -> Picture | None:
    """One figure of the runs that have this chart, each in the colour of its number."""
    lines, told = [], []
    for run, (number, record) in runs.items():
        line = line_of(chart, record.rows, name, run, number)
        if line is not None:
            lines.append(line if len(runs) <= _MANY else replace(line, spread=None))
            told.append(f"{run} {chart.text(line.y[np.isfinite(line.y)][-1])}")
    if not lines:
        return None
    if len(runs) > _MANY:
        chart = replace(chart, title=chart.title.removesuffix(f" ({BAND})"))
    title = chart.title if label.lower() in (chart.y, chart.title.lower()) else f"{chart.title}, {label}"
    alt = f"{title} over {SEEN}, one line a run; at the end: {listed(told, 20)}."
    return line_chart(
        picture, alt, lines, x=SEEN, y=chart.y, percent_y=chart.percent, caption=title, markers=chart.markers
    )


def _pretrained(runs: Runs) -> Table:
    columns: dict[str, Callable[[Record], str]] = {
        "images seen": _seen,
        "loss": lambda run: figure(_last(run, "loss")),
    }
    for score, word in (("accuracy", "accuracy"), ("mse", "squared error")):
        if any(run.score == score for run in runs.values()):
            columns |= _score_columns(score, word)
    columns |= {"training time": _time, "ended": lambda run: "yes" if run.ended else "no"}
    return _table(columns, runs, _PREDICTIONS)


def _score_columns(score: str, word: str) -> dict[str, Callable[[Record], str]]:
    def column(kind: str) -> Callable[[Record], str]:
        return lambda run: score_text(score, _last(run, score + kind)) if run.score == score else NONE

    return {
        f"{word}, masked": column("_masked"),
        f"{word}, all": column(""),
        f"neighbours' {word}": column("_baseline_neighbours"),
    }


def _last(run: Record, name: str) -> float | None:
    return last_part([row for row in run.trained if name in row], name)[0].get(name)


def _seen(run: Record) -> str:
    return f"{run.trained[-1]['images']:,}" if run.trained else NONE


def _time(run: Record) -> str:
    return times_told(run).get("training time", NONE)


def _fewshot(runs: Runs) -> list[Table]:
    """Few-shot accuracy of every run that measured it, first and last."""
    shots = sorted({k for run in runs.values() for k in run.shots})
    rows = []
    for name, run in runs.items():
        for row, start in zip(fewshot_ends(run), (beginning(run.config), "pretrained"), strict=True):
            if row is not None:
                rows.append((name, start, *(around(*fewshot_accuracy(row, k)) for k in shots)))
    head = ("run", "encoder", *(f"{k} shot{'s' * (k > 1)}" for k in shots))
    return (
        [
            Table(
                head,
                tuple(rows),
                "Few-shot accuracy (section 4.1), mean ± standard deviation over the draws of the shots",
            )
        ]
        if rows
        else []
    )


def _finetuned(runs: Runs) -> Table:
    def of(text: Callable[[Any], str]) -> Callable[[Record], str]:
        return lambda run: NONE if run.result is None else text(run.result)

    columns = {
        "started from": lambda run: {"none": "scratch"}.get(run.config.init, run.config.init),  # pyright: ignore
        "images seen": _seen,
        "top-1": of(lambda result: percent(result.top1)),
        "95 % interval over test images": of(lambda result: " to ".join(percent(end) for end in result.interval)),
        "top-5": of(lambda result: percent(result.top5)),
        "by class": of(lambda result: percent(result.balanced)),
        "test images": of(lambda result: f"{result.test_images:,}"),
        "training time": _time,
    }
    return _table(columns, runs, "Test results")


def _table(columns: Mapping[str, Callable[[Record], str]], runs: Runs, caption: str) -> Table:
    """One row a run."""
    rows = ((name, *(text(run) for text in columns.values())) for name, run in runs.items())
    return Table(("run", *columns), tuple(rows), caption)


def _settings(runs: Runs) -> list[Block]:
    """The settings that matter to the result and are not the same in all runs, one column a run."""
    first, *others = runs.values()
    trees = [to_dict(run.config) for run in runs.values()]
    changed = [
        line
        for other in others
        for line in differences(type(first.config), to_dict(first.config), to_dict(other.config))
    ]
    settings = sorted({line.partition(": ")[0] for line in changed})
    if not settings:
        return [Text("The settings of these runs are the same.")]
    rows = ((setting, *(_setting(tree, setting) for tree in trees)) for setting in settings)
    return [Table(("setting", *runs), tuple(rows), "Settings", prose=True)]


def _setting(tree: Any, dotted: str) -> str:
    for key in dotted.split("."):
        tree = tree[key]
    values = tree if isinstance(tree, list) else [tree]
    return ", ".join(f"{value:.10g}" if isinstance(value, float) else shown(str(value)) for value in values)


def _environments(runs: Runs) -> list[Block]:
    """What is not the same of code and machines, as the runs were last started."""
    starts = [run.starts[-1] if run.starts else None for run in runs.values()]
    told = [{} if start is None else code(start) | versions(start) | machine(start) for start in starts]
    names = dict.fromkeys(name for of in told for name in of)
    rows = [(name, *(of.get(name, "not known") for of in told)) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not names:
        return [Text("None of these runs wrote down its code and machine.")]
    if not rows:
        return [Text("Code, versions and machine of these runs are the same.")]
    return [Table(("what", *runs), tuple(rows), "Code and machine", prose=True)]
