"""python tools/bench.py step: our training step beside timm's supervised step, other libraries, and a matrix product.

Every side makes whole training steps: forward, loss, backward, clipping, optimiser. Its batch, the same for all, lies
on the device in the form that its own loader would give: uint8 for ours, whose step normalises it, draws the corruption
and adds up the figures of the log; finished floats for the others, and for transformers the mask too. The other
libraries make their steps like ours (arithmetic, fused optimiser, clipping, compilation) and at their own defaults.

1. All sides once in every round, a matrix product too, in turning order, so that a machine whose speed wanders does not
   favour one; medians with spread, ratios within a round.
2. FLOPs by torch's counter, and from them the share of the matrix product's rate in the same round.
3. The memory of one step; the time of one step by part; how long a short run waits for its data.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import torch

from benchmarks.peers import PEERS, MakeSide, Missing
from benchmarks.settings import StepBench
from benchmarks.step_parts import peak_bytes, time_by_part
from benchmarks.step_sides import Setting, Side, data_wait, flops_per_image, matrix_product, ours, supervised
from mpp.dist import World
from mpp.errors import RunError, UserError
from mpp.model.settings import ModelConfig
from mpp.system.process import memory_reused
from mpp.training.parallel import DTYPES, choose_device, choose_precision
from mpp.training.timing import MEASURING, calls_lasting, hardware, in_turns, ratios, seconds_a_call, spread

OURS, SUPERVISED = "mpp", "timm, supervised"
_ON_CPU = ("vit_small_patch16_224",)
_ON_CUDA = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
_SAMPLE_SECONDS = 0.5
_WARM_UP = 2


@dataclass(frozen=True)
class StepRow:
    """One side of one model; what was not measured is empty or 0."""

    model: str
    """timm name."""
    side: str
    """`OURS`, `SUPERVISED`, or one of `peers.PEERS`."""
    left_out: str = ""
    """Why nothing was measured."""
    batch: int = 0
    asked: int = 0
    """Images per step that were asked for; where these are more than `batch`, they did not fit."""
    precision: str = ""
    compiled: bool = False
    images_per_second: tuple[float, ...] = ()
    """One a round, as all tuples of numbers here."""
    faster: tuple[float, ...] = ()
    """Our images per second over this side's."""
    flops: float = 0.0
    """Per image, forward and backward (see `flops_per_image`); 0 for the other libraries."""
    ceiling: tuple[float, ...] = ()
    """FLOP/s of the matrix product in the same precision."""
    state_bytes: int = 0
    """Weights and what the optimiser keeps."""
    step_bytes: int = 0
    """Peak of one step above that: gradients, activations, workspace."""
    parts: tuple[tuple[str, float], ...] = ()
    """Seconds of one uncompiled step by part; of ours alone."""
    waited: float | None = None
    """Share of the time that a short run waited for its data; of ours alone."""
    note: str = ""
    """Why that was not measured."""

    @property
    def shares(self) -> list[float]:
        """Of the ceiling."""
        if not self.flops:
            return []
        return [rate * self.flops / most for rate, most in zip(self.images_per_second, self.ceiling, strict=True)]


def step(config: StepBench) -> int:
    """Measures and prints a table for each model; returns the exit code. Raises as `measure`."""
    print(hardware())
    for name in _models(config):
        _print(measure(replace(config, models=(name,))), config.repeats)
    return 0


def _models(config: StepBench) -> Sequence[str]:
    device = choose_device(config.device, World(), "device")
    return config.models or (_ON_CUDA if device.type == "cuda" else _ON_CPU)


def measure(config: StepBench) -> list[StepRow]:
    """All sides of all models, as `step` prints them.

    Raises:
        UserError: a model, size, precision or device that is not there.
        RunError: not even one image fits.
    """
    device, rows = choose_device(config.device, World(), "device"), []
    for name in _models(config):
        memory = memory_reused() if device.type == "cpu" else nullcontext()  # as in training
        try:
            # A side whose batch was halved must not go on with code for any batch, which training never runs.
            with MEASURING, memory, torch._dynamo.config.patch(automatic_dynamic_shapes=False):
                rows += _measure(config, name, device)
        except torch.OutOfMemoryError as error:  # each side fits, but not beside the weights and moments of all others
            raise RunError(
                f"out of memory on {device} with all sides of {name}: a smaller --batch, or --peers off"
            ) from error
    return rows


def _measure(config: StepBench, name: str, device: torch.device) -> list[StepRow]:
    """The rows of one model."""
    model = ModelConfig(name=name, img_size=config.img_size, patch_size=config.patch_size)
    precision = choose_precision(config.precision, device, "precision")
    batch = config.batch or (256 if device.type == "cuda" else 16)
    setting = Setting(model, batch, device, precision, config.compile)
    torch.compiler.reset()  # what was compiled for the model before holds its memory
    gc.collect()
    makers: dict[str, MakeSide] = {OURS: ours, SUPERVISED: supervised} | (PEERS if config.peers == "on" else {})
    sides: dict[str, Side] = {}
    rows: dict[str, StepRow] = {}
    for title, make in makers.items():
        try:
            sides[title] = _fitting(make, setting)
        except Missing as error:
            rows[title] = StepRow(name, title, left_out=str(error))
    product = matrix_product(device, DTYPES[precision])
    rounds = in_turns({"": product} | {title: _timing(side) for title, side in sides.items()}, config.repeats)
    times = {title: [seconds / side.setting.batch for seconds in rounds[title]] for title, side in sides.items()}
    flops: dict[str, float] = dict(zip((OURS, SUPERVISED), flops_per_image(model), strict=True))
    for title, side in sides.items():
        side.optimizer.zero_grad(set_to_none=True)
        rows[title] = StepRow(
            name,
            title,
            batch=side.setting.batch,
            asked=batch,
            precision=side.setting.precision,
            compiled=side.compiled,
            images_per_second=tuple(1 / each for each in times[title]),
            faster=tuple(ratios(times[title], times[OURS])),
            flops=flops.get(title, 0.0),
            ceiling=tuple(rounds[""]),
            state_bytes=side.state_bytes,
            step_bytes=peak_bytes(side.run, side.setting.device),
        )
    rows[OURS] = _with_parts(rows[OURS], sides[OURS], config.data)
    return [rows[title] for title in makers]


def _fitting(make: MakeSide, setting: Setting) -> Side:
    """The side, warmed up, at the largest batch that fits: that of `setting`, or halves of it.

    Raises:
        RunError: not even one image fits.
    """
    while True:
        side = None
        try:
            side = make(setting)
            seconds_a_call(side.run, setting.device, _WARM_UP)
            return side
        except torch.OutOfMemoryError:
            pass  # the error keeps the step's memory until the end of this clause
        del side
        gc.collect()
        torch.cuda.empty_cache()
        if setting.batch == 1:
            raise RunError(f"out of memory on {setting.device} with a single image of {setting.model.name}")
        setting = replace(setting, batch=setting.batch // 2)


def _timing(side: Side) -> Callable[[], float]:
    """Gives the seconds of a step, the mean over some."""
    device = side.setting.device
    steps = calls_lasting(_SAMPLE_SECONDS, side.run, device)
    return lambda: seconds_a_call(side.run, device, steps)


def _with_parts(row: StepRow, side: Side, data: str) -> StepRow:
    """The row with what is measured of ours alone."""
    assert side.pretraining is not None
    with suppress(torch.OutOfMemoryError):  # a compiled step may take less
        parts = time_by_part(side.run, side.pretraining.model, side.setting.device)
        row = replace(row, parts=tuple(parts.items()))
    if not data:
        return replace(row, note="not measured: name images by --data")
    try:
        return replace(row, waited=data_wait(side.pretraining, data))
    except UserError as error:
        return replace(row, note=f"not measured: {error}")


def _print(rows: Sequence[StepRow], repeats: int) -> None:
    mine = rows[0]
    print(f"\n{mine.model}, {_batch(mine)}, {_how(mine)}; median (least to most) of {repeats} rounds\n")
    print(f"{'':30} {'images/s':>26} {'mpp is faster':>26} {'of the ceiling':>24} {'state':>8} {'step':>8}")
    for row in rows:
        if row.left_out:
            print(f"{row.side:30} left out: {row.left_out}")
            continue
        share = spread(row.shares, "") if row.shares else ""
        differs = [_how(row)] * (_how(row) != _how(mine)) + [_batch(row)] * (row.batch != mine.batch)
        apart = f"  ({', '.join(differs)})" if differs else ""
        print(
            f"{row.side:30} {spread(row.images_per_second, ''):>26} {spread(row.faster, ' x'):>26} {share:>24} "
            f"{row.state_bytes / 2**20:8,.0f} {row.step_bytes / 2**20:8,.0f}{apart}"
        )
    print(f"{'matrix product, ' + mine.precision:30} {spread([c / 1e12 for c in mine.ceiling], ''):>26} TFLOP/s")
    print("State: MiB of weights and optimiser; step: MiB that one step takes above that, at its peak.")
    flops = [row.flops / 1e9 for row in rows[:2]]
    print(
        f"FLOPs per image, forward and backward, as really done: {flops[0]:.2f} G in ours, {flops[1]:.2f} G in the "
        "supervised step.\n"
    )
    if not mine.parts:
        print("Our step by part: not measured, an uncompiled step of this batch does not fit\n")
        return
    total = sum(seconds for _, seconds in mine.parts)
    print("Our step by part, one uncompiled step:")
    for part, seconds in mine.parts:
        print(f"  {part:36} {seconds * 1e3:10,.1f} ms {seconds / total:8.1%}")
    print(f"  {'sum':36} {total * 1e3:10,.1f} ms")
    waited = mine.note if mine.waited is None else f"{mine.waited:.1%} of the time of a short run"
    print(f"  {'waiting for data':36} {waited}\n")


def _how(row: StepRow) -> str:
    return f"{row.precision}, {'compiled' if row.compiled else 'not compiled'}"


def _batch(row: StepRow) -> str:
    return f"batch {row.batch}" + f", as {row.asked} does not fit" * (row.batch < row.asked)
