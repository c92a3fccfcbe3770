"""Where a run spent its time waiting for images: how much of it, and what the user can do about it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpp.data.settings import DataConfig
from mpp.errors import command
from mpp.training.bad_files import summary_of
from mpp.training.rows import FILE, read_rows, training_spans

_MIN_SHARE = 0.1  # of the training time: where less was spent waiting, nothing is said


def data_notes(folder: Path, data: DataConfig, workers: int, cores: int) -> list[str]:
    """Return what its images did to the run in `folder`, if anything: files that could not be used, time spent waiting.

    `workers` and `cores` are those of each device's process.
    """
    notes = [summary_of(folder), advice(waited(read_rows(folder / FILE)), data, workers, cores)]
    return [note for note in notes if note]


def waited(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of the training time spent waiting for data, each row weighted by its own time."""
    spans = [(row["time/data_wait"], seconds) for row, seconds in training_spans(rows) if "time/data_wait" in row]
    spent = sum(seconds for _, seconds in spans)
    return sum(share * seconds for share, seconds in spans) / spent if spent else 0.0


def advice(share: float, data: DataConfig, workers: int, cores: int) -> str:
    """Return what to do about a share of the time spent waiting (see `waited`); empty for a small share."""
    if share < _MIN_SHARE:
        return ""
    steps, remote = [], "://" in data.source
    more = workers < cores and (workers > 0 or cores > 2)  # on two, reading in the training process was faster
    if more:
        steps.append(f"raise --data.workers (it was {workers}, there are {cores} cores a device)")
    if remote and not data.keep:
        steps.append("keep what was fetched: --data.keep true")
    if not remote and any(kind in data.source for kind in ("folder:", "csv:")):
        steps.append(f"pack the images into shards, smaller if they are large: {command('shard')} --resize")
    if "array:" not in data.source and "cifar" not in data.source and data.cache == "none":
        steps.append("where they are few or small, decode them once: --data.cache auto")
    if not more:
        steps.append("take a machine with more cores a device")
    return f"{share:.0%} of the training time was spent waiting for images: " + "; or ".join(steps)
