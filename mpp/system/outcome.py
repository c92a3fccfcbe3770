"""What a tool hands back: its exit status and, for a caller in Python, what it found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Outcome(int):
    """An exit status that carries figures by name, and tables, whose first row has the names of their columns."""

    figures: Mapping[str, Any]
    tables: Mapping[str, Sequence[Sequence[Any]]]

    def __new__(
        cls, status: int, figures: Mapping[str, Any] | None = None, **tables: Iterable[Sequence[Any]]
    ) -> "Outcome":
        self = super().__new__(cls, status)
        self.figures = figures or {}
        self.tables = {name: [*rows] for name, rows in tables.items()}
        return self
