"""What the measurement of the step gives, and how it stands with the goals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpp.training.parallel import choose_precision

OURS, SUPERVISED = "mpp", "timm, supervised"
MOST_OVER_SUPERVISED = 1.02
LEAST_OF_CEILING_CPU = 0.80  # bf16, S/16 and B/16
LEAST_OF_CEILING_H200 = {"vit_base_patch16_224": 0.55, "vit_large_patch16_224": 0.60}  # bf16
FASTER_THAN_VIT_PYTORCH = 5.0  # on an H200 in bf16, against its defaults
FASTER_THAN_PEERS = 1.3  # on an H200, against the best in the same precision


@dataclass(frozen=True)
class StepRow:
    """One side of one model; what was not measured is empty or 0."""

    model: str
    """timm name."""
    side: str
    """`OURS`, `SUPERVISED`, or one of `benchmarks.peers.PEERS`."""
    left_out: str = ""
    """Why nothing was measured."""
    batch: int = 0
    """Images per step."""
    asked: int = 0
    """Images per step that were asked for; where these are more, they did not fit."""
    precision: str = ""
    """bf16, fp16 or fp32."""
    compiled: bool = False
    default: bool = False
    """Whether this library is at its own defaults, not made like ours."""
    images_per_second: tuple[float, ...] = ()
    """One a round, as all tuples of numbers here."""
    faster: tuple[float, ...] = ()
    """Our images per second over this side's: above 1 we are faster."""
    flops: float = 0.0
    """Per image, forward and backward, as really done (see `flops_per_image`); 0 for the other libraries."""
    ceiling: tuple[float, ...] = ()
    """FLOP/s of the matrix product in the same precision."""
    state_bytes: int = 0
    """Weights and what the optimiser keeps."""
    step_bytes: int = 0
    """Peak of one step above that: gradients, activations, workspace."""
    parts: tuple[tuple[str, float], ...] = ()
    """Seconds of one uncompiled step by part; of ours alone."""
    uncompiled_seconds: float = 0.0
    """Of such a step without the profiler; of ours alone."""
    waited: float | None = None
    """Share of the time that a short run waited for its data; of ours alone."""
    note: str = ""
    """What else there is to say."""

    @property
    def shares(self) -> list[float]:
        """Of the ceiling."""
        if not self.flops:
            return []
        return [rate * self.flops / most for rate, most in zip(self.images_per_second, self.ceiling, strict=True)]


@dataclass(frozen=True)
class Verdict:
    """One goal, what this run measured, and whether that meets it; None: a goal for other hardware or precision."""

    goal: str
    figure: str
    met: bool | None

    def __str__(self) -> str:
        word = {True: "met", False: "MISSED", None: "not judged"}[self.met]
        return f"{word:10}  {self.goal}: {self.figure}"


def verdicts(rows: Sequence[StepRow], device: torch.device) -> list[Verdict]:
    """How the medians of `rows` stand with every goal, model by model."""
    found: list[Verdict] = []
    for model in dict.fromkeys(row.model for row in rows):
        of = {row.side: row for row in rows if row.model == model and not row.left_out}
        found += _judge(of, device)
    return found


def _judge(of: dict[str, StepRow], device: torch.device) -> Iterator[Verdict]:
    mine = of[OURS]
    name, bf16 = mine.model, mine.precision == "bf16"
    over = 1 / float(np.median(of[SUPERVISED].faster))
    goal = f"{name}: step at most {MOST_OVER_SUPERVISED} x the supervised step's time"
    yield Verdict(goal, f"{over:.3f} x", over <= MOST_OVER_SUPERVISED)
    like = [row for side, row in of.items() if side not in (OURS, SUPERVISED) and not row.default]
    best = min((float(np.median(row.faster)) for row in like), default=None)
    share = float(np.median(mine.shares))
    if device.type == "cpu":
        known = bf16 and choose_precision("auto", device) == "bf16"
        why = "" if known else f" ({mine.precision}; the goal is for bf16 where the CPU computes it)"
        if name in ("vit_small_patch16_224", "vit_base_patch16_224"):
            goal = f"{name}: at least {LEAST_OF_CEILING_CPU} of the matrix product's rate"
            yield Verdict(goal, f"{share:.2f}{why}", share >= LEAST_OF_CEILING_CPU if known else None)
        if best is not None:
            goal = f"{name}: ahead of every other library in the same precision"
            yield Verdict(goal, f"{best:.2f} x the best one's images/s{why}", best > 1 if known else None)
        return
    h200 = bf16 and "H200" in torch.cuda.get_device_name(device)
    why = "" if h200 else " (the goal is for bf16 on an H200)"
    if name in LEAST_OF_CEILING_H200:
        least = LEAST_OF_CEILING_H200[name]
        goal = f"{name}: at least {least:.0%} of the matrix product's rate"
        yield Verdict(goal, f"{share:.0%}{why}", share >= least if h200 else None)
    default = next((row for side, row in of.items() if row.default and side.startswith("vit-pytorch")), None)
    if default is not None:
        times = float(np.median(default.faster))
        goal = f"{name}: at least {FASTER_THAN_VIT_PYTORCH:g} x vit-pytorch at its defaults"
        yield Verdict(goal, f"{times:.1f} x{why}", times >= FASTER_THAN_VIT_PYTORCH if h200 else None)
    if best is not None:
        goal = f"{name}: at least {FASTER_THAN_PEERS:g} x the best other library in the same precision"
        yield Verdict(goal, f"{best:.2f} x{why}", best >= FASTER_THAN_PEERS if h200 else None)
