"""Where a run spent its time waiting for images: how much of it, and what the user can do about it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mpp.errors import command
from mpp.training.bad_files import told
from mpp.training.log import read_rows
from mpp.training.rows import training_spans

WORTH_SAYING = 0.1
"""Share of the training time from which on waiting for data is told and advised upon."""


class Images(Protocol):
    """What a config says of its images; `mpp.data.settings.DataConfig` is one."""

    @property
    def source(self) -> str: ...

    @property
    def cache(self) -> str: ...

    @property
    def keep(self) -> bool: ...


def data_notes(folder: Path, images: Images, workers: int, cores: int) -> list[str]:
    """What its images did to a run, if anything: files that could not be used, time spent waiting.

    Args:
        folder: of the run.
        images: its config's.
        workers: loader processes per device.
        cores: that each device's process could use.
    """
    share = waited(read_rows(folder / "metrics.jsonl"))
    notes = [told(folder), advice(share, images.source, images.cache, images.keep, workers, cores)]
    return [note for note in notes if note]


def waited(rows: Iterable[Mapping[str, Any]]) -> float:
    """The share of the training time spent waiting for data, over the rows that tell it, each by its own time."""
    spans = [(row["time/data_wait"], seconds) for row, seconds in training_spans(rows) if "time/data_wait" in row]
    spent = sum(seconds for _, seconds in spans)
    return sum(share * seconds for share, seconds in spans) / spent if spent else 0.0


def advice(share: float, source: str, cache: str, keep: bool, workers: int, cores: int) -> str:
    """What to do about a share of the time spent waiting; empty where it is not worth a word.

    Args:
        share: as `waited` gives it.
        source: the string that the images were opened by.
        cache: whether decoded pixels are kept: auto, none or pixels.
        keep: whether what is fetched of remote shards is kept.
        workers: loader processes per device.
        cores: that each device's process could use.
    """
    if share < WORTH_SAYING:
        return ""
    steps = []
    more = workers < cores and (workers > 0 or cores > 2)  # on two, reading in the training process was faster
    if more:
        steps.append(f"raise --data.workers (it was {workers}, there are {cores} cores a device)")
    if "://" in source and not keep:
        steps.append("keep what was fetched: --data.keep true")
    if "://" not in source and any(kind in source for kind in ("folder:", "csv:")):
        steps.append(f"pack the images into shards, smaller if they are large: {command('shard')} --resize")
    if "array:" not in source and "cifar" not in source and cache == "none":
        steps.append("where they are few or small, decode them once: --data.cache auto")
    if not more:
        steps.append("take a machine with more cores a device")
    return f"{share:.0%} of the training time was spent waiting for images: " + "; or ".join(steps)
