"""Bytes of the tensors of a training step on a device at its fullest moment, by what they are for.

Counted are the tensors of PyTorch's eager mode; torch.compile keeps fewer for the backward pass. What kernels take for
themselves while they run is not: it depends on the device, on the CPU on the processor and the threads. The moments
are the end of the forward pass, and the backward pass at the head and at each block: activations shrink, gradients
grow. Legend: T tokens, K corrupted patches, D token width, M width of the MLP.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.cost.flops import EXPLICIT, FUSED
from benchmarks.cost.shape import Shape
from mpp.training.optim import OPTIMISER_COPIES


@dataclass(frozen=True)
class Setup:
    """What of a run decides about memory."""

    micro_batch: int
    """Images in one forward pass of a device."""
    accumulate: int = 1
    """Such passes in an update."""
    devices: int = 1
    precision: str = "fp32"
    """fp32, or bf16 or fp16 by autocast: residuals and norms stay fp32."""
    optimiser: str = "adamw"
    ema: bool = False
    checkpointing: bool = False
    """Every block runs again in the backward pass."""
    parallel: str = "ddp"
    kernel: str = FUSED

    @property
    def narrow(self) -> int:
        """Bytes of a number in the matrix products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def sharded(self) -> int:
        """Devices that share the weights, gradients and optimiser."""
        return self.devices if self.parallel == "fsdp" else 1


Moment = dict[str, int]


def memory(shape: Shape, setup: Setup) -> Moment:
    """Bytes by component at the fullest moment of a step that is not the first.

    Components: weights, optimiser, moving average, gradients, weights in half precision, gathered weights (FSDP),
    activations, head and loss, batch, temporaries.
    """
    own = -(-4 * shape.parameters // setup.sharded)
    state = {
        "weights": own,
        "optimiser": OPTIMISER_COPIES[setup.optimiser] * own,
        "moving average": own * setup.ema,
    }
    return state | max(_moments(shape, setup), key=total)


def total(components: Moment) -> int:
    """Bytes of all."""
    return sum(components.values())


def _known(shape: Shape, number: int) -> int:
    """Tokens that go through a block."""
    return shape.tokens - shape.picked * (number < shape.early)


def saved(shape: Shape, setup: Setup, number: int) -> int:
    """Bytes that a block keeps for its backward pass, of one image; the last block knows K tokens beyond its keys."""
    t, d = _known(shape, number), shape.dim
    last = number == shape.blocks - 1
    k = shape.asking if last else t
    wide, narrow = 4, setup.narrow
    attended = t * d * wide + t * d * narrow  # the block's input, and its norm
    attended += (2 * t + k) * d * narrow + k * d * narrow * last  # keys, values, queries; the tokens that ask
    attended += k * d * narrow  # what they get
    if setup.kernel == EXPLICIT:  # the attention weights, under autocast in fp32 and in half precision
        attended += shape.heads * k * t * (4 if narrow == 4 else 6)
    else:
        attended += shape.heads * k * 4  # logarithms of the sums
    mlp = k * d * wide + k * d * narrow + 2 * k * shape.hidden * narrow  # sum, its norm, before and after GELU
    return attended + mlp + 8 * (t + k)  # and the norms' means and deviations


def _moments(shape: Shape, setup: Setup) -> Iterator[Moment]:
    b, k, d = setup.micro_batch, shape.picked, shape.dim
    narrow, blocks = setup.narrow, shape.blocks
    inputs = [4 * d * _known(shape, number) for number in range(blocks)]
    kept = [saved(shape, setup, number) for number in range(blocks)]
    copies = narrow if narrow < 4 and setup.sharded == 1 else 0  # FSDP gathers in half precision
    read = k * d * (4 + narrow)  # before and after the last norm
    if shape.words:  # of all tokens, and those of either head
        read = shape.asking * d * 4 + shape.tokens * d * (4 + narrow)
    if shape.decoder:  # and the encoder's own, whose output stays fp32
        read += _known(shape, shape.depth - 1) * d * 8
    images = shape.pixels + shape.pixels * narrow + shape.patches * d * narrow
    corruption = 24 * k * b * setup.accumulate * setup.devices

    full = {
        "gradients": _gradients(shape, setup, 0),
        "weights in half precision": copies * shape.parameters,
        "gathered weights": _gathered(shape, setup, backward=False),
        "activations": b * ((sum(inputs) if setup.checkpointing else sum(kept)) + read),
    }
    yield full | {  # the loss is known, and so are its figures
        "head and loss": b * _loss(shape, setup),
        "batch": b * images + corruption,
        "temporaries": b * max(8 * shape.pixels, 16 * k * shape.patches),
    }
    windows, values = shape.word_windows
    outputs = k * (shape.outputs + shape.details) + shape.patches * shape.words + shape.image_words
    yield full | {  # what the words are is found out: windows, products, distances and how near each is, in fp32
        "head and loss": b * _loss(replace(shape, words=0, image_words=0), setup),
        "batch": b * images + corruption,
        "temporaries": 4 * b * shape.patches * windows * (values + 3 * shape.words),
    }
    yield full | {  # the gradient of the head's output has become that of its weight
        "head and loss": b * outputs * narrow,
        "batch": b * images + corruption,
        "temporaries": shape.head_parameters * (4 if narrow == 4 else 6),
    }
    for number in reversed(range(blocks)):
        of = shape.asking if number == blocks - 1 else _known(shape, number)
        alive = (sum(inputs[:number]) + kept[number]) if setup.checkpointing else sum(kept[: number + 1])
        grown = shape.head_parameters + (blocks - 1 - number) * shape.block_parameters
        # The gradient of the residual, of the MLP's inside, and one weight's.
        passing = b * (of * d * (4 + (narrow if narrow < 4 else 0)) + of * shape.hidden * narrow)
        copied = 1 if setup.checkpointing else number + 1
        yield {
            "gradients": _gradients(shape, setup, grown),
            "weights in half precision": copies * copied * shape.block_parameters,
            "gathered weights": _gathered(shape, setup, backward=True),
            "activations": b * alive,
            "head and loss": 0,
            "batch": b * images + corruption,
            "temporaries": passing + d * shape.hidden * narrow,
        }


def _gradients(shape: Shape, setup: Setup, grown: int) -> int:
    """Bytes of gradients: growing, unless earlier passes of the update left them.

    DDP has its buckets, which the last pass's gradients become; those of earlier passes lie beside them. FSDP keeps
    its share of them, also between passes.
    """
    buckets = setup.devices > 1 and setup.parallel != "fsdp"
    known = grown if setup.accumulate == 1 and not buckets else shape.parameters
    return -(-4 * known // setup.sharded) * (1 + (buckets and setup.accumulate > 1))


def _gathered(shape: Shape, setup: Setup, backward: bool) -> int:
    """FSDP: what is no block in fp32; of blocks this one and the next; a gradient on its way."""
    if setup.sharded == 1:
        return 0
    blocks = (2 * setup.narrow + 4 * backward) * shape.block_parameters
    return (4 + (setup.narrow if setup.narrow < 4 else 0)) * shape.root_parameters + blocks


def _loss(shape: Shape, setup: Setup) -> int:
    """Bytes of the head's output and what its loss keeps, of one image."""
    regression = setup.narrow + 8  # output, target, difference
    classes = setup.narrow + (0 if setup.narrow == 4 else 4) + 4
    output = shape.outputs * (regression if shape.pixel_target else classes)
    # All words are targets before they are those of one of the heads.
    words = (shape.patches * shape.words + shape.image_words) * (regression + 4)
    return shape.picked * (output + shape.details * regression) + words


def largest_micro_batch(shape: Shape, setup: Setup, limit: float) -> int:
    """The most images in one forward pass with which a step stays within `limit` bytes; 0 where not even one does."""
    sizes = range(1, 2**17)
    return bisect.bisect_right(sizes, limit, key=lambda size: total(memory(shape, replace(setup, micro_batch=size))))
