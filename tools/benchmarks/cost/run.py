"""What a step costs on some devices: time, and traffic between them. Arithmetic on what the caller states."""

from dataclasses import dataclass, replace

from benchmarks.cost import flops, memory
from benchmarks.cost.devices import Device
from benchmarks.cost.flops import Passes
from benchmarks.cost.memory import OPTIMISER_COPIES, Moment, Setup
from benchmarks.cost.shape import Shape
from mpp.errors import UserError

USABLE = 0.9
"""Share of a device's memory for tensors; the context, NCCL, cuBLAS and other kernels, fragmentation have the rest."""
ATTAINED = 0.7
"""Share of a link's and of the memory's bandwidth that long transfers attain."""
BACKWARD = 2 / 3
"""Share of a step's computing that the backward pass is, behind which gradients travel."""


@dataclass(frozen=True)
class Machine:
    """Devices, and how fast they are thought to be."""

    device: Device
    count: int = 1
    per_node: int = 8
    """Devices in one machine."""
    efficiency: float = 0.4
    """Share of the data sheet's peak that training attains."""
    images_per_second: float = 0.0
    """Of one device in whole steps, as measured; 0: from its peak and the efficiency."""

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)


@dataclass(frozen=True)
class Step:
    """One update of the weights on one number of devices; seconds and bytes are a device's."""

    setup: Setup
    images: int
    """Of the update, over all devices."""
    parts: dict[str, Passes]
    memory: Moment
    largest: int
    """The largest micro-batch that fits, with the accumulation of `setup`."""
    computing: float
    updating: float
    """Seconds of the optimiser, which reads and writes memory and computes next to nothing; 0 where images a second
    were measured, which have it in them."""
    sent: float
    """Bytes that a device sends."""
    sending: float
    """Seconds that takes where nothing else is going on."""
    exposed: float
    """Seconds of it that cannot hide behind computing."""

    @property
    def alone(self) -> float:
        """Seconds without any traffic."""
        return self.computing + self.updating

    @property
    def seconds(self) -> float:
        return self.alone + self.exposed

    @property
    def images_per_second(self) -> float:
        """Over all devices."""
        return self.images / self.seconds

    @property
    def efficiency(self) -> float:
        """Share of the time in which devices compute, where traffic hides behind computing as it can."""
        return self.alone / self.seconds


def step_of(shape: Shape, setup: Setup, machine: Machine, batch_size: int) -> Step:
    """One update of `batch_size` images on the machine.

    Of `setup`, the micro-batch is the most that is wanted; what is taken divides a device's share of the batch, as in
    training, and fits its memory. Devices and accumulation follow from it.

    Raises:
        UserError: a batch that the devices cannot share equally; FSDP in fp16; a model of which not one image fits.
    """
    if batch_size % machine.count:
        fewer = max(n for n in range(1, machine.count) if batch_size % n == 0)
        near = f"a batch of {max(batch_size // machine.count, 1) * machine.count} or {fewer} devices"
        raise UserError(f"train.batch_size {batch_size} is not a multiple of {machine.count} devices; take {near}")
    share = batch_size // machine.count
    setup = replace(setup, devices=machine.count)
    if setup.precision == "fp16" and setup.sharded > 1:  # as mpp/training/parallel.py
        raise UserError("train.parallel fsdp has no loss scaling for fp16; take train.precision bf16 or fp32, or ddp")
    limit = USABLE * machine.device.memory
    setup = _fitting(shape, _divided(setup, share, setup.micro_batch), share, limit)
    parts = flops.flops(shape, setup.kernel, setup.checkpointing)
    peak = machine.device.single if setup.precision == "fp32" else machine.device.half
    speed = machine.images_per_second or machine.efficiency * peak / flops.total(parts)
    computing = share / speed
    # Numbers that clipping, the optimiser and the moving average read and write for each weight.
    numbers = 2 + 3 + 2 * OPTIMISER_COPIES[setup.optimiser] + 3 * setup.ema
    updating = 4 * numbers * shape.parameters / setup.sharded / (ATTAINED * machine.device.bandwidth)
    if machine.images_per_second:
        updating = 0.0  # measured with the rest
    sent, sending = _traffic(shape, setup, machine)
    # DDP's gradients travel during the backward pass of the last micro-batch, FSDP's traffic during every pass.
    behind = computing if setup.parallel == "fsdp" else BACKWARD * computing / setup.accumulate
    return Step(
        setup=setup,
        images=batch_size,
        parts=parts,
        memory=memory.memory(shape, setup),
        largest=memory.largest_micro_batch(shape, setup, limit),
        computing=computing,
        updating=updating,
        sent=sent,
        sending=sending,
        exposed=max(0.0, sending - behind),
    )


def _divided(setup: Setup, share: int, most: int) -> Setup:
    """With the largest micro-batch up to `most` that divides a device's share (mpp/training/schedule.py)."""
    micro = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    return replace(setup, micro_batch=micro, accumulate=share // micro)


def _fitting(shape: Shape, setup: Setup, share: int, limit: float) -> Setup:
    """With the largest micro-batch up to the setup's own that fits `limit` bytes together with its accumulation.

    Each candidate is weighed anew: a second pass adds gradients, so half the images can need more memory.

    Raises:
        UserError: not one image fits.
    """
    while (held := memory.total(memory.memory(shape, setup))) > limit:
        if setup.micro_batch == 1:
            tries = [] if setup.checkpointing else ["--model.grad-checkpointing"]
            if setup.sharded > 1:
                tries.append("more devices")
            elif setup.precision != "fp16":
                tries.append("--train.parallel fsdp on several devices")
            tries.append("a device with more memory")
            raise UserError(
                f"one image needs {held / 1e9:.1f} GB, and the device has {limit / 1e9:.1f} of "
                f"{limit / USABLE / 1e9:.0f} GB for tensors; try {' or '.join(tries)}"
            )
        setup = _divided(setup, share, setup.micro_batch - 1)
    return setup


def _traffic(shape: Shape, setup: Setup, machine: Machine) -> tuple[float, float]:
    """Bytes that a device sends in an update, and the seconds of that, over a ring of all devices.

    DDP: an all-reduce of fp32 gradients, 2 (n - 1) / n of their bytes, once an update. FSDP, (n - 1) / n each, in every
    micro-batch: an all-gather of the blocks in the forward pass and again in the backward pass, and of the rest in
    fp32; a reduce-scatter of fp32 gradients. The ring leaves a machine by its network, with what one device sends.
    """
    n = setup.devices
    if n == 1:
        return 0.0, 0.0
    moved = 2 * 4 * shape.parameters
    if setup.parallel == "fsdp":
        blocks = shape.blocks * shape.block_parameters
        gathered = 2 * setup.narrow * blocks + 4 * shape.root_parameters
        moved = setup.accumulate * (gathered + 4 * shape.parameters)
    sent = (n - 1) / n * moved
    slowest = min(machine.device.link, machine.device.network) if machine.nodes > 1 else machine.device.link
    return sent, sent / (ATTAINED * slowest)
