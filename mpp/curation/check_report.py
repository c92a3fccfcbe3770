"""The findings of the pre-flight, as lines of text and as report.json."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mpp.curation.duplicates import Duplicates
from mpp.curation.near_duplicates import HEAD as NEAR_HEAD
from mpp.curation.near_duplicates import Near, shown
from mpp.curation.near_duplicates import rows as rows_of_near
from mpp.curation.scan import ScanResult
from mpp.curation.value_ranges import Kind, Spread, propose
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source, count
from mpp.data.sources.names import SPLIT_NAMES, Split, printable
from mpp.data.statistics import can_divide
from mpp.downstream.groups import ALONE, check_groups, groups_of, shared_groups

_WIDTH, _NAMED, _LONG = 13, 3, 4.0
_SPLITS = frozenset((*itertools.chain(*SPLIT_NAMES.values()), "holdout"))
_LISTED = 1000
_HUGE, _TIMES = 0.5, 5  # a class of more than half of the images, and of five times the next one's


def row(title: str, text: str) -> str:
    """A line of the report."""
    return f"{title:<{_WIDTH}}{text}"


def _named(names: list[str], total: int) -> str:
    """The first of several names: `a, b, c and 5 more`."""
    more = total - len(names[:_NAMED])
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more else "")


class Classes(NamedTuple):
    """Names and numbers of a source's classes, the largest first."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    unlabelled: int

    @staticmethod
    def of(source: Source) -> "Classes | None":
        """None where the source has no labels."""
        labels, sets = source.labels(), source.label_sets()
        if not source.classes or (labels is None and sets is None):
            return None
        if sets is not None:  # an image counts in each of its classes
            labels = sets.number
            counts = np.bincount(labels[labels >= 0], minlength=len(sets.table)) @ sets.table.astype(np.int64)
        else:
            assert labels is not None
            counts = np.bincount(labels[labels >= 0], minlength=len(source.classes))
        order = np.argsort(-counts, kind="stable")
        names = tuple(source.classes[label] for label in order)
        return Classes(names, tuple(counts[order].tolist()), int(np.count_nonzero(labels < 0)))

    def lines(self) -> list[str]:
        """Largest and smallest classes, and those of one image."""
        names, counts = [printable(name) for name in self.names], self.counts
        ratio = f"{counts[0] / counts[-1]:.1f} to 1" if counts[-1] else "some are empty"
        lines = [row("classes", f"largest {names[0]} {counts[0]:,}, smallest {names[-1]} {counts[-1]:,}: {ratio}")]
        if single := [name for name, number in zip(names, counts, strict=True) if number == 1]:
            lines.append(row("", f"{count(len(single), 'class')} of one image: {_named(single, len(single))}"))
        if self.unlabelled:
            lines.append(row("", f"{count(self.unlabelled, 'image')} without a label"))
        return lines

    def warnings(self) -> list[str]:
        """What looks like a mistake, a line each."""
        found = []
        if splits := sorted(name for name in self.names if name.lower() in _SPLITS):
            found.append(f"classes called {', '.join(splits)}: if they are splits, give the folder of one of them")
        total = sum(self.counts)
        if len(self.counts) > 1 and self.counts[0] > max(_HUGE * total, _TIMES * self.counts[1]):
            found.append(f"the class {printable(self.names[0])} holds {self.counts[0] / total:.1%} of the images")
        return found


def size_lines(scanned: ScanResult, source: Source, image_hw: tuple[int, int]) -> list[str]:
    """Heights, widths, elongated and small images, of those that can be used."""
    good = np.flatnonzero(scanned.good)
    if not len(good):
        return []
    height, width = scanned.height[good], scanned.width[good]
    lines = [
        row(name, f"min {values.min():,}, median {np.median(values):,.6g}, max {values.max():,}")
        for name, values in (("height", height), ("width", width))
    ]
    elongation = np.maximum(height / width, width / height)
    longest, extreme = int(elongation.argmax()), int(np.count_nonzero(elongation > _LONG))
    if extreme:
        name = printable(source.location(int(scanned.indices[good[longest]])))
        most = f"at most {elongation[longest]:.4g} to 1: {name}"
        lines.append(row("aspect", f"{count(extreme, 'image')} longer than {_LONG:g} to 1, {most}"))
    small = int(np.count_nonzero((height < image_hw[0]) | (width < image_hw[1])))
    if small:
        lines.append(row("small", f"{count(small, 'image')} below {image_hw[0]} x {image_hw[1]} would be enlarged"))
    return lines


def form_line(scanned: ScanResult) -> str:
    """`JPEG 9,812; PNG RGBA 12`, the most frequent first."""
    ordered = sorted(scanned.forms.items(), key=lambda item: (-item[1], item[0]))
    return row("forms", "; ".join(f"{form} {number:,}" for form, number in ordered) or "none could be recognised")


def colour_lines(scanned: ScanResult, source: Source) -> list[str]:
    """Grey images stored as colour, and images of one colour."""
    lines = []
    if scanned.grey:
        lines.append(row("grey", f"{count(scanned.grey, 'image')} stored as colour with all channels the same"))
    if len(blank := scanned.blank):
        names = [printable(source.location(int(scanned.indices[at]))) for at in blank[:_NAMED]]
        lines.append(
            row("blank", f"{count(len(blank), 'image')} of one colour throughout: {_named(names, len(blank))}")
        )
    return lines


def bad_lines(scanned: ScanResult, allowed: str) -> list[str]:
    """Bad files by kind, the first few of each named."""
    bad, total = scanned.kinds.total(), len(scanned.indices)
    if not bad:
        return [row("bad", "none")]
    lines = [row("bad", f"{bad:,} of {count(total, 'image')} ({bad / total:.2%}); {allowed}")]
    for kind, number in scanned.kinds.most_common():
        lines.append(row("", f"{number:,} {kind}:"))
        lines += [row("", f"  image {bad.index}: {bad}") for bad in scanned.named[kind]]
    return lines


def duplicate_lines(found: Duplicates, drawn: bool) -> list[str]:
    """Groups of equal files and of equal pixels, and the first few."""
    among = " among the images looked at" if drawn else ""
    if not len(found):
        return [row("duplicates", f"none{among}")]
    kinds = (
        ("equal files", found.same_bytes, found.same_bytes_images),
        ("equal pixels in other files", found.same_pixels, found.same_pixels_images),
    )
    texts = [f"{count(groups, 'group')} of {what} ({count(n, 'image')})" for what, groups, n in kinds if groups]
    lines = [row("duplicates", "; ".join(texts) + among)]
    return lines + [row("", found.shown(group)) for group in range(min(_NAMED, len(found)))]


def duplicate_warnings(found: Duplicates) -> list[str]:
    """Duplicates that would do harm."""
    lines = []
    if len(found.conflicts):
        first = found.shown(int(found.conflicts[0]))
        lines.append(f"{count(len(found.conflicts), 'group')} of duplicates with different labels: {first}")
    if len(found.across):
        first = found.shown(int(found.across[0]))
        where = "val or test split also in another" if "val" in found.names else "test split also in the train"
        lines.append(f"{count(found.leaked, 'image')} of the {where} split: {first}")
    return lines


def near_lines(near: list[Near], sources: Mapping[Split, Source], most: int) -> list[str]:
    """Pairs of different splits that are nearly the same, and the first few."""
    if len(sources) == 1 or most < 0:
        return []
    pairs = f"{count(len(near), 'pair')} of different splits, of hashes that differ in at most {most} of 64 bits"
    return [row("near", pairs), *(row("", shown(one, sources)) for one in near[:_NAMED])]


def near_warnings(near: list[Near], sources: Mapping[Split, Source]) -> list[str]:
    """Near-duplicates that would make figures too good, by the two splits."""
    of_splits: dict[tuple[Split, Split], list[Near]] = {}
    for one in near:
        of_splits.setdefault((one.split, one.of_split), []).append(one)
    return [
        f"{count(len(found), 'image')} of the {split} split nearly the same as one of the {other} split: "
        f"{shown(found[0], sources)}"
        for (split, other), found in of_splits.items()
    ]


def near_facts(near: list[Near], sources: Mapping[Split, Source]) -> dict[str, Any]:
    """How many pairs there are, and the first 1,000."""
    listed = itertools.islice(rows_of_near(near, sources), 1, 1 + _LISTED)
    return {"pairs": len(near), "listed": [dict(zip(NEAR_HEAD, row, strict=True)) for row in listed]}


class Grouped(NamedTuple):
    """How many groups of images there are, and how many of them each other split shares with an earlier one."""

    number: int
    shared: tuple[tuple[Split, Split, int, int], ...]
    """A later split, an earlier one, groups of both, images of the later one in them."""

    @staticmethod
    def of(sources: Mapping[Split, Source], pattern: str) -> "Grouped":
        """Counts what the pattern finds, or the sources' own groups. SourceError: a pattern that parts nothing."""
        groups = {split: groups_of(source, pattern) for split, source in sources.items()}
        if pattern and (train := groups["train"]) is not None:
            check_groups(train, sources["train"], pattern)
        known = [of for of in groups.values() if of is not None]
        number = len(np.setdiff1d(np.concatenate(known), [ALONE])) if known else 0
        shared = []
        for earlier, later in itertools.combinations(groups, 2):
            both, images = shared_groups(groups[earlier], groups[later])
            if both:
                shared.append((later, earlier, both, int(images.sum())))
        return Grouped(number, tuple(shared))

    def lines(self) -> list[str]:
        """How many there are."""
        return [row("groups", f"{self.number:,}")] if self.number else []

    def warnings(self) -> list[str]:
        """Groups that splits share, a line for each two of them."""
        return [
            f"{count(groups, 'group')} of the {other} split also in the {split} split, {count(images, 'image')} there"
            for split, other, groups, images in self.shared
        ]

    def facts(self) -> dict[str, Any]:
        """As report.json has them."""
        names = ("split", "of_split", "groups", "images")
        return {"number": self.number, "shared": [dict(zip(names, one, strict=True)) for one in self.shared]}


def value_lines(spreads: dict[Kind, Spread], reading: DecodeOptions, eight_bits: bool) -> list[str]:
    """The values of images that are not plain 8-bit, and the range to state where another would suit better."""
    lines = []
    for kind, spread in sorted(spreads.items()):
        lines.append(row("values", f"{kind.dtype} x {kind.channels} in {count(spread.images, 'image')}"))
        low, high = spread.percentiles()
        for channel, figures in enumerate(zip(spread.smallest, low, high, spread.largest, strict=True)):
            words = zip(("smallest", "0.1 %", "99.9 %", "largest"), figures, strict=True)
            lines.append(row("", f"channel {channel}: {', '.join(f'{word} {value:.6g}' for word, value in words)}"))
        if spread.infinite:
            lines.append(row("", f"{count(spread.infinite, 'value')} not finite"))
        if proposal := propose(kind, spread, reading):
            lines.append(row("", f"{proposal.why}; {proposal.flag()} would suit"))
            if eight_bits:
                lines.append(row("", "(it would hold for the images of 8 bits, too: bring all to one kind first)"))
    return lines


def statistics_line(scanned: ScanResult, reading: DecodeOptions) -> str:
    """Mean and standard deviation, and how the images were read for it, ready to paste."""
    if not scanned.good.any():
        return row("pixels", "none to take statistics of")
    mean, std = (" ".join(f"{value:.4f}" for value in values) for values in scanned.colours.mean_std())
    if not can_divide(scanned.colours.mean_std()[1]):
        return row("pixels", f"mean {mean}, std {std}: a channel is the same everywhere, so keep the default std")
    return row("pixels", " ".join([f"--data.mean {mean} --data.std {std}", *reading.flags()]))


def facts(
    source: Source, scanned: ScanResult, classes: Classes | None, found: Duplicates, reading: DecodeOptions
) -> dict[str, Any]:
    """The figures of report.json that do not depend on the machine."""
    good = scanned.good
    height, width = scanned.height[good], scanned.width[good]
    mean, std = scanned.colours.mean_std()
    values = []
    for kind, spread in sorted(scanned.spreads.items()):
        proposal = propose(kind, spread, reading)
        columns = (_finite(v) for v in (spread.smallest, *spread.percentiles(), spread.largest))
        names = ("smallest", "p0.1", "p99.9", "largest")
        values.append(
            {
                "dtype": kind.dtype,
                "images": spread.images,
                "not_finite": spread.infinite,
                "channels": [dict(zip(names, channel, strict=True)) for channel in zip(*columns, strict=True)],
                "value_range": proposal.value_range if proposal else None,
            }
        )
    return {
        "source": source.name,
        "description": source.describe(),
        "images": len(source),
        "looked_at": len(scanned.indices),
        "usable": int(good.sum()),
        "classes": dict(zip(classes.names, classes.counts, strict=True)) if classes else None,
        "forms": dict(sorted(scanned.forms.items())),
        **{
            name: {"min": int(v.min()), "median": float(np.median(v)), "max": int(v.max())}
            for name, v in (("height", height), ("width", width))
            if len(v)
        },
        "bad": dict(scanned.kinds),
        "grey": scanned.grey,
        "blank": len(scanned.blank),
        "duplicates": {
            "groups": len(found),
            "same_bytes_groups": found.same_bytes,
            "same_bytes_images": found.same_bytes_images,
            "same_pixels_groups": found.same_pixels,
            "same_pixels_images": found.same_pixels_images,
            "label_conflicts": len(found.conflicts),
            "test_images_in_train": found.leaked,
        },
        "values": values,
        "mean": mean.tolist() if len(height) else None,
        "std": std.tolist() if len(height) else None,
    }


def _finite(values: np.ndarray) -> list[float | None]:
    """JSON has no other numbers."""
    return [float(value) if np.isfinite(value) else None for value in values]
