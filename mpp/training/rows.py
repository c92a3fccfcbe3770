"""metrics.jsonl, the figures of a run: one row of JSON for each interval of steps, and what the rows add up to."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpp.system.files import write_whole

Row = dict[str, Any]
FILE = "metrics.jsonl"
_BEGINNING = '{"step": '  # of each row


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a metrics.jsonl; of a line cut short by a crash or a full disk, what is whole after the cut."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    rows = (_parse(line) or _parse(line[max(0, line.rfind(_BEGINNING)) :]) for line in lines)
    return [row for row in rows if row is not None]


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def drop_rows(path: Path, last_step: int) -> tuple[list[Row], list[Row]]:
    """Remove the rows after `last_step` (0: all) from a metrics.jsonl; returns those that stay and those removed."""
    kept: list[Row] = []
    dropped: list[Row] = []
    for row in read_rows(path):
        (kept if last_step and row["step"] <= last_step else dropped).append(row)
    # Rows must never be older than the checkpoint that they lead to, though the power fails.
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept), sync=True)
    return kept, dropped


def last_part(rows: Sequence[Mapping[str, Any]], score: str) -> tuple[dict[str, float], int]:
    """Average the scores over the last rows, as many as make a twentieth of the run; returns means and their steps.

    Scores are the finite figures whose names begin with `score`, such as "accuracy"; each row counts as many times as
    it has steps.
    """
    total: dict[str, float] = {}
    weights: dict[str, int] = {}
    span = 0
    for number in range(len(rows) - 1, -1, -1):
        steps = rows[number]["step"] - (rows[number - 1]["step"] if number else 0)
        for name, value in rows[number].items():
            if name.startswith(score) and isinstance(value, int | float) and math.isfinite(value):
                total[name] = total.get(name, 0.0) + steps * value
                weights[name] = weights.get(name, 0) + steps
        span += steps
        if 20 * span >= rows[-1]["step"]:
            break
    return {name: value / weights[name] for name, value in total.items() if weights[name]}, span


def training_spans(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Yield each row with a speed, and the seconds of training since the last, without evaluations and saves."""
    images = 0
    for row in rows:
        speed = row.get("time/images_per_second")
        if speed:
            yield row, (row["images"] - images) / speed
            images = row["images"]


def evaluation_seconds(rows: Iterable[Mapping[str, Any]], kinds: Sequence[str] = ("fewshot", "rank")) -> float:
    """Sum the seconds that evaluations took: of few-shot accuracy, of the features' effective rank."""
    return sum(row.get(f"time/{kind}_seconds", 0.0) for row in rows for kind in kinds)
