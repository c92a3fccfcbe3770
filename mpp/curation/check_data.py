"""The pre-flight of a pretraining run: looks at all its images, and says whether a run would start.

open_splits -> scan             every image read and decoded, in parallel: sizes, hashes, colours, values, what is bad
Duplicates, near_duplicates     equal files and equal pixels, and what splits share: also nearly equal images, groups
_draw_crops                     the targets that a run would draw first, and the rate of its loader
check_report                    on the terminal; --out has report.json, the lists and the contact sheet
"""

import contextlib
import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mpp.curation import check_report, near_duplicates
from mpp.curation.check_report import Classes, row
from mpp.curation.duplicates import Duplicates
from mpp.curation.scan import ScanResult, scan
from mpp.curation.settings import CheckRecipe
from mpp.curation.value_ranges import kind_of_form, propose
from mpp.data.decoding import BadImage
from mpp.data.reader import Bad
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.names import Split, printable
from mpp.data.sources.opening import open_splits
from mpp.data.transform import TrainTransform
from mpp.data.workers import worker_count
from mpp.downstream.contact_sheet import COLUMNS, ROWS, draw_sheet, draw_tiles, spread_over_classes
from mpp.errors import RunError
from mpp.objective.objective import Survey, survey_targets
from mpp.objective.target import build_target
from mpp.pretraining.survey import SURVEY_BATCH, SURVEY_IMAGES, survey_batches
from mpp.system.files import make_folder, one_writer, write_csv, write_whole
from mpp.system.outcome import Outcome
from mpp.system.progress import Progress
from mpp.training.bad_files import HEAD, MIN_IMAGES, by_kind

_FILES = ("contact_sheet.png", "bad_files.csv", "duplicates.csv", "near_duplicates.csv", "report.json")
_PAIRS_SHEET = "near_duplicates.png"
_TIMED_BATCHES = 8  # of each worker
_TIMED_SECONDS = 20.0


def check_data(config: CheckRecipe) -> int:
    """Looks at images, prints what they are, and returns 0 where a run would start, 1 where it would not.

    Raises UserError for bad settings, a source that does not open, an `out` that cannot be written or is in use, and
    RunError where a process was killed or the disk is full.
    """
    if not config.out:
        return _check(config, None)
    out = Path(config.out).expanduser()
    with one_writer(out, "--out"):
        make_folder(out, (*_FILES, _PAIRS_SHEET))
        return _check(config, out)


def _check(config: CheckRecipe, out: Path | None) -> int:
    reading = config.data_config.decode_options(config.in_chans)
    workers = worker_count(config.workers, 1)
    opened = open_splits(config.data, download=config.download)
    source = opened["train"]
    classes = Classes.of(source)
    if config.group:  # a wrong pattern is refused before the images are read
        check_report.Grouped.of({"train": source}, config.group)
    indices = spread_over_classes(len(source), None, config.images or len(source))
    with _bad_list(out) as report_bad, Progress("looking at images", len(indices)) as progress:
        scanned, seconds = scan(source, reading, indices, workers, report_bad, progress.to)
    splits: dict[Split, tuple[Source, ScanResult]] = {"train": (source, scanned)}
    of_others = list[str]()
    for split in opened:
        if split != "train":
            try:
                other = opened[split]
            except SourceError as error:  # pretraining does without
                of_others.append(row(f"{split} split", f"cannot be opened: {error}"))
                continue
            chosen = spread_over_classes(len(other), None, config.images or len(other))
            with Progress(f"looking at the {split} split", len(chosen)) as progress:
                looked_at, _ = scan(other, reading, chosen, workers, tell=progress.to)
            splits[split] = other, looked_at
            bad = looked_at.kinds
            what = f"{bad.total():,} of them bad ({by_kind(bad)})" if bad else "none of them bad"
            of_others.append(row(f"{split} split", f"{len(looked_at.indices):,} images looked at, {what}"))
    found = Duplicates(splits)
    sources: dict[Split, Source] = {split: of for split, (of, _) in splits.items()}
    near = near_duplicates.near_duplicates(splits, config.near) if config.near >= 0 else []
    grouped = check_report.Grouped.of(sources, config.group)
    why = _why_not_start(scanned, len(source), reading, config)
    survey = crop_rate = None
    if not why:
        try:
            survey, crop_rate = _draw_crops(source, config, reading, workers)
        except BadImage as error:
            why = str(error)
    lines = _lines(config, source, scanned, classes, found, reading)
    lines += [*of_others, *check_report.near_lines(near, sources, config.near), *grouped.lines()]
    rates = {
        "decode_per_core": int(scanned.good.sum()) / scanned.seconds if scanned.seconds else None,
        "looked_at": len(scanned.indices) / seconds,
        "workers": workers,
        "training_crops": crop_rate,
    }
    lines += [*_survey_lines(survey), *_rate_lines(rates)]
    if out:
        labels = source.labels()
        chosen = None if labels is None else labels[scanned.indices]
        shown = scanned.indices[spread_over_classes(len(scanned.indices), chosen, ROWS * COLUMNS)]
        sheet = draw_sheet(source, reading, config.image_hw, shown.tolist(), labels)
        with _writing(out):
            write_csv(out / "duplicates.csv", found.rows())
            write_csv(out / "near_duplicates.csv", near_duplicates.rows(near, sources))
            (out / _PAIRS_SHEET).unlink(missing_ok=True)
            if near:
                tiles = near_duplicates.tiles(near[: ROWS * COLUMNS // 2], sources)
                pairs = draw_tiles(tiles, reading, config.image_hw)
                write_whole(out / _PAIRS_SHEET, lambda file: pairs.save(file, "PNG"))
            write_whole(out / "contact_sheet.png", lambda file: sheet.save(file, "PNG"))
        written = (*_FILES, *([_PAIRS_SHEET] if near else []))
        lines.append(row("written", f"{printable(str(out))}: {', '.join(written)}"))
    warnings = [*source.warnings, *(classes.warnings() if classes else []), *check_report.duplicate_warnings(found)]
    warnings += [*check_report.near_warnings(near, sources), *grouped.warnings()]
    if survey and survey.warning:
        warnings.append(survey.warning)
    lines += [f"WARNING: {warning}" for warning in warnings]
    lines.append(f"a run would not start: {why}" if why else "a run would start")
    report = check_report.facts(source, scanned, classes, found, reading)
    report |= {"near_duplicates": check_report.near_facts(near, sources), "groups": grouped.facts()}
    report |= {"targets": _survey_facts(survey), "warnings": warnings, "rates": rates}
    report |= {"would_start": not why, "why": why}
    if out:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        with _writing(out):
            write_whole(out / "report.json", text.encode("utf-8", "backslashreplace"))
    print("\n".join(lines))
    return Outcome(1 if why else 0, report)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot write to {printable(str(out))} ({error.strerror or error})"
        raise RunError(f"{reason}; make room there or give another --out, and look again") from error


@contextlib.contextmanager
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


def _allowed(config: CheckRecipe, total: int) -> float:
    """How many of all the images may be bad, as in a run, whose first epoch meets every one."""
    return config.data_config.max_bad_share * max(total, MIN_IMAGES)


def _why_not_start(scanned: ScanResult, total: int, reading: DecodeOptions, config: CheckRecipe) -> str:
    """Why a run would not start, or soon stop; empty if it would go on."""
    good, bad, looked = int(scanned.good.sum()), scanned.kinds.total(), len(scanned.indices)
    too_many = bad * total / looked > _allowed(config, total)
    if good and not too_many:
        return "there is one image only" if good == 1 and looked == total else ""
    what = f"{bad:,} of {looked:,} images cannot be used ({by_kind(scanned.kinds)})"
    if good:
        what += f", more than max_bad {config.max_bad} allows"
    hints = []
    if scanned.kinds["wrong channels"]:
        flags = [f"--model.in-chans {channels}" for channels, _ in scanned.channels.most_common(3)]
        hints.append(f"{' or '.join(flags)} would fit those of wrong channels")
    if scanned.kinds["no range"]:
        proposals = [propose(kind, spread, reading) for kind, spread in sorted(scanned.spreads.items())]
        flags = [proposal.flag() for proposal in proposals if proposal]
        hints += [f"{' or '.join(flags)} would fit those of no range"] if flags else []
    return "; ".join([what, *hints])


def _draw_crops(source: Source, config: CheckRecipe, reading: DecodeOptions, workers: int) -> tuple[Survey, float]:
    """Surveys the first 512 crops of a run of seed 0; also returns the loader's crops a second, by all workers.

    Raises BadImage where 20 images in a row could not be used.
    """
    target = build_target("mean_colour", config.patch_hw, config.in_chans, config.bits)
    transform = TrainTransform(config.data_config, config.image_hw, reading.channels)
    with contextlib.closing(survey_batches(source, transform, reading, 0, workers)) as batches:
        # The first batch of each worker is there all at once, and late.
        images = [next(batches)["images"] for _ in range(max(1, workers))]
        start, timed = time.perf_counter(), 0
        while timed < _TIMED_BATCHES * max(1, workers) or len(images) * SURVEY_BATCH < SURVEY_IMAGES:
            batch = next(batches)["images"]
            timed += 1
            if len(images) * SURVEY_BATCH < SURVEY_IMAGES:
                images.append(batch)
            elif time.perf_counter() - start > _TIMED_SECONDS:
                break
        rate = timed * SURVEY_BATCH / (time.perf_counter() - start)
    return survey_targets(target, torch.cat(images)[:SURVEY_IMAGES]), rate


def _lines(
    config: CheckRecipe,
    source: Source,
    scanned: ScanResult,
    classes: Classes | None,
    found: Duplicates,
    reading: DecodeOptions,
) -> list[str]:
    drawn = len(scanned.indices) < len(source)
    eight_bits = any(kind_of_form(form) is None for form in scanned.forms)
    allowed = f"max_bad {config.max_bad} allows {int(_allowed(config, len(source))):,} in all"
    return [
        row("images", source.describe()),
        *([row("looked at", f"{len(scanned.indices):,} of them, drawn evenly")] if drawn else []),
        *(classes.lines() if classes else []),
        check_report.form_line(scanned),
        *check_report.size_lines(scanned, source, config.image_hw),
        *check_report.colour_lines(scanned, source),
        *check_report.bad_lines(scanned, allowed),
        *check_report.duplicate_lines(found, drawn),
        *check_report.value_lines(scanned.spreads, reading, eight_bits),
        check_report.statistics_line(scanned, reading),
    ]


def _survey_lines(survey: Survey | None) -> list[str]:
    if survey is None or survey.counts is None:
        return []
    what, _, rest = survey.describe().partition(": ")
    counts = survey.counts
    top = counts.argsort(descending=True, stable=True)[:5]
    shares = ", ".join(f"{int(c)}: {int(counts[c]) / int(counts.sum()):.1%}" for c in top if counts[c])
    return [row(what, rest), row("", f"most frequent classes {shares}")]


def _survey_facts(survey: Survey | None) -> dict[str, Any] | None:
    if survey is None or survey.counts is None:
        return None
    counts = survey.counts
    occurring = {int(c): int(counts[c]) for c in counts.nonzero().flatten()}
    return {"images": survey.images, "classes": len(counts), "perplexity": survey.perplexity, "counts": occurring}


def _rate_lines(rates: dict[str, float | int | None]) -> list[str]:
    workers = f"{rates['workers']} workers" if rates["workers"] else "no workers"
    lines = []
    if rates["decode_per_core"]:
        in_all = f"{rates['looked_at']:,.0f} looked at in all ({workers})"
        lines.append(row("rate", f"{rates['decode_per_core']:,.0f} images/s decoded per core, {in_all}"))
    if rates["training_crops"]:
        lines.append(row("", f"{rates['training_crops']:,.0f} training crops/s from the loader ({workers})"))
    return lines
