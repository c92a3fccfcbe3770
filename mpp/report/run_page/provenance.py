"""What a run was made of: its data, and how, on what and by which code it was made."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from mpp.config import to_yaml
from mpp.data.sources.names import printable
from mpp.data.sources.patterns import shown
from mpp.pretraining.settings import PretrainConfig
from mpp.report.page.parts import Block, Section, Table, Text
from mpp.report.run_page.reading import Record, read_csv
from mpp.report.run_page.wording import NONE, duration
from mpp.training.bad_files import by_kind
from mpp.training.rows import training_spans

_BAD_SHOWN = 5


def data_section(record: Record) -> Section:
    """Which images, how they were read and augmented, and those that could not be."""
    data = record.config.data
    told = _first(record, "data") or {}
    rows = [("source", data.source), ("images found", told.get("source", ""))]
    if not isinstance(record.config, PretrainConfig):
        rows += [("test images from", record.config.data.test), ("test images found", told.get("test", ""))]
        rows += [("share of the labels", f"{record.config.data.labels}, seed {record.config.data.labels_seed}")]
        rows += [("training images", _number(told.get("images"))), ("test images", _number(told.get("test_images")))]
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
    table = Table(("setting", "value"), cells, "The images", prose=True)
    notes = [_first(record, "targets"), _first(record, "warning"), *told.get("notes", ())]
    blocks: list[Block] = [table, *(Text(_sentence(str(note))) for note in notes if note)]
    return Section(
        "data",
        "Data",
        "Read it for what the model can know: it has seen these images alone, cropped and coloured as the table says.",
        (*blocks, *_bad_files(record.folder)),
    )


def _first(record: Record, name: str) -> Any:
    """What the first start that tells it says."""
    return next((start[name] for start in record.starts if start.get(name)), None)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def _bad_files(folder: Path) -> list[Block]:
    """How many files could not be used, and the first few of them, over all ranks."""
    files = {row.get("index"): row for path in sorted(folder.glob("bad_files*.csv")) for row in read_csv(path)}
    met = [row for row in files.values() if row.get("reason")]  # a crash may have cut the last one short
    if not met:
        return []
    kinds = Counter(row["kind"] for row in met)
    rows = tuple(tuple(printable(row[name]) for name in ("file", "kind", "reason")) for row in met[:_BAD_SHOWN])
    said = f"{len(met):,} images could not be used: {by_kind(kinds)}"
    more = f"; the first {_BAD_SHOWN}" if len(met) > _BAD_SHOWN else ""
    return [Table(("file", "kind", "reason"), rows, said + more, prose=True)]


def making_section(record: Record) -> Section:
    """Command, code, versions, hardware, starts, time and the whole config."""
    blocks: list[Block] = []
    if record.starts:
        last = record.starts[-1]
        init = _first(record, "init")
        rows = ({"went on from": init} if init else {}) | code(last) | machine(last) | times_told(record)
        said = "The run" if len(record.starts) == 1 else "The run as it was last started"
        blocks += [Text(_in_lines(last["command"]), "The command")] if last.get("command") else []
        blocks += [Table(("what", "value"), tuple(rows.items()), said, prose=True), _versions(last), _starts(record)]
    else:
        blocks.append(Text("An older version made this run, which wrote down neither its command nor its environment."))
        times = times_told(record)
        blocks += [Table(("what", "time"), tuple(times.items()), "Time")] if times else []
    blocks.append(Text(to_yaml(record.config), "The whole config"))
    return Section(
        "how-it-was-made",
        "How it was made",
        "With this command, commit and config the run can be made again: every random draw derives from the seed.",
        tuple(blocks),
    )


def _in_lines(command: str) -> str:
    """A command with each of its flags on a line of its own, as a shell takes it, too."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)


def code(start: dict[str, Any]) -> dict[str, str]:
    """Commit, precision and seed of one start."""
    commit = start.get("commit") or "not known"
    short = commit.removesuffix("-dirty")[:12] + (", with changes" if commit.endswith("-dirty") else "")
    return {"commit": short} | {name: str(start[name]) for name in ("precision", "seed") if name in start}


def machine(start: dict[str, Any]) -> dict[str, str]:
    """What one start ran on; what it does not say is left out."""
    hardware = start.get("hardware") or {}
    devices = Counter(hardware.get("devices") or ())
    hosts = hardware.get("hosts", 1)
    told = {
        "devices": ", ".join(f"{number} x {name}" if number > 1 else name for name, number in devices.items())
        + (f", on {hosts} machines" if hosts > 1 else ""),
        "processor": hardware.get("processor", ""),
        "cores": str(hardware.get("cores", "")),
        "memory": f"{hardware['memory_gib']:g} GiB" if "memory_gib" in hardware else "",
    }
    return {name: printable(value) for name, value in told.items() if value}


def versions(start: dict[str, Any]) -> dict[str, str]:
    """Version of each package and of the system that one start tells of."""
    told = {"system": (start.get("hardware") or {}).get("system"), **(start.get("versions") or {})}
    return {name: printable(str(version)) for name, version in told.items() if version}


def _versions(start: dict[str, Any]) -> Table:
    return Table(("package", "version"), tuple(versions(start).items()), "Versions", folded=True, prose=True)


def _starts(record: Record) -> Table:
    rows = []
    for start in record.starts:
        time = start.get("time", NONE).replace("T", " ").removesuffix("+00:00")
        rows.append((time, f"{start.get('step', 0):,}", code(start)["commit"], machine(start).get("devices", NONE)))
    caption = "Started once" if len(rows) == 1 else f"Started {len(rows)} times"
    head = ("start (UTC)", "from step", "commit", "devices")
    return Table(head, tuple(rows), caption, folded=len(rows) == 1, prose=True)


def times_told(record: Record) -> dict[str, str]:
    """Time spent training and looking, over all starts, and what that makes in hours of devices."""
    spans = list(training_spans(record.rows))
    if not spans:
        return {}
    told = {"training time": duration(sum(seconds for _, seconds in spans))}
    looking = sum(row.get("time/fewshot_seconds", 0.0) for row in record.rows)
    if looking:
        told["few-shot evaluations"] = duration(looking)
    if record.starts:
        hours = sum(seconds * _devices(record, row["step"]) for row, seconds in spans) / 3600
        told["device-hours of training"] = f"{hours:,.3g}"
    return told


def _devices(record: Record, step: int) -> int:
    """Processes, each with its device, that made the step."""
    number = 1
    for start in record.starts:
        if start.get("step", 0) < step:
            number = max(1, len((start.get("hardware") or {}).get("devices") or ()))
    return number
