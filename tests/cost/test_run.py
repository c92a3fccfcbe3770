"""Time, traffic and storage, by hand."""

from dataclasses import replace

import pytest

from mpp.cost.devices import DEVICES, Device, device_named
from mpp.cost.flops import flops, total
from mpp.cost.memory import Setup
from mpp.cost.run import ATTAINED, BACKWARD, Machine, step_of, storage
from mpp.errors import UserError
from tests.cost.test_memory import HAND

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
    assert measured.computing == 2


def test_traffic_of_ddp_is_a_ring_once_an_update() -> None:
    size = 4 * HAND.parameters
    for micro in (4, 8):
        step = step_of(HAND, Setup(micro), Machine(ROUND, 4), 32)
        assert step.sent == 2 * 3 / 4 * size
        assert step.sending == pytest.approx(step.sent / (ATTAINED * 1e6))
        hidden = BACKWARD * step.computing / step.setup.accumulate
        assert step.exposed == pytest.approx(step.sending - hidden)
        assert step.seconds == pytest.approx(step.computing + step.updating + step.exposed)
        assert step.efficiency_unhidden == pytest.approx(step.alone / (step.alone + step.sending))
        assert step.efficiency > step.efficiency_unhidden
    apart = step_of(HAND, Setup(8), Machine(ROUND, 4, per_node=2), 32)
    assert apart.sending == pytest.approx(2 * step.sending)  # the network is half as fast as the link


def test_traffic_of_fsdp_is_gathered_in_every_pass() -> None:
    blocks = 2 * HAND.block_parameters
    rest = HAND.parameters - blocks
    step = step_of(HAND, Setup(4, precision="bf16", parallel="fsdp"), Machine(ROUND, 4), 32)
    assert step.setup.accumulate == 2
    assert step.sent == 3 / 4 * (2 * (2 * 2 * blocks + 4 * rest) + 4 * HAND.parameters)
    assert step.exposed == pytest.approx(max(0, step.sending - step.computing))


def test_a_fast_link_hides_all_traffic() -> None:
    step = step_of(HAND, Setup(8), Machine(replace(ROUND, link=1e15), 4), 32)
    assert (step.exposed, step.efficiency) == (0, 1)


def test_the_micro_batch_fits_and_divides() -> None:
    roomy = step_of(HAND, Setup(100), Machine(ROUND), 96)
    assert (roomy.setup.micro_batch, roomy.setup.accumulate) == (96, 1)
    tight = step_of(HAND, Setup(100), Machine(replace(ROUND, memory=100e3)), 96)
    assert tight.setup.micro_batch <= tight.largest < 96
    assert tight.setup.micro_batch * tight.setup.accumulate == 96
    with pytest.raises(UserError, match=r"one image needs .*; try --model.grad-checkpointing or --train.parallel fsdp"):
        step_of(HAND, Setup(100), Machine(replace(ROUND, memory=1e3)), 96)
    with pytest.raises(UserError, match="100 is not a multiple of 8 devices; take a batch of 96 or 5 devices"):
        step_of(HAND, Setup(100), Machine(ROUND, 8), 100)


def test_storage() -> None:
    held = storage(HAND, Setup(8, ema=True, devices=4, parallel="fsdp"), 1000, 500, kept=2, written=21, disk=1e3)
    assert held.data_bytes == 500_000
    assert held.checkpoint == 4 * 4 * HAND.parameters  # weights, two moments, average
    assert (held.kept, held.written, held.seconds) == (3, 21, held.checkpoint / 1000)


def test_devices_are_found_by_name() -> None:
    assert device_named("H200") is DEVICES["h200"]
    for wrong, near in (("a100", "a100-80 or a100-40"), ("h20", "h200"), ("4090", "rtx4090"), ("xyz", "h200 or h100")):
        with pytest.raises(UserError, match=f"no device '{wrong}' in the plan's table; take .*{near}"):
            device_named(wrong)
