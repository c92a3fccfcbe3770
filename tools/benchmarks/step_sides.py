"""What is timed: our training step as the product builds it, timm's supervised step, and a large matrix product."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from mpp.data.pixel_cache import open_images
from mpp.dist import World
from mpp.model.attention import use_kernel
from mpp.model.settings import ModelConfig
from mpp.objective.masking import Corruption, draw_corruption, pick_patches
from mpp.pretraining.build import PretrainingRun, build_model
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import endless_step, training_step
from mpp.system.meta_device import on_meta
from mpp.training.loop import fit
from mpp.training.optim import build_optimizer, constant_rate, parameter_groups
from mpp.training.parallel import autocast, prepare
from mpp.training.settings import OptimConfig, TrainConfig
from mpp.training.timing import calls_lasting, seconds_a_call

CLASSES = 1000
WAIT_STEPS = 4


@dataclass(frozen=True)
class Setting:
    """What all sides of one table share."""

    model: ModelConfig
    batch: int
    device: torch.device
    precision: str
    compile: str


@dataclass
class Side:
    """A model, its optimiser and one training step of it."""

    setting: Setting
    model: nn.Module
    optimizer: Optimizer
    run: Callable[[], object]
    pretraining: PretrainingRun | None = None
    """Of ours alone."""

    @property
    def compiled(self) -> bool:
        return any(module._compiled_call_impl is not None for module in self.model.modules())

    @property
    def state_bytes(self) -> int:
        """Weights and what the optimiser keeps."""
        kept = [value for of in self.optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *kept])


def pretrain_config(setting: Setting) -> PretrainConfig:
    """A run of the product at its defaults, of this model, batch and arithmetic."""
    train = TrainConfig(
        batch_size=setting.batch,
        micro_batch=setting.batch,
        precision=setting.precision,  # pyright: ignore[reportArgumentType]
        device=str(setting.device),
        compile=setting.compile,  # pyright: ignore[reportArgumentType]
    )
    return PretrainConfig(model=setting.model, train=train)


def random_images(setting: Setting) -> Tensor:
    """uint8 (batch, channels, height, width) on the device."""
    shape = (setting.batch, setting.model.in_chans, *setting.model.image_hw)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(setting.device)


def ours(setting: Setting) -> Side:
    """The product's own parts, step and update; only the batch is always the same one."""
    pretraining, run = endless_step(pretrain_config(setting), setting.device)
    return Side(setting, pretraining.model, pretraining.state.optimizer, run, pretraining)


def supervised(setting: Setting) -> Side:
    """timm's own model of that name with a head for 1000 classes, and cross-entropy."""
    model = timm_model(setting.model).to(setting.device)
    pixels = random_images(setting).float() / 127.5 - 1
    labels = torch.arange(setting.batch, device=setting.device) % CLASSES
    wrapped = prepare(model, setting.device, World(), setting.compile)
    return plain_side(setting, model, lambda: F.cross_entropy(wrapped(pixels), labels))


def timm_model(config: ModelConfig) -> nn.Module:
    """As timm makes it, but for the sizes."""
    sizes: dict[str, Any] = {key: getattr(config, key) for key in ("embed_dim", "depth", "num_heads")}
    if config.patch_size:
        sizes["patch_size"] = (config.patch_size[0], config.patch_size[-1])
    return timm.create_model(config.name, num_classes=CLASSES, img_size=config.image_hw, **sizes)


def plain_side(setting: Setting, model: nn.Module, loss: Callable[[], Tensor]) -> Side:
    """The usual training step, with the product's optimiser, clipping and arithmetic."""
    config = OptimConfig()
    optimizer = build_optimizer(parameter_groups(model, config.weight_decay), config)
    constant_rate(optimizer)
    return Side(setting, model, optimizer, plain_step(loss, setting, model, optimizer, config.clip_norm))


def plain_step(
    loss: Callable[[], Tensor], setting: Setting, model: nn.Module, optimizer: Optimizer, clip_norm: float
) -> Callable[[], None]:
    """Forward, backward, clipping (0: none) and update, as any loop has them; nobody waits for the device."""
    scaler = GradScaler(setting.device.type, enabled=setting.precision == "fp16")

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(setting.precision, setting.device):
            value = loss()
        scaler.scale(value).backward()
        if clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()

    return run


def data_wait(run: PretrainingRun, data: str) -> float:
    """Share of the time that a short run waits for its data, once it has its first batches.

    Raises:
        UserError: a source that does not open.
    """
    source = open_images(replace(run.config.data, source=data), run.reading, run.workers)
    fed = replace(run, source=source, train_source=source)
    schedule = replace(run.schedule, total_steps=run.schedule.step(run.state.images_seen) + 2 * WAIT_STEPS)
    seen: list[dict[str, float]] = []
    look = lambda state: seen.append(state.clock.read(state.images_seen, 0))  # noqa: E731
    with closing(fed.batches()) as batches:
        fit(run.state, run.wrapped, batches, training_step(fed), schedule, each_step=[look])
    seconds = [1 / each["time/images_per_second"] for each in seen[-WAIT_STEPS:]]
    waited = [each["time/data_wait"] * of for each, of in zip(seen[-WAIT_STEPS:], seconds, strict=True)]
    return sum(waited) / sum(seconds)


def flops_per_image(config: ModelConfig) -> tuple[float, float]:
    """FLOPs of one image forward and backward, of our model and of timm's supervised one; nothing is computed.

    Those of the matrix products as they are done: in our last block, of the corrupted tokens alone. What attention
    kernels compute a second time in their backward pass is not counted.
    """
    model = build_model(PretrainConfig(model=config), "meta")
    use_kernel(model, "explicit")
    grid, generator = model.encoder.grid, torch.Generator()
    objective = PretrainConfig().objective
    drawn = draw_corruption(pick_patches(1, grid, objective.ratio, generator), grid[0] * grid[1], generator)
    corruption = Corruption(drawn.picked.to("meta"), drawn.kinds.to("meta"), drawn.other.to("meta"), drawn.group)
    pixels = torch.empty(1, config.in_chans, *config.image_hw, device="meta")
    with on_meta():
        plain: Any = timm_model(config)
    for block in plain.blocks:
        block.attn.fused_attn = False
    found = []
    for forward in (lambda: model.predict(pixels, corruption), lambda: plain(pixels)):
        with FlopCounterMode(display=False) as counter:
            forward().sum().backward()
        found.append(float(counter.get_total_flops()))
    return found[0], found[1]


def matrix_product(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Callable[[], float]:
    """The ceiling: gives the FLOP/s of a large square product in the dtype of the step.

    Of the largest size that is done in about `seconds`, at most 8192 (CPU: 2048).
    """
    size, largest = 256, 8192 if device.type == "cuda" else 2048
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        run = lambda: torch.mm(a, b)  # noqa: B023, E731
        run()
        if size == largest or 8 * seconds_a_call(run, device) > seconds:
            times = calls_lasting(seconds, run, device)
            return lambda: 2 * size**3 / seconds_a_call(run, device, times)
        size *= 2
