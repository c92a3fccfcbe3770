"""Time and traffic, by hand."""

import itertools
from dataclasses import replace

import pytest
from benchmarks.cost.devices import DEVICES, Device
from benchmarks.cost.flops import flops, total
from benchmarks.cost.memory import Setup, largest_micro_batch
from benchmarks.cost.memory import total as bytes_of
from benchmarks.cost.run import ATTAINED, BACKWARD, USABLE, Machine, step_of
from benchmarks.cost.shape import Shape

from mpp.errors import UserError
from tests.benchmarks.tiny import HAND

ROUND = Device(half=4e9, single=1e9, memory=1e9, bandwidth=1e6, link=1e6, network=5e5)


def test_a_step_on_one_device() -> None:
    step = step_of(HAND, Setup(8, optimiser="sgd"), Machine(ROUND, efficiency=0.5), 24)
    assert (step.setup.micro_batch, step.setup.accumulate, step.sent, step.exposed) == (8, 3, 0, 0)
    assert step.computing == pytest.approx(24 * total(flops(HAND)) / (0.5 * 1e9))
    # Clipping reads and writes the gradient; SGD reads weight, gradient and momentum and writes weight and momentum.
    assert step.updating == pytest.approx(4 * 7 * HAND.parameters / (ATTAINED * 1e6))
    assert step.images_per_second == pytest.approx(24 / (step.computing + step.updating))
    assert step_of(HAND, Setup(8, precision="bf16"), Machine(ROUND), 24).computing < step.computing
    measured = step_of(HAND, Setup(8), Machine(ROUND, images_per_second=12), 24)
    assert (measured.computing, measured.updating, measured.images_per_second) == (2, 0, 12)


def test_traffic_of_ddp_is_a_ring_once_an_update() -> None:
    size = 4 * HAND.parameters
    for micro in (4, 8):
        step = step_of(HAND, Setup(micro), Machine(ROUND, 4), 32)
        assert step.sent == 2 * 3 / 4 * size
        assert step.sending == pytest.approx(step.sent / (ATTAINED * 1e6))
        hidden = BACKWARD * step.computing / step.setup.accumulate
        assert step.exposed == pytest.approx(step.sending - hidden)
        assert step.seconds == pytest.approx(step.computing + step.updating + step.exposed)
        assert step.efficiency == pytest.approx(step.alone / step.seconds)
    apart = step_of(HAND, Setup(8), Machine(ROUND, 4, per_node=2), 32)
    assert apart.sending == pytest.approx(2 * step.sending)  # the network is half as fast as the link
    fast = step_of(HAND, Setup(8), Machine(replace(ROUND, link=1e15), 4), 32)  # which hides all
    assert (fast.exposed, fast.efficiency) == (0, 1)


def test_fsdp_gathers_weights_and_shares_gradients_out_in_every_pass() -> None:
    blocks = 2 * HAND.block_parameters
    rest = HAND.parameters - blocks
    step = step_of(HAND, Setup(4, precision="bf16", parallel="fsdp"), Machine(ROUND, 4), 32)
    assert step.setup.accumulate == 2
    assert step.sent == 3 / 4 * 2 * (2 * 2 * blocks + 4 * rest + 4 * HAND.parameters)
    assert step.exposed == pytest.approx(max(0, step.sending - step.computing))


def test_the_micro_batch_fits_and_divides() -> None:
    roomy = step_of(HAND, Setup(100), Machine(ROUND), 96)
    assert (roomy.setup.micro_batch, roomy.setup.accumulate) == (96, 1)
    tight = step_of(HAND, Setup(100), Machine(replace(ROUND, memory=100e3)), 96)
    assert tight.setup.micro_batch <= tight.largest < 96
    assert tight.setup.micro_batch * tight.setup.accumulate == 96
    with pytest.raises(UserError, match=r"one image needs .*; try --model.grad-checkpointing or --train.parallel fsdp"):
        step_of(HAND, Setup(100), Machine(replace(ROUND, memory=1e3)), 96)
    with pytest.raises(UserError, match=r"try --model.grad-checkpointing or a device with more memory"):  # no FSDP
        step_of(HAND, Setup(8, precision="fp16"), Machine(replace(ROUND, memory=1e3), 4), 32)


def test_what_is_planned_fits_with_its_accumulation() -> None:
    giant, planned = Shape(3, (224, 224), (14, 14), 1408, 40, 16, 6144, 1, 257 * 1408, 128, 512), set()
    for device, parallel, count in itertools.product(("rtx4090", "a100-40"), ("ddp", "fsdp"), (2, 4, 8)):
        limit, setup = USABLE * DEVICES[device].memory, Setup(256, precision="bf16", parallel=parallel)
        try:
            step = step_of(giant, setup, Machine(DEVICES[device], count), 1024)
        except UserError:
            continue
        assert bytes_of(step.memory) <= limit, (device, parallel, count)
        assert step.largest == largest_micro_batch(giant, step.setup, limit) >= step.setup.micro_batch
        planned.add(step.setup.accumulate)
    assert max(planned) > 1


def test_a_second_pass_that_does_not_fit_is_no_way_out() -> None:
    # Shards of 4 devices fit with one image, but whole gradients beside them do not.
    setup = Setup(100, parallel="fsdp")
    one = step_of(HAND, replace(setup, micro_batch=1), Machine(ROUND, 4), 4)
    small = Machine(replace(ROUND, memory=1.01 * bytes_of(one.memory) / USABLE), 4)
    assert step_of(HAND, setup, small, 4).setup.micro_batch == 1
    with pytest.raises(UserError, match=r"one image needs .*; try --model.grad-checkpointing or more devices or a dev"):
        step_of(HAND, setup, small, 8)
