"""What the pre-flight found, as text."""

from typing import Any

import numpy as np

from mpp.curation.checking.classes import Classes
from mpp.curation.checking.duplicates import Duplicates
from mpp.curation.checking.scan import Tally
from mpp.curation.checking.values import Kind, Spread, propose
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source, count
from mpp.data.sources.names import printable
from mpp.data.statistics import can_divide

_WIDTH, _NAMED, _LONG = 13, 3, 4.0


def row(title: str, text: str) -> str:
    """A line of the report."""
    return f"{title:<{_WIDTH}}{text}"


def named(names: list[str], total: int) -> str:
    """The first of several names: `a, b, c and 5 more`."""
    more = total - len(names[:_NAMED])
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more else "")


def class_lines(classes: Classes | None) -> list[str]:
    """Largest and smallest classes, and those of one image."""
    if classes is None:
        return []
    names, counts = [printable(name) for name in classes.names], classes.counts
    ratio = f"{counts[0] / counts[-1]:.1f} to 1" if counts[-1] else "some are empty"
    lines = [row("classes", f"largest {names[0]} {counts[0]:,}, smallest {names[-1]} {counts[-1]:,}: {ratio}")]
    if single := classes.with_count(1):
        first = named([printable(name) for name in single[:_NAMED]], len(single))
        lines.append(row("", f"{count(len(single), 'class')} of one image: {first}"))
    if classes.unlabelled:
        lines.append(row("", f"{count(classes.unlabelled, 'image')} without a label"))
    return lines


def size_lines(tally: Tally, source: Source, image_hw: tuple[int, int]) -> list[str]:
    """Heights, widths, elongated and small images, of those that can be used."""
    good = np.flatnonzero(tally.good)
    if not len(good):
        return []
    height, width = tally.height[good], tally.width[good]
    lines = [
        row(name, f"min {values.min():,}, median {np.median(values):,.6g}, max {values.max():,}")
        for name, values in (("height", height), ("width", width))
    ]
    elongation = np.maximum(height / width, width / height)
    longest, extreme = int(elongation.argmax()), int(np.count_nonzero(elongation > _LONG))
    if extreme:
        most = f"at most {elongation[longest]:.4g} to 1: {_name(source, int(tally.indices[good[longest]]))}"
        lines.append(row("aspect", f"{count(extreme, 'image')} longer than {_LONG:g} to 1, {most}"))
    small = int(np.count_nonzero((height < image_hw[0]) | (width < image_hw[1])))
    if small:
        lines.append(row("small", f"{count(small, 'image')} below {image_hw[0]} x {image_hw[1]} would be enlarged"))
    return lines


def form_line(tally: Tally) -> str:
    """`JPEG 9,812; PNG RGBA 12`, the most frequent first."""
    ordered = sorted(tally.forms.items(), key=lambda item: (-item[1], item[0]))
    return row("forms", "; ".join(f"{form} {number:,}" for form, number in ordered) or "none could be recognised")


def colour_lines(tally: Tally, source: Source) -> list[str]:
    """Grey images stored as colour, and images of one colour."""
    lines = []
    if tally.grey:
        lines.append(row("grey", f"{count(tally.grey, 'image')} stored as colour with all channels the same"))
    if len(blank := tally.blank):
        names = [_name(source, int(tally.indices[at])) for at in blank[:_NAMED]]
        lines.append(row("blank", f"{count(len(blank), 'image')} of one colour throughout: {named(names, len(blank))}"))
    return lines


def bad_lines(tally: Tally, allowed: str) -> list[str]:
    """Bad files by kind, the first few of each named."""
    if not tally.bad:
        return [row("bad", "none")]
    looked = len(tally.indices)
    lines = [row("bad", f"{tally.bad:,} of {count(looked, 'image')} ({tally.bad / looked:.2%}); {allowed}")]
    for kind, number in tally.kinds.most_common():
        lines.append(row("", f"{number:,} {kind}:"))
        lines += [row("", f"  image {bad.index}: {bad}") for bad in tally.named[kind]]
    return lines


def duplicate_lines(found: Duplicates, drawn: bool) -> list[str]:
    """Groups of equal files and of equal pixels, and the first few."""
    where = " among the images looked at" if drawn else ""
    if not len(found):
        return [row("duplicates", f"none{where}")]
    kinds = (
        ("equal files", found.same_bytes, found.same_bytes_images),
        ("equal pixels in other files", found.same_pixels, found.same_pixels_images),
    )
    told = [f"{count(groups, 'group')} of {what} ({count(held, 'image')})" for what, groups, held in kinds if groups]
    lines = [row("duplicates", "; ".join(told) + where)]
    return lines + [row("", found.shown(group)) for group in range(min(_NAMED, len(found)))]


def duplicate_warnings(found: Duplicates) -> list[str]:
    """Duplicates that would do harm."""
    lines = []
    if len(found.conflicts):
        first = found.shown(int(found.conflicts[0]))
        lines.append(f"{count(len(found.conflicts), 'group')} of duplicates with different labels: {first}")
    if len(found.across):
        first = found.shown(int(found.across[0]))
        lines.append(f"{count(found.test_images, 'image')} of the test split also in the train split: {first}")
    return lines


def value_lines(spreads: dict[Kind, Spread], reading: DecodeOptions, eight_bits: bool) -> list[str]:
    """What images hold that are not plain 8-bit pictures, and the range to state, where another would suit better."""
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


def statistics_line(tally: Tally, reading: DecodeOptions) -> str:
    """Mean and standard deviation, and how the images were read for it, ready to paste."""
    if not tally.good.any():
        return row("pixels", "none to take statistics of")
    mean, std = (" ".join(f"{value:.4f}" for value in values) for values in tally.colours.mean_std())
    if not can_divide(tally.colours.mean_std()[1]):
        return row("pixels", f"mean {mean}, std {std}: a channel is the same everywhere, so keep the default std")
    return row("pixels", " ".join([f"--data.mean {mean} --data.std {std}", *reading.flags()]))


def facts(
    source: Source, tally: Tally, classes: Classes | None, found: Duplicates, reading: DecodeOptions
) -> dict[str, Any]:
    """The figures of report.json that do not depend on the machine."""
    good = tally.good
    height, width = tally.height[good], tally.width[good]
    mean, std = tally.colours.mean_std()
    sizes = {
        name: {"min": int(v.min()), "median": float(np.median(v)), "max": int(v.max())}
        for name, v in (("height", height), ("width", width))
        if len(v)
    }
    values = []
    for kind, spread in sorted(tally.spreads.items()):
        low, high = spread.percentiles()
        proposal = propose(kind, spread, reading)
        channels = [
            {"smallest": a, "p0.1": b, "p99.9": c, "largest": d}
            for a, b, c, d in zip(*(_finite(v) for v in (spread.smallest, low, high, spread.largest)), strict=True)
        ]
        values.append(
            {
                "dtype": kind.dtype,
                "images": spread.images,
                "not_finite": spread.infinite,
                "channels": channels,
                "value_range": proposal.value_range if proposal else None,
            }
        )
    return {
        "source": source.name,
        "description": source.describe(),
        "images": len(source),
        "looked_at": len(tally.indices),
        "usable": int(good.sum()),
        "classes": dict(zip(classes.names, classes.counts, strict=True)) if classes else None,
        "forms": dict(sorted(tally.forms.items())),
        **sizes,
        "bad": dict(tally.kinds),
        "grey": tally.grey,
        "blank": len(tally.blank),
        "duplicates": {
            "groups": len(found),
            "same_bytes_groups": found.same_bytes,
            "same_bytes_images": found.same_bytes_images,
            "same_pixels_groups": found.same_pixels,
            "same_pixels_images": found.same_pixels_images,
            "label_conflicts": len(found.conflicts),
            "test_images_in_train": found.test_images,
        },
        "values": values,
        "mean": mean.tolist() if len(height) else None,
        "std": std.tolist() if len(height) else None,
    }


def _finite(values: np.ndarray) -> list[float | None]:
    """JSON has no other numbers."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _name(source: Source, index: int) -> str:
    return printable(source.location(index))
