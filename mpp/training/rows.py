"""What the rows of a metrics.jsonl come to: the figures of the last part of a run, and the time that it took."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def last_part(rows: Sequence[Row], score: str) -> tuple[dict[str, float], int]:
    """Means of the scores over the last rows, as many as make a twentieth of the run, and their steps.

    Args:
        rows: of a run, in order, each with `step`, which counts as many times as it has steps.
        score: what the names of the figures begin with, such as "accuracy". A figure that is not finite is left out.
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


def training_spans(rows: Iterable[Row]) -> Iterator[tuple[Row, float]]:
    """Each row that tells its speed, and the seconds of training since the last, without evaluations and saves."""
    images = 0
    for row in rows:
        speed = row.get("time/images_per_second")
        if speed:
            yield row, (row["images"] - images) / speed
            images = row["images"]
