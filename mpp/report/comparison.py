"""A page that puts several runs side by side: their results, the same curves, and how their settings differ."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpp.config import by_name, differences, to_dict
from mpp.data.sources.patterns import shown
from mpp.report.curves import BAND, IMAGES_SEEN, Chart, charts
from mpp.report.page import Gallery, Page, Picture, Section, Table, Text
from mpp.report.provenance import environment, times
from mpp.report.results import fewshot_accuracy, fewshot_ends, start_name
from mpp.report.run_record import RunRecord, read_run
from mpp.report.wording import NONE, figure, listed, percent, score_text, shots_text
from mpp.training.rows import last_part

_MANY = 6  # runs from which on a chart has no room for bands

Runs = Mapping[str, RunRecord]
"""By their names on the page."""


def comparison(folders: Sequence[Path]) -> Page:
    """Puts the runs in these folders side by side, pretraining and fine-tuning runs apart.

    Raises:
        UserError: a folder that is no run.
    """
    runs = dict(zip(short_names(folders), map(read_run, folders), strict=True))
    kinds: dict[str, Runs] = {
        "pretraining": {name: run for name, run in runs.items() if run.pretraining},
        "fine-tuning": {name: run for name, run in runs.items() if not run.pretraining},
    }
    present = {kind: of for kind, of in kinds.items() if of}
    numbers = " and ".join(f"{len(of)} {kind} run{'s' * (len(of) > 1)}" for kind, of in present.items())
    sections = [section for kind, of in present.items() for section in _sections(kind, of, len(present) > 1)]
    return Page("Runs side by side", f"{numbers}: {listed(list(runs), 20)}.", tuple(sections))


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest names that differ: paths below the folder that contains all runs."""
    paths = [folder.absolute() for folder in folders]
    below = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(below)) for path in paths]


def _sections(kind: str, runs: Runs, several_kinds: bool) -> list[Section]:
    """The sections of the runs of one kind."""
    pretraining = kind == "pretraining"
    ending = f": {kind}" if several_kinds else ""
    paper = "section 4.6 and appendix B.1.2" if pretraining else "section 4.1 and appendix B.1.1"
    pictures = _pictures(kind, runs)
    last = "over the last twentieth of each run; " if pretraining else "of each run; "
    found = [
        Section(
            f"{kind}-results",
            f"Results{ending}",
            f"Figures {last}compare rows only where data and length are the same, which the settings below tell.",
            (_pretrained(runs), *_fewshot(runs)) if pretraining else (_finetuned(runs),),
            paper,
        ),
        Section(
            f"{kind}-curves",
            f"Curves{ending}",
            "One line a run, over the images that it has seen: at the same place the runs have seen as many images.",
            (Gallery(pictures),) if pictures else (Text("No figures of the training have been written yet."),),
            paper,
        ),
        Section(
            f"{kind}-differences",
            f"What differs{ending}",
            "What is not named here is the same in all of these runs, but for settings that leave the result as it is.",
            (_settings(runs), _environments(runs)),
        ),
    ]
    return found if len(runs) > 1 else found[:2]


def _pictures(kind: str, runs: Runs) -> tuple[Picture, ...]:
    """A chart for each figure that one run at least has, one line a run."""
    groups = {run: {chart.name: chart for chart in charts(record)} for run, record in runs.items()}
    wanted: dict[tuple[str, str], tuple[Chart, str]] = {}
    for group, chart in (each for of in groups.values() for each in of.items()):
        for name, label in chart.figures:
            wanted.setdefault((group, name), (chart, label))
    pictures = []
    for (group, name), (chart, label) in wanted.items():
        lines, ends = [], []
        for number, (run, record) in enumerate(runs.items()):
            line = chart.line(record.rows, name, run, number) if group in groups[run] else None
            if line is not None:
                lines.append(line if len(runs) <= _MANY else replace(line, spread=None))
                ends.append(f"{run} {chart.text(line.y[np.isfinite(line.y)][-1])}")
        if lines:
            title = chart.title if len(runs) <= _MANY else chart.title.removesuffix(BAND)
            title = title if label.lower() in (chart.y, title.lower()) else f"{title}, {label}"
            alt = f"{title} over {IMAGES_SEEN}, one line a run; at the end: {listed(ends, 20)}."
            pictures.append(chart.draw(re.sub(r"\W+", "_", f"{kind}_{group}_{name}"), alt, lines, title))
    return tuple(pictures)


def _pretrained(runs: Runs) -> Table:
    def last(run: RunRecord, name: str) -> float | None:
        return last_part([row for row in run.trained if name in row], name)[0].get(name)

    def column(score: str, ending: str) -> Callable[[RunRecord], str]:
        return lambda run: score_text(score, last(run, score + ending)) if run.score == score else NONE

    columns: dict[str, Callable[[RunRecord], str]] = {
        IMAGES_SEEN: _images,
        "loss": lambda run: figure(last(run, "loss")),
    }
    for score, word in (("accuracy", "accuracy"), ("mse", "squared error")):
        if any(run.score == score for run in runs.values()):
            columns |= {f"{word}, masked": column(score, "_masked"), f"{word}, all": column(score, "")}
            columns[f"neighbours' {word}"] = column(score, "_baseline_neighbours")
    columns |= {"training time": _time, "ended": lambda run: "yes" if run.ended else "no"}
    caption = "Predictions of corrupted patches, beside the mean colour of their nearest visible neighbours"
    return _table(columns, runs, caption)


def _images(run: RunRecord) -> str:
    return f"{run.trained[-1]['images']:,}" if run.trained else NONE


def _time(run: RunRecord) -> str:
    return times(run).get("training time", NONE)


def _fewshot(runs: Runs) -> list[Table]:
    """Few-shot accuracy of every run that measured it, first and last."""
    shots = sorted({k for run in runs.values() for k in run.shots})
    rows = []
    for name, run in runs.items():
        for row, encoder in zip(fewshot_ends(run), (start_name(run.config), "pretrained"), strict=True):
            if row is not None:
                rows.append((name, encoder, *(fewshot_accuracy(row, k) for k in shots)))
    caption = "Few-shot accuracy (section 4.1), mean ± standard deviation over the draws of the shots"
    return [Table(("run", "encoder", *map(shots_text, shots)), tuple(rows), caption)] if rows else []


def _finetuned(runs: Runs) -> Table:
    kinds = {run.result.mean_ap is not None for run in runs.values() if run.result} or {False}

    def share(name: str, several: bool) -> Callable[[RunRecord], str]:
        def text(run: RunRecord) -> str:
            result = run.result
            return percent(getattr(result, name)) if result and (result.mean_ap is not None) is several else NONE

        return text

    scores = {"mAP": share("mean_ap", True)} if True in kinds else {}
    scores |= {"top-1": share("top1", False)} if False in kinds else {}
    further = {"exact match": share("top1", True), "recall by class": share("balanced", True)} if True in kinds else {}
    further |= {"top-5": share("top5", False), "by class": share("balanced", False)} if False in kinds else {}
    columns: dict[str, Callable[[RunRecord], str]] = {
        "started from": lambda run: {"none": "scratch"}.get(run.config.init, run.config.init),
        IMAGES_SEEN: _images,
        **scores,
        "95 % interval over test images": lambda run: (
            " to ".join(map(percent, run.result.figure_interval)) if run.result and run.result.figure_interval else NONE
        ),
        **further,
        "test images": lambda run: f"{run.result.test_images:,}" if run.result else NONE,
        "training time": _time,
    }
    return _table(columns, runs, "Test results")


def _table(columns: Mapping[str, Callable[[RunRecord], str]], runs: Runs, caption: str) -> Table:
    """One row a run."""
    rows = ((name, *(text(run) for text in columns.values())) for name, run in runs.items())
    return Table(("run", *columns), tuple(rows), caption)


def _settings(runs: Runs) -> Table | Text:
    """The settings that matter to the result and are not the same in all runs, one column a run."""
    configs = [run.config for run in runs.values()]
    first, *others = map(to_dict, configs)
    lines = [line for other in others for line in differences(type(configs[0]), first, other)]
    names = sorted({line.partition(": ")[0] for line in lines})
    if not names:
        return Text("The settings of these runs are the same.")
    values = [by_name(config) for config in configs]

    def text(value: object) -> str:
        each = value if isinstance(value, list) else [value]
        return ", ".join(f"{one:.10g}" if isinstance(one, float) else shown(str(one)) for one in each)

    rows = ((name, *(text(of[name]) for of in values)) for name in names)
    return Table(("setting", *runs), tuple(rows), "Settings", prose=True)


def _environments(runs: Runs) -> Table | Text:
    """Code and machine of each run's last start, where they differ."""
    found = [environment(run.starts[-1]) if run.starts else {} for run in runs.values()]
    names = dict.fromkeys(name for each in found for name in each)
    rows = [(name, *(each.get(name, "not known") for each in found)) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not names:
        return Text("None of these runs wrote down its code and machine.")
    if not rows:
        return Text("Code, versions and machine of these runs are the same.")
    return Table(("what", *runs), tuple(rows), "Code and machine", prose=True)
