"""The images that a run trains on, as a checkpoint remembers them, and what changed since."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpp.data.sources.base import Source, count

_SHOWN = 3  # classes that are named


@dataclass(frozen=True)
class Contents:
    """The names of all images and the sizes of some: the same for a copy elsewhere, in the same order."""

    images: int
    digest: str
    """A quick fingerprint without labels."""
    classes: tuple[str, ...] = ()
    """In order, of a run that learns them."""
    labels: str = ""
    """64 hexadecimal digits, likewise."""

    @classmethod
    def of(cls, source: Source, labels: np.ndarray | None = None, classes: Sequence[str] = ()) -> "Contents":
        """Of all images of a source; with `labels` int64 (len,) and `classes` where a run learns them."""
        digest = source.quick_fingerprint(labelled=False)
        if labels is None:
            return cls(len(source), digest)
        numbers = hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes())
        return cls(len(source), digest, tuple(classes), numbers.hexdigest())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Contents":
        """Back from `to_dict`."""
        return cls(**{**values, "classes": tuple(values["classes"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {**vars(self), "classes": list(self.classes)}

    def changes(self, before: "Contents") -> list[str]:
        """The differences from what there was before, in words; empty where all is the same."""
        changes = list[str]()
        if self.images != before.images:
            changes = [f"{count(before.images, 'image')} then, {self.images:,} now"]
        elif self.digest != before.digest:
            changes = [f"{count(self.images, 'image')} then and now, but others, or in another order"]
        if self.classes != before.classes:
            return [*changes, _class_changes(before.classes, self.classes)]
        return changes or ["other labels"] * (self.labels != before.labels)


def _class_changes(before: Sequence[str], now: Sequence[str]) -> str:
    new, gone = [name for name in now if name not in before], [name for name in before if name not in now]
    if not new and not gone:
        number = next(number for number, name in enumerate(before) if now[number] != name)
        return f"the classes in another order: class {number} was {before[number]} and is {now[number]}"
    parts = [(what, names) for what, names in (("new", new), ("gone", gone)) if names]
    listed = [f"{what}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}" for what, names in parts]
    return f"{count(len(before), 'class')} then, {len(now):,} now ({'; '.join(listed)})"
