"""The pre-flight of a pretraining run: looks at all its images, and says whether a run would start.

open_splits -> scan             every image read and decoded, in parallel: sizes, hashes, colours, values, what is bad
Duplicates                      equal files and equal pixels, also between train and test
draw_crops                      the targets that a run would see first, and the rate of its loader
report                          on the terminal; --out has report.json, the lists and the contact sheet
"""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mpp.curation.checking import report
from mpp.curation.checking.classes import Classes
from mpp.curation.checking.crops import Crops, draw_crops
from mpp.curation.checking.duplicates import Duplicates
from mpp.curation.checking.report import row
from mpp.curation.checking.scan import Tally, scan
from mpp.curation.checking.sheet import COLUMNS, ROWS, draw_sheet, spread_over_classes
from mpp.curation.checking.values import kind_of_form, propose
from mpp.curation.settings import CheckRecipe
from mpp.data.decoding import BadImage
from mpp.data.reader import Bad
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.names import printable
from mpp.data.sources.opening import Splits, open_splits
from mpp.data.workers import worker_count
from mpp.errors import RunError
from mpp.objective.target import build_target
from mpp.system.files import make_folder, one_writer, write_csv, write_whole
from mpp.training.bad_files import HEAD, MIN_IMAGES, by_kind

_FILES = ("contact_sheet.png", "bad_files.csv", "duplicates.csv", "report.json")
_NEWS = 30.0  # seconds between two words on how far it is


def check_data(config: CheckRecipe) -> int:
    """Looks at images, prints what they are, and returns 0 where a run would start, 1 where it would not.

    Raises:
        UserError: a source that cannot be opened, settings that do not fit, or an `out` that cannot be written or that
            another process writes to.
        RunError: a process was killed, or `out` can be written no longer.
    """
    if not config.out:
        return _check(config, None)
    out = Path(config.out).expanduser()
    with one_writer(out, "--out"):
        make_folder(out, _FILES)
        return _check(config, out)


def _check(config: CheckRecipe, out: Path | None) -> int:
    data = config.data_config
    reading = data.decode_options(config.in_chans)
    workers = worker_count(config.workers, 1)
    opened = open_splits(config.data, download=config.download)
    source = opened["train"]
    test, no_test = _test_split(opened)
    classes = Classes.of(source)
    indices = _drawn(len(source), config.images)
    with _bad_list(out) as report_bad:
        tally, seconds = scan(source, reading, indices, workers, report_bad, _progress(len(indices)))
    splits = [(source, tally)]
    if test is not None:
        splits.append((test, scan(test, reading, _drawn(len(test), config.images), workers)[0]))
    found = Duplicates(splits)
    why = _against(tally, len(source), reading, config)
    crops = None
    if not why:
        target = build_target("mean_colour", config.patch_hw, config.in_chans, config.bits)
        try:
            crops = draw_crops(source, data, reading, config.image_hw, target, workers)
        except BadImage as error:
            why = str(error)
    lines = _lines(config, source, tally, classes, found, reading)
    lines += [_test_line(splits[1][1])] if test is not None else [row("test split", no_test)] if no_test else []
    rates = _rates(tally, seconds, workers, crops)
    lines += [*_crop_lines(crops), *_rate_lines(rates), *_write(out, config, source, tally, found, reading)]
    warnings = [*source.warnings, *(classes.warnings() if classes else []), *report.duplicate_warnings(found)]
    if crops and crops.survey.warning:
        warnings.append(crops.survey.warning)
    lines += [f"WARNING: {warning}" for warning in warnings]
    lines.append(f"a run would not start: {why}" if why else "a run would start")
    if out:
        known = report.facts(source, tally, classes, found, reading)
        known |= {"targets": _survey_facts(crops), "warnings": warnings, "rates": rates}
        known |= {"would_start": not why, "why": why}
        with _writing(out):
            write_whole(out / "report.json", lambda file: file.write(_json(known)))
    print("\n".join(lines))
    return 1 if why else 0


def _json(known: dict[str, Any]) -> bytes:
    return (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _test_split(opened: Splits) -> tuple[Source | None, str]:
    """The source's own test split, or why it cannot be opened, if there is one: pretraining does without."""
    try:
        return opened.get("test"), ""
    except SourceError as error:
        return None, f"cannot be opened: {error}"


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot write to {printable(str(out))} ({error.strerror or error})"
        raise RunError(f"{reason}; make room there or give another --out, and look again") from error


def _drawn(total: int, wanted: int) -> np.ndarray:
    """All, or so many, evenly: int64."""
    if not 0 < wanted < total:
        return np.arange(total, dtype=np.int64)
    return np.arange(wanted, dtype=np.int64) * total // wanted


@contextmanager
def _bad_list(out: Path | None) -> Iterator[Callable[[list[Bad]], None]]:
    """Writes bad_files.csv as they come, for there may be very many."""
    if out is None:
        yield lambda bad: None
        return
    with (out / "bad_files.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEAD)

        def write(bad: list[Bad]) -> None:
            with _writing(out):
                table.writerows((one.index, one.kind, one.where, one.reason) for one in bad)

        yield write


def _progress(total: int) -> Callable[[int], None]:
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > _NEWS:
            last = time.monotonic()
            print(f"looked at {done:,} of {total:,} images", file=sys.stderr)

    return tell


def _allowed(config: CheckRecipe, total: int) -> float:
    """How many of all the images may be bad, as a run has it, whose first epoch meets every one."""
    return config.data_config.max_bad_share * max(total, MIN_IMAGES)


def _against(tally: Tally, total: int, reading: DecodeOptions, config: CheckRecipe) -> str:
    """Why a run would not start, or soon stop; empty if it would go on."""
    good, looked = int(tally.good.sum()), len(tally.indices)
    too_many = tally.bad * total / looked > _allowed(config, total)
    if good and not too_many:
        return "there is one image only" if good == 1 and looked == total else ""
    what = f"{tally.bad:,} of {looked:,} images cannot be used ({by_kind(tally.kinds)})" + (
        "" if not good else f", more than max_bad {config.max_bad} allows"
    )
    hints = []
    if tally.kinds["wrong channels"]:
        counts = [f"--model.in-chans {channels}" for channels, _ in tally.channels.most_common(3)]
        hints.append(f"{' or '.join(counts)} would fit those of wrong channels")
    if tally.kinds["no range"]:
        proposals = [propose(kind, spread, reading) for kind, spread in sorted(tally.spreads.items())]
        flags = [proposal.flag() for proposal in proposals if proposal]
        hints += [f"{' or '.join(flags)} would fit those of no range"] if flags else []
    return "; ".join([what, *hints])


def _lines(
    config: CheckRecipe,
    source: Source,
    tally: Tally,
    classes: Classes | None,
    found: Duplicates,
    reading: DecodeOptions,
) -> list[str]:
    drawn = len(tally.indices) < len(source)
    looked = [row("looked at", f"{len(tally.indices):,} of them, drawn evenly")] if drawn else []
    eight_bits = any(kind_of_form(form) is None for form in tally.forms)
    return [
        row("images", source.describe()),
        *looked,
        *report.class_lines(classes),
        report.form_line(tally),
        *report.size_lines(tally, source, config.image_hw),
        *report.colour_lines(tally, source),
        *report.bad_lines(tally, f"max_bad {config.max_bad} allows {int(_allowed(config, len(source))):,} in all"),
        *report.duplicate_lines(found, drawn),
        *report.value_lines(tally.spreads, reading, eight_bits),
        report.statistics_line(tally, reading),
    ]


def _test_line(tally: Tally) -> str:
    bad = f", {tally.bad:,} of them bad ({by_kind(tally.kinds)})" if tally.bad else ", none of them bad"
    return row("test split", f"{len(tally.indices):,} images looked at{bad}")


def _crop_lines(crops: Crops | None) -> list[str]:
    if crops is None:
        return []
    what, _, rest = crops.survey.describe().partition(": ")
    counts = crops.survey.counts
    if counts is None:
        return [row(what, rest)]
    top = counts.argsort(descending=True, stable=True)[:5]
    shares = ", ".join(f"{int(c)}: {int(counts[c]) / int(counts.sum()):.1%}" for c in top if counts[c])
    return [row(what, rest), row("", f"most frequent classes {shares}")]


def _survey_facts(crops: Crops | None) -> dict[str, Any] | None:
    if crops is None or crops.survey.counts is None:
        return None
    counts, survey = crops.survey.counts, crops.survey
    occurring = {int(c): int(counts[c]) for c in counts.nonzero().flatten()}
    return {"images": survey.images, "classes": len(counts), "perplexity": survey.perplexity, "counts": occurring}


def _rates(tally: Tally, seconds: float, workers: int, crops: Crops | None) -> dict[str, float | int | None]:
    good = int(tally.good.sum())
    return {
        "decode_per_core": good / tally.seconds if tally.seconds else None,
        "looked_at": len(tally.indices) / seconds,
        "workers": workers,
        "training_crops": crops.rate if crops else None,
    }


def _rate_lines(rates: dict[str, float | int | None]) -> list[str]:
    workers = f"{rates['workers']} workers" if rates["workers"] else "no workers"
    lines = []
    if rates["decode_per_core"]:
        in_all = f"{rates['looked_at']:,.0f} looked at in all ({workers})"
        lines.append(row("rate", f"{rates['decode_per_core']:,.0f} images/s decoded per core, {in_all}"))
    if rates["training_crops"]:
        lines.append(row("", f"{rates['training_crops']:,.0f} training crops/s from the loader ({workers})"))
    return lines


def _write(
    out: Path | None, config: CheckRecipe, source: Source, tally: Tally, found: Duplicates, reading: DecodeOptions
) -> list[str]:
    """The lists and the contact sheet, and the lines that name them."""
    if out is None:
        return []
    labels = source.labels()
    shown = spread_over_classes(tally.indices, None if labels is None else labels[tally.indices], ROWS * COLUMNS)
    sheet = draw_sheet(source, reading, config.image_hw, tally.indices[shown].tolist(), labels)
    with _writing(out):
        write_csv(out / "duplicates.csv", found.rows())
        write_whole(out / "contact_sheet.png", lambda file: sheet.save(file, "PNG"))
    return [row("written", f"{printable(str(out))}: {', '.join(_FILES)}")]
