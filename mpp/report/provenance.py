"""Sections about what a run was made of: its data, and the command, code and machine that made it."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from mpp.config import to_yaml
from mpp.data.sources.names import printable
from mpp.data.sources.patterns import shown
from mpp.pretraining.settings import PretrainConfig
from mpp.report.page import Block, Section, Table, Text
from mpp.report.run_record import RunRecord
from mpp.report.wording import NONE
from mpp.system.files import read_csv
from mpp.training.bad_files import by_kind
from mpp.training.duration import in_words
from mpp.training.rows import evaluation_seconds, training_spans

_BAD_SHOWN = 5


def data_section(record: RunRecord) -> Section:
    """The images, how they were read and augmented, and those that could not be read."""
    data = record.config.data
    found = record.first("data") or {}
    rows = [("source", data.source), ("images found", found.get("source"))]
    if not isinstance(record.config, PretrainConfig):
        labelled = record.config.data
        rows += [("test images from", labelled.test), ("test images found", found.get("test"))]
        rows += [("share of the labels", f"{labelled.labels}, seed {labelled.labels_seed}")]
        for name, key in (("training images", "images"), ("test images", "test_images")):
            rows += [(name, f"{found[key]:,}" if isinstance(found.get(key), int) else "")]
    rows += [
        ("crop, share of the area", f"{data.crop_scale[0]:g} to {data.crop_scale[1]:g}"),
        ("crop, aspect ratio", f"{data.crop_ratio[0]:.3g} to {data.crop_ratio[1]:.3g}"),
        ("flips", f"left-right {data.hflip:g}, up-down {data.vflip:g}"),
        ("colour jitter", _numbers(data.jitter) if any(data.jitter) else ""),
        ("greyscale", f"{data.grayscale:g}" if data.grayscale else ""),
        ("normalisation mean", _numbers(data.mean) or "that of the weights"),
        ("normalisation deviation", _numbers(data.std) or "that of the weights"),
        ("black and white", _numbers(data.value_range)),
    ]
    cells = tuple((name, shown(str(value))) for name, value in rows if value)
    notes = [str(note) for note in (record.first("targets"), record.first("warning"), *found.get("notes", ())) if note]
    sentences = [note[:1].upper() + note[1:].removesuffix(".") + "." for note in notes]
    blocks = (Table(("setting", "value"), cells, "The images", prose=True), *map(Text, sentences))
    reading = (
        "Read it for what the model can know: it has seen these images alone, cropped and coloured as the table says."
    )
    return Section("data", "Data", reading, (*blocks, *_bad_files(record.folder)))


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _bad_files(folder: Path) -> list[Block]:
    """The number of files that could not be used, and the first few of them, over all ranks."""
    files = {row.get("index"): row for path in sorted(folder.glob("bad_files*.csv")) for row in read_csv(path)}
    bad = [row for row in files.values() if row.get("reason")]  # a crash may have cut the last one short
    if not bad:
        return []
    rows = tuple(tuple(printable(row[name]) for name in ("file", "kind", "reason")) for row in bad[:_BAD_SHOWN])
    caption = f"{len(bad):,} images could not be used: {by_kind(Counter(row['kind'] for row in bad))}"
    caption += f"; the first {_BAD_SHOWN}" if len(bad) > _BAD_SHOWN else ""
    return [Table(("file", "kind", "reason"), rows, caption, prose=True)]


def making_section(record: RunRecord) -> Section:
    """Command, code, versions, hardware, starts, time and the whole config."""
    blocks: list[Block] = []
    if record.starts:
        last = record.starts[-1]
        init = record.first("init")
        rows = ({"went on from": init} if init else {}) | code(last) | machine(last) | times(record)
        caption = "The run" if len(record.starts) == 1 else "The run as it was last started"
        packages = Table(("package", "version"), tuple(versions(last).items()), "Versions", folded=True, prose=True)
        blocks += [Text(_in_lines(last["command"]), "The command")] if last.get("command") else []
        blocks += [Table(("what", "value"), tuple(rows.items()), caption, prose=True), packages, _starts(record)]
    else:
        blocks.append(Text("An older version made this run, which wrote down neither its command nor its environment."))
        if spent := times(record):
            blocks.append(Table(("what", "time"), tuple(spent.items()), "Time"))
    blocks.append(Text(to_yaml(record.config), "The whole config"))
    reading = "With this command, commit and config the run can be made again: every random draw derives from the seed."
    return Section("how-it-was-made", "How it was made", reading, tuple(blocks))


def _in_lines(command: str) -> str:
    """A command with each of its flags on a line of its own, for a shell."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)


def environment(start: dict[str, Any]) -> dict[str, str]:
    """Code, versions and machine of one start."""
    return code(start) | versions(start) | machine(start)


def code(start: dict[str, Any]) -> dict[str, str]:
    """Commit, precision and seed of one start."""
    commit = start.get("commit") or "not known"
    short = commit.removesuffix("-dirty")[:12] + (", with changes" if commit.endswith("-dirty") else "")
    return {"commit": short} | {name: str(start[name]) for name in ("precision", "seed") if name in start}


def machine(start: dict[str, Any]) -> dict[str, str]:
    """The machine of one start, as far as that says."""
    hardware = start.get("hardware") or {}
    devices = Counter(hardware.get("devices") or ())
    names = ", ".join(f"{number} x {name}" if number > 1 else name for name, number in devices.items())
    hosts = hardware.get("hosts", 1)
    found = {
        "devices": names + (f", on {hosts} machines" if hosts > 1 else ""),
        "processor": hardware.get("processor", ""),
        "cores": str(hardware.get("cores", "")),
        "memory": f"{hardware['memory_gib']:g} GiB" if "memory_gib" in hardware else "",
    }
    return {name: printable(value) for name, value in found.items() if value}


def versions(start: dict[str, Any]) -> dict[str, str]:
    """Versions of the system and of each package at one start."""
    found = {"system": (start.get("hardware") or {}).get("system"), **(start.get("versions") or {})}
    return {name: printable(str(version)) for name, version in found.items() if version}


def _starts(record: RunRecord) -> Table:
    rows = []
    for start in record.starts:
        time = start.get("time", NONE).replace("T", " ").removesuffix("+00:00")
        rows.append((time, f"{start.get('step', 0):,}", code(start)["commit"], machine(start).get("devices", NONE)))
    caption = "Started once" if len(rows) == 1 else f"Started {len(rows)} times"
    head = ("start (UTC)", "from step", "commit", "devices")
    return Table(head, tuple(rows), caption, folded=len(rows) == 1, prose=True)


def times(record: RunRecord) -> dict[str, str]:
    """Time of training and of evaluations over all starts, and the hours of devices that it makes."""
    spans = list(training_spans(record.rows))
    if not spans:
        return {}
    found = {"training time": in_words(sum(seconds for _, seconds in spans))}
    for name, kind in (("few-shot evaluations", "fewshot"), ("effective rank", "rank")):
        if seconds := evaluation_seconds(record.rows, [kind]):
            found[name] = in_words(seconds)
    if record.starts:
        hours = sum(seconds * _devices(record, row["step"]) for row, seconds in spans) / 3600
        found["device-hours of training"] = f"{hours:,.3g}"
    return found


def _devices(record: RunRecord, step: int) -> int:
    """Number of processes, each with its device, that made the step."""
    before = [start for start in record.starts if start.get("step", 0) < step]
    return max(1, len((before[-1].get("hardware") or {}).get("devices") or ())) if before else 1
