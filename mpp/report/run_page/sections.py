"""What a run folder tells by itself, without its model: headline, curves, results, data, how it was made."""

from collections.abc import Sequence
from pathlib import Path

from mpp.report.page.parts import Section
from mpp.report.run_page.curves import curves_section
from mpp.report.run_page.provenance import data_section, making_section, times_told
from mpp.report.run_page.reading import Record, read_csv, read_record
from mpp.report.run_page.related import related
from mpp.report.run_page.results import fewshot_gain, fewshot_section, finetune_section, most_frequent
from mpp.report.run_page.wording import percent, points, score_text
from mpp.training.rows import last_part


def sections(folder: Path, results: Sequence[Path] = ()) -> tuple[Section, ...]:
    """The sections of a pretraining or fine-tuning run, whatever of it there is.

    Args:
        folder: of the run.
        results: more folders of fine-tuning runs, few-shot tables and studies than those beside the run.

    Raises:
        UserError: a folder that is no run.
    """
    record = read_record(folder)
    found = [
        finetune_section(record),
        curves_section(record),
        fewshot_section(record),
        related(folder, results) if record.pretraining else None,
        data_section(record),
        making_section(record),
    ]
    return tuple(section for section in found if section is not None)


def headline(folder: Path) -> dict[str, str]:
    """The few figures of a run that matter most, by what they are.

    Raises:
        UserError: a folder that is no run.
    """
    return headline_of(read_record(folder))


def headline_of(record: Record) -> dict[str, str]:
    """As `headline`, of a run that has been read."""
    told = {}
    if record.pretraining:
        told |= _predictions(record)
        gain = fewshot_gain(record)
        if gain is not None:
            told[f"points gained at {gain[0]} shot{'s' * (gain[0] > 1)}"] = points(gain[1])
    elif record.result is not None:
        result = record.result
        told["top-1"] = percent(result.top1)
        trivial = most_frequent(read_csv(record.folder / "classes.csv"))
        told |= {} if trivial is None else {"always the most frequent class": percent(trivial)}
        told |= {} if result.top5 is None else {"top-5": percent(result.top5)}
        told["mean over the classes"] = percent(result.balanced)
    elif record.trained:
        told["training accuracy"] = percent(record.trained[-1].get("accuracy"))
    if record.trained:
        told["images seen"] = f"{record.trained[-1]['images']:,}"
    return told | {name: value for name, value in times_told(record).items() if name == "training time"}


def _predictions(record: Record) -> dict[str, str]:
    """The model at masked patches beside what needs no model, over the last twentieth of the run."""
    last, _ = last_part([row for row in record.trained if record.score in row], record.score)
    word = "accuracy" if record.score == "accuracy" else "squared error"
    named = {f"{word} at masked patches": "_masked", "nearest visible patches": "_baseline_neighbours"}
    return {
        name: score_text(record.score, last[record.score + kind])
        for name, kind in named.items()
        if record.score + kind in last
    }
