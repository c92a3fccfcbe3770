"""Sharded runs do what whole ones do."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpp import dist
from mpp.dist import World
from mpp.errors import UserError
from mpp.training.checkpoint import load_checkpoint
from mpp.training.loop import NonFinite, State, fit
from mpp.training.optim import build_optimizer, parameter_groups
from mpp.training.parallel import gradient_sync, prepare
from mpp.training.settings import OptimConfig
from mpp.training.sharded import shard, whole
from mpp.training.tensor_tree import like_these
from tests.training.small_net import CPU, SCHEDULE, Net, batches, build, gathered, save, train


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_a_sharded_run_does_what_a_whole_one_does(optimiser: str) -> None:
    one, other = (train(build(sharded, optimiser)) for sharded in (False, True))
    assert all(isinstance(p, DTensor) for p in (*other.model.parameters(), *other.ema.module.parameters()))
    reference, found = gathered(one.state_dict()), gathered(other.state_dict())
    for part in ("model", "ema"):
        assert reference[part].keys() == found[part].keys()
        for name, value in reference[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(other.meter.read(), one.meter.read())


@pytest.mark.usefixtures("group")
def test_whoever_looks_at_a_sharded_model_gets_all_of_it() -> None:
    state = train(build(True))
    reference = train(build(False))
    images = next(batches(0))
    with whole(state.model) as model, torch.inference_mode():
        assert type(model) is Net
        torch.testing.assert_close(model(images), reference.model(images), rtol=0, atol=1e-6)
    assert all(value.is_meta for value in model.parameters())  # and it costs nothing afterwards
    train(state, 8)  # which goes on as ever
    train(reference, 8)
    with whole(state.model) as model, whole(reference.model) as same:
        assert same is reference.model
        torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_bf16_is_what_blocks_are_gathered_in_and_weights_and_sums_of_gradients_stay_fp32() -> None:
    state = build(True, precision="bf16")
    state.model.bf16 = True
    train(state)
    blocks: Any = state.model.get_submodule("blocks")
    assert {dtype for block in blocks for dtype in block.dtypes} == {torch.bfloat16}
    tensors = [state.model.state_dict(), *state.optimizer.state_dict()["state"].values()]
    assert {value.dtype for part in tensors for value in part.values()} == {torch.float32}
    for number, batch in zip(range(2), batches(0), strict=False):
        with gradient_sync(state.model, on=number == 1), torch.autocast("cpu", torch.bfloat16):
            state.model(batch).float().square().mean().backward()
        gradient = state.model.get_parameter("blocks.0.linear.weight").grad
        assert isinstance(gradient, DTensor)  # shared out after every micro-batch
    total = gradient.full_tensor()
    assert total.dtype == torch.float32
    assert (total.bfloat16().float() != total).any()  # the sum of two numbers in bf16, which bf16 does not hold


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_an_update_that_the_kernel_is_to_skip_changes_no_shard(optimiser: str) -> None:
    state: Any = train(build(True, optimiser), 2)
    before = gathered(state.state_dict())
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    state.optimizer.grad_scale, state.optimizer.found_inf = None, torch.ones(())
    state.optimizer.step()
    torch.testing.assert_close(gathered(state.state_dict()), before, rtol=0, atol=0)


def test_one_process_shares_nothing_out_and_fp16_is_refused() -> None:
    model = nn.Linear(2, 2)
    assert prepare(model, CPU, World(), "off", "fsdp", "fp16") is model
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with pytest.raises(UserError, match=r"fsdp has no loss scaling for fp16; take train\.precision bf16"):
        prepare(model, CPU, World(0, 2), "off", "fsdp", "fp16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_on_cuda_a_gradient_that_is_not_finite_changes_no_shard(optimiser: str, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = Net().cuda()
        shard(model, torch.device("cuda", 0), 1, "bf16", compiled=True)
        config = OptimConfig(name=optimiser)
        state = State(model, build_optimizer(parameter_groups(model, 0.0), config))

        def spoilt() -> Iterator[Tensor]:
            for number, batch in enumerate(batches(0)):
                yield batch.cuda() * (math.nan if number == 7 else 1.0)

        def on_cuda(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.autocast("cuda", torch.bfloat16):
                return model(batch).float().square().mean(), {}

        path = save(state, tmp_path / "run")
        with pytest.raises(NonFinite, match="not finite at step 4"):
            fit(state, model, spoilt(), on_cuda, SCHEDULE)
        with whole(model) as found:
            assert all(value.isfinite().all() for value in found.parameters())
        state.load_state_dict(load_checkpoint(path, like_these(model, state.optimizer, None)))
    finally:
        dist.stop()
