"""python tools/bench.py plan: what a pretraining run costs, on paper (benchmarks/cost), before anybody pays for it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import cast

from benchmarks.cost import flops, memory
from benchmarks.cost.devices import Device, device_named
from benchmarks.cost.flops import EXPLICIT, FUSED
from benchmarks.cost.memory import OPTIMISER_COPIES, Setup
from benchmarks.cost.run import ATTAINED, BACKWARD, USABLE, Machine, Step, step_of
from benchmarks.cost.shape import Shape, shape_of
from benchmarks.settings import PlanBench
from mpp.dist import World
from mpp.errors import UserError, command
from mpp.pretraining.build import resolve_init
from mpp.pretraining.encoder_choice import choose_encoder
from mpp.training.auto import Facts, settle
from mpp.training.duration import parse_duration
from mpp.training.settings import chosen

SCALE = tuple(2**n for n in range(10))
"""Numbers of devices in the last table."""
_ENDLESS = "the run or what is between its checkpoints has no end; take fewer epochs or steps"


@dataclass(frozen=True)
class Plan:
    """The cost of one run; `str(plan)` is the report."""

    config: PlanBench
    device: Device
    shape: Shape
    step: Step
    steps: int
    checkpoints: int
    """Checkpoints written in the run."""
    scale: dict[int, Step | UserError]
    """The same run on other numbers of devices, or why not."""

    @property
    def seconds(self) -> float:
        return self.steps * self.step.seconds

    @property
    def device_hours(self) -> float:
        return self.seconds * self.config.devices / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, optimiser, moving average."""
        setup = self.step.setup
        return 4 * self.shape.parameters * (1 + OPTIMISER_COPIES[setup.optimiser] + setup.ema)

    def __str__(self) -> str:
        parts = (_head, _flops, _memory, _time, _data, _traffic, _scale, _assumptions)
        return "\n\n".join("\n".join(part(self)) for part in parts)


def plan(config: PlanBench) -> int:
    """Prints the plan; returns the exit code. Raises as `plan_of`."""
    print(plan_of(config))
    return 0


def plan_of(config: PlanBench) -> Plan:
    """The cost of the run that these settings describe.

    Raises:
        UserError: a device or model that is not known, a batch that does not divide, a model that does not fit,
            settings that training refuses, a run without end.
    """
    config = _settled(_with_init(config))
    device = device_named(config.device)
    precision = config.train.precision
    if (precision, device.auto) in (("bf16", "fp16"), ("fp16", "fp32")):
        raise UserError(
            f"train.precision {precision} is not for the device {config.device}; take auto, which is {device.auto}"
        )
    attention = config.model.attention  # of the two that auto may take on a CPU, the one that needs more memory
    explicit = attention == "explicit" or (attention == "auto" and config.device.lower() == "cpu")
    shape = shape_of(config)
    setup = Setup(
        micro_batch=chosen(config.train.micro_batch),
        precision=device.auto if precision == "auto" else precision,
        optimiser=config.optim.name,
        ema=bool(config.optim.ema_decay),
        checkpointing=config.model.grad_checkpointing,
        parallel=config.train.parallel,
        kernel=EXPLICIT if explicit else FUSED,
    )

    def on(count: int) -> Step:
        speed = (config.per_node, config.efficiency, config.images_per_second)
        return step_of(shape, setup, Machine(device, count, *speed), chosen(config.train.batch_size))

    scale: dict[int, Step | UserError] = {}
    for count in SCALE:
        try:
            scale[count] = on(count)
        except UserError as error:
            scale[count] = error
    return Plan(config, device, shape, on(config.devices), *_steps(config), scale)


def _with_init(config: PlanBench) -> PlanBench:
    """With what the weights that the run goes on from say, if it does; refuses what the formulas are not for."""
    if not config.init:
        return config
    whole = cast(PlanBench, resolve_init(replace(config, dry_run=True), World())[0])
    counted = {'act_layer="gelu"', "mlp_ratio=4.0"}
    rest = {arg for arg in whole.init_args if arg not in counted and not arg.startswith("norm_eps=")}
    if rest:
        raise UserError(
            f"--init {config.init} has {', '.join(sorted(rest))}, which the formulas are not for; "
            f"{command('pretrain')} --dry-run measures it"
        )
    return whole


def _settled(config: PlanBench) -> PlanBench:
    """With what auto would take for so many photographs on these devices."""
    cpu, images = config.device.lower() == "cpu", config.num_images
    if config.epochs:
        config = replace(config, train=replace(config.train, length=f"{config.epochs:.12f} epochs"))
    config = replace(config, model=choose_encoder(config.model, images, 224, cpu)[0])
    width = shape_of(config).dim
    facts = Facts(images, labelled=False, cpu=cpu, ranks=config.devices, width=width, continued=bool(config.init))
    try:
        return settle(config, facts)[0]
    except OverflowError:
        raise UserError(_ENDLESS) from None


def _steps(config: PlanBench) -> tuple[int, int]:
    """Steps of the run, and the checkpoints that it writes."""
    size, images = chosen(config.train.batch_size), config.num_images
    try:
        steps = parse_duration(config.train.length, "train.length").steps(size, images)
        every = parse_duration(config.checkpoint.every, "checkpoint.every").steps(size, images, steps)
    except OverflowError:
        raise UserError(_ENDLESS) from None
    # One before the first step, and one at the end, which is the only other without a period.
    return steps, 1 + (-(-steps // every) if every else 1)


def _head(plan: Plan) -> Iterable[str]:
    config, step = plan.config, plan.step
    shape, setup = plan.shape, step.setup
    height, width = shape.image
    epochs = plan.steps * step.images / config.num_images
    yield (
        f"{config.model.name}, {height} x {width} pixels: {shape.parameters:,} parameters, {shape.tokens:,} tokens, "
        f"{shape.picked:,} of {shape.patches:,} patches corrupted"
    )
    yield (
        f"{plan.steps:,} steps of {step.images:,} images, {_number(epochs, 3)} epochs of "
        f"{config.num_images:,} images; {setup.precision}, {setup.optimiser}"
        f"{', moving average' if setup.ema else ''}{', activation checkpointing' if setup.checkpointing else ''}"
    )
    passes = "one pass" if setup.accumulate == 1 else f"{setup.accumulate} passes"
    yield (
        f"{config.devices} x {config.device}{f' by {setup.parallel}' if config.devices > 1 else ''}: {passes} of "
        f"{setup.micro_batch} images a device and step"
    )


def _flops(plan: Plan) -> Iterable[str]:
    parts = {name: (part.forward, part.backward, part.recomputed) for name, part in plan.step.parts.items()}
    whole = flops.total(plan.step.parts)
    yield f"{'GFLOP an image':24} {'forward':>10} {'backward':>10} {'recomputed':>10} {'in all':>10} {'share':>7}"
    for name, passes in {**parts, "in all": tuple(map(sum, zip(*parts.values(), strict=True)))}.items():
        numbers = " ".join(f"{value / 1e9:10,.3f}" for value in (*passes, sum(passes)))
        yield f"  {name:22} {numbers} {sum(passes) / whole:7.1%}"


def _memory(plan: Plan) -> Iterable[str]:
    """Both ways of keeping activations side by side, at the micro-batch of the run."""
    setup, limit = plan.step.setup, USABLE * plan.device.memory
    ways = [replace(setup, checkpointing=way) for way in (False, True)]
    sides = [memory.memory(plan.shape, way) for way in ways]
    yield f"{f'GB a device, {setup.micro_batch} images':30} {'activations kept':>18} {'checkpointed':>18}"
    for name in sides[0]:
        if any(side[name] for side in sides):
            yield f"  {name:28} {sides[0][name] / 1e9:18,.3f} {sides[1][name] / 1e9:18,.3f}"
    yield f"  {'in all':28} {memory.total(sides[0]) / 1e9:18,.3f} {memory.total(sides[1]) / 1e9:18,.3f}"
    most = [memory.largest_micro_batch(plan.shape, way, limit) for way in ways]
    yield f"  {f'images that fit {limit / 1e9:.0f} GB':28} {most[0]:18,} {most[1]:18,}"
    wanted = chosen(plan.config.train.micro_batch)
    if plan.step.largest < min(wanted, plan.step.images // plan.config.devices):
        yield f"  train.micro_batch {wanted:,} does not fit; planned with {setup.micro_batch:,}"


def _time(plan: Plan) -> Iterable[str]:
    step, config = plan.step, plan.config
    yield "Time"
    source = f"{config.efficiency:.0%} of the peak (stated)"
    if config.images_per_second:
        source = f"{config.images_per_second:,.0f} images/s a device (given), optimiser and all"
    yield f"  {'a step':28} {_duration(step.seconds)}: computing {_duration(step.computing)} at {source},"
    yield f"  {'':28} optimiser {_duration(step.updating)}, traffic not hidden {_duration(step.exposed)}"
    yield f"  {'images/s':28} {step.images_per_second:,.0f}, {step.images_per_second / config.devices:,.0f} a device"
    yield f"  {'the run':28} {_duration(plan.seconds)}, {plan.device_hours:,.1f} device-hours"


def _data(plan: Plan) -> Iterable[str]:
    config, size = plan.config, plan.checkpoint_bytes / 1e9
    rate = plan.step.images_per_second / -(-config.devices // config.per_node)
    file, kept = config.image_kib * 1024, config.checkpoint.keep_last + 1  # and the one that is being written
    yield "Data and storage"
    yield (
        f"  {'loader, a machine':28} {rate:,.0f} images/s: {rate / config.images_per_core:,.1f} cores, "
        f"{rate * file / 1e6:,.1f} MB/s from storage"
    )
    yield (f"  {'images (shards)':28} {config.num_images * file / 1e9:,.1f} GB at {_number(config.image_kib)} KiB each")
    yield f"  {'a checkpoint':28} {size:,.2f} GB"
    yield (
        f"  {'checkpoints of the run':28} {plan.checkpoints:,} written ({plan.checkpoints * size:,.1f} GB), "
        f"at most {kept} at once ({kept * size:,.1f} GB)"
    )


def _traffic(plan: Plan) -> Iterable[str]:
    step, setup = plan.step, plan.step.setup
    yield "Traffic between devices, a step"
    if setup.devices == 1:
        yield "  none on one device"
        return
    how = "all-reduce of fp32 gradients, once"
    if setup.parallel == "fsdp":
        how = f"all-gather of weights twice a pass ({setup.accumulate}), reduce-scatter of fp32 gradients"
    yield f"  {'sent by a device':28} {step.sent / 1e9:,.3f} GB: {how}"
    yield f"  {'seconds alone':28} {_duration(step.sending)}, {step.sending / step.alone:.1%} of the rest of a step"
    yield f"  {'not hidden':28} {_duration(step.exposed)}"
    yield f"  {'efficiency':28} {step.efficiency:.1%}"


def _scale(plan: Plan) -> Iterable[str]:
    yield f"The same run of {plan.step.images:,} images a step on more devices"
    yield (
        f"  {'devices':>7} {'images':>12} {'GB':>6} {'step':>9} {'traffic':>9} {'images/s':>10} {'efficiency':>10} "
        f"{'days':>8} {'device-hours':>12}"
    )
    for count, step in plan.scale.items():
        if isinstance(step, UserError):
            yield f"  {count:7,} {step}"
            continue
        images = f"{step.setup.micro_batch} x {step.setup.accumulate}"
        seconds = plan.steps * step.seconds
        yield (
            f"  {count:7,} {images:>12} {memory.total(step.memory) / 1e9:6,.1f} {_duration(step.seconds):>9} "
            f"{_duration(step.sending):>9} {step.images_per_second:10,.0f} {step.efficiency:10.1%} "
            f"{seconds / 86400:8,.2f} {seconds * count / 3600:12,.1f}"
        )


def _assumptions(plan: Plan) -> Iterable[str]:
    device, config = plan.device, plan.config
    peak = device.single if plan.step.setup.precision == "fp32" else device.half
    rate = f"{config.efficiency:.0%} of {_number(peak / 1e12)} TFLOP/s (data sheet)"
    if config.images_per_second:
        rate = f"{config.images_per_second:,.0f} images/s a device"
    link, network = _number(device.link / 1e9), _number(device.network / 1e9)
    yield f"""assumptions:
  operations are those of matrix products, as torch.utils.flop_counter counts them; attention is computed
  again in the backward pass (but by the explicit kernel); the last block works for corrupted patches alone
  memory is that of eager PyTorch's tensors, at the fullest moment of a step; torch.compile needs less; what
  kernels take for themselves while they run is not counted (on a CPU it grows with its threads)
  {USABLE:.0%} of the device's memory is for tensors, the rest for its context, libraries and fragmentation
  {rate}, whatever the micro-batch
  links at {ATTAINED:.0%} of {link} GB/s between {config.per_node} devices of a machine
  and of {network} GB/s from a machine to others, in one ring without start-up times
  DDP's traffic hides behind the last backward pass ({BACKWARD:.0%} of computing), FSDP's behind it all
  the loader keeps up; evaluation, checkpoints, restarts and waiting for the slowest device are not counted"""


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{_number(seconds / size, 3)} {unit}"
    return f"{_number(seconds * 1e6, 3)} us" if seconds else "0 s"


def _number(value: float, digits: int = 4) -> str:
    """With so many digits, all those before the point, thousands apart, and no exponent."""
    if value >= 10**digits - 0.5:
        return f"{value:,.0f}"
    return f"{Decimal(f'{value:.{digits}g}'):,f}"
