"""Bytes against those of the tensors that live in the product's own training step, and by hand."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.cost.flops import EXPLICIT, FUSED
from benchmarks.cost.memory import Setup, largest_micro_batch, memory, total
from benchmarks.cost.shape import shape_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mpp.dist import World
from mpp.model.settings import ModelConfig
from mpp.objective.settings import ObjectiveConfig
from mpp.pretraining.build import PretrainingRun, build
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import training_step
from mpp.training.loop import FiniteGuard, update
from mpp.training.settings import OptimConfig, TrainConfig
from tests import runs
from tests.benchmarks.tiny import HAND

CPU, CUDA, RANKS = 0.05, 0.1, 0.1
"""Shares of the measured peak that the formulas may be off."""
ALONE = World()
SMALL = ModelConfig("vit_tiny_patch16_224", img_size=(96,), depth=3, attention="sdpa")
BATCH = 8


class Steps:
    """Training steps of a run on random images."""

    def __init__(self, source: str, config: PretrainConfig, device: str, world: World = ALONE) -> None:
        data = replace(config.data, source=source, workers=0)
        train = replace(config.train, device=device, compile="off", length="4 steps")
        config = replace(config, data=data, train=train)
        self.run: PretrainingRun = build(config, world, torch.device(device))
        self.guard = FiniteGuard(self.run.state)
        self.batches = self._batches()
        for group in self.run.state.optimizer.param_groups:
            group["lr"] = 1e-4

    def _batches(self) -> Iterator[dict[str, Any]]:
        run = self.run
        shape = (run.micro_batch, run.config.model.in_chans, *run.model.encoder.image_hw)
        while True:
            for part in range(run.schedule.accumulate):
                # Under no name: this frame would keep the images until the next step, whose peak they would lower.
                yield {
                    "images": torch.randint(0, 256, shape, dtype=torch.uint8, device=run.device),
                    "index": torch.zeros(run.micro_batch, dtype=torch.int64),
                    "position": run.state.images_seen,
                    "slot": part * run.micro_batch,
                }
            run.state.images_seen += run.schedule.batch_size

    def one(self) -> None:
        run = self.run
        update(run.state, run.wrapped, self.batches, training_step(run), run.schedule, self.guard, 1)

    def free(self) -> None:
        """Lets go of what a step leaves behind beside the state of the run."""
        self.run.state.optimizer.zero_grad(set_to_none=True)


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while this is open, as long as each lives.

    The allocator would also count what a kernel takes while it runs, which depends on the processor and the number of
    threads: a convolution's backward pass takes a copy of the weight's gradient for each thread, products in half
    precision take packed copies of what they multiply.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in taken:  # else a view of what was there, or that itself, changed in place
                self.made[storage] = None
        self.most = max(self.most, self.now() + _converted(func, args, kwargs))
        return result

    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.made)  # FSDP changes their sizes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _converted(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes of the whole input in the type of the sum, which torch makes on every device, but hides within `sum`."""
    to = (kwargs or {}).get("dtype")
    if func is not torch.ops.aten.sum.dim_IntList or to in (None, args[0].dtype):
        return 0
    return args[0].numel() * to.itemsize


def living(steps: Steps) -> int:
    """The most bytes of the tensors of a step, beyond those that lie there before it."""
    with Living() as tensors:
        steps.one()  # the optimiser makes its state
        steps.free()
        before = tensors.most = tensors.now()
        steps.one()
    return tensors.most - before


def setup_of(config: PretrainConfig) -> Setup:
    train = config.train
    micro = train.batch_size if train.micro_batch == "auto" else min(train.micro_batch, train.batch_size)
    return Setup(
        micro,
        train.batch_size // micro,
        precision=train.precision,
        optimiser=config.optim.name,
        ema=bool(config.optim.ema_decay),
        checkpointing=config.model.grad_checkpointing,
        kernel=EXPLICIT if config.model.attention == "explicit" else FUSED,
    )


def check_on_cpu(source: str, config: PretrainConfig) -> None:
    steps = Steps(source, config, "cpu")
    components = memory(shape_of(config), setup_of(config))
    kept = sum(components.pop(name) for name in ("weights", "optimiser", "moving average"))
    measured = living(steps)
    assert total(components) == pytest.approx(measured, rel=CPU), components
    model, state = steps.run.model, steps.run.state
    tensors = [*model.parameters(), *(state.ema.module.parameters() if state.ema else [])]
    tensors += [value for of in state.optimizer.state.values() for value in of.values() if value.ndim]
    assert kept == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "train", "optim", "objective"),
    [
        ({}, {}, {"name": "adam"}, {"detail": 1.0}),
        ({"grad_checkpointing": True}, {}, {"name": "sgd", "ema_decay": 0.9}, {}),
        ({}, {"micro_batch": BATCH // 4}, {}, {"ratio": 0.15, "target": "colour_4x4"}),
        ({"attention": "explicit"}, {}, {}, {"target": "pixels"}),
        ({}, {}, {}, {"words": 4.0}),
        ({}, {}, {}, {"ratio": 0.75, "split": (1.0, 0.0, 0.0), "mask_enters": 2, "decoder_depth": 1}),
        ({"img_size": (64,)}, {"precision": "bf16", "batch_size": 16}, {}, {"decoder_depth": 2}),
    ],
)
def test_the_peak_is_of_the_living_tensors(model: Any, train: Any, optim: Any, objective: Any, source: str) -> None:
    config = PretrainConfig(
        model=replace(SMALL, **model),
        train=TrainConfig(**{"batch_size": BATCH, "precision": "fp32", **train}),
        optim=OptimConfig(**optim),
        objective=ObjectiveConfig(**objective),
    )
    check_on_cpu(source, config)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "patch", "batch"), [("vit_tiny_patch16_224", 224, 16, 4), ("vit_small_patch16_224", 32, 4, 8)]
)
def test_the_usual_widths(name: str, size: int, patch: int, batch: int, checkpointing: bool, source: str) -> None:
    model = ModelConfig(name, (size,), (patch,), depth=4, attention="sdpa", grad_checkpointing=checkpointing)
    check_on_cpu(source, PretrainConfig(model=model, train=TrainConfig(batch_size=batch, precision="fp32")))


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "passes", "checkpointing"), [("ddp", 1, False), ("fsdp", 2, True)])
def test_of_several_ranks(parallel: str, passes: int, checkpointing: bool, source: str) -> None:
    from tests.benchmarks.cost import ranks_memory

    ranks = ranks_memory.RANKS if parallel == "fsdp" else 1
    batch = 4 * passes * ranks
    words = ["-m", ranks_memory.__name__, source, parallel, str(batch), "4", str(checkpointing)]
    out, _ = runs.finish(words, cwd=runs.ROOT, env={"PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tools'}"})
    measured = int(out.split("living ")[1].split()[0])
    model = ModelConfig("vit_tiny_patch16_224", **ranks_memory.MODEL, grad_checkpointing=checkpointing)
    setup = Setup(4, passes, max(ranks, 2), checkpointing=checkpointing, parallel=parallel)
    components = memory(shape_of(PretrainConfig(model=model)), setup)
    for name in ("weights", "optimiser"):
        components.pop(name)
    assert total(components) == pytest.approx(measured, rel=RANKS), components


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("name", "batch"), [("vit_small_patch16_224", 64), ("vit_large_patch16_224", 32)])
def test_on_cuda(name: str, batch: int, precision: Any, checkpointing: bool, source: str) -> None:
    model = ModelConfig(name, attention="sdpa", grad_checkpointing=checkpointing)
    config = PretrainConfig(model=model, train=TrainConfig(batch_size=batch, precision=precision))
    before = torch.cuda.memory_allocated()
    steps = Steps(source, config, "cuda")
    steps.one()
    steps.free()
    torch.cuda.reset_peak_memory_stats()
    steps.one()
    measured = torch.cuda.max_memory_allocated() - before
    assert total(memory(shape_of(config), setup_of(config))) == pytest.approx(measured, rel=CUDA)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    setup = Setup(1, precision="bf16")
    for limit in (50_000, 500_000, 5_000_000):
        most = largest_micro_batch(HAND, setup, limit)
        sizes = [total(memory(HAND, replace(setup, micro_batch=most + more))) for more in (0, 1)]
        assert sizes[0] <= limit < sizes[1]
    assert largest_micro_batch(HAND, setup, 1000) == 0
