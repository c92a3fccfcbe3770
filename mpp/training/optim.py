"""The optimiser over groups of parameters, and the moving average of the weights."""

import itertools
from typing import Any, Protocol, cast

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NO_DECAY = ("pos_embed", "cls_token", "reg_token", "mask_token", "position")
"""Parts of names of parameters with two or more dimensions that weight decay spares."""


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, object]]:
    """Trainable parameters with and without weight decay; biases, norms, positions and extra tokens have none.

    With a `layer_decay` below 1 also by depth: `lr_scale`, by which `fit` multiplies the learning rate, is layer_decay
    to the power of the layers above, 1 for the head (timm's rule; any timm model knows its layers).
    """
    untold: Any = model
    spared = {name for name, _ in model.named_parameters() if any(part in NO_DECAY for part in name.split("."))}
    if hasattr(model, "no_weight_decay"):
        spared |= set(untold.no_weight_decay())
    if layer_decay < 1:
        told = {"weight_decay": weight_decay, "layer_decay": layer_decay, "no_weight_decay_list": tuple(spared)}
        layers: Any = param_groups_layer_decay(model, **told)
        return [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in layers]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    none = [parameter for name, parameter in named if parameter.ndim <= 1 or name in spared]
    decayed = [parameter for name, parameter in named if parameter.ndim > 1 and name not in spared]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": none, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


_MUCH_OF_THE_START = 0.2


class Optim(Protocol):
    """What `build_optimizer` reads of a config."""

    @property
    def name(self) -> str: ...
    @property
    def momentum(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...


def build_optimizer(groups: list[dict[str, object]], config: Optim) -> Optimizer:
    """SGD with momentum, Adam (weight decay as L2 on the gradient) or AdamW (decoupled), as one fused kernel.

    The learning rate is what the loop sets before each update.
    """
    first: Tensor = next(p for group in groups for p in cast(Any, group["params"]))
    fused = first.device.type in ("cuda", "cpu")
    if config.name == "sgd":  # torch has no fused one for shards
        sgd = SGD(groups, lr=0.0, momentum=config.momentum, fused=fused and not isinstance(first, DTensor))
        sgd.register_step_pre_hook(_begin_momentum)
        return sgd
    kind = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def _begin_momentum(sgd: Optimizer, *_: object) -> None:
    """Starts at zero the momentum that no update has made yet.

    torch (2.13) allocates it in the first fused update and leaves it uninitialised where that one is skipped for a
    gradient that is not finite; the next would add that memory to the weights.
    """
    for group in sgd.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and sgd.state[p].get("momentum_buffer") is None:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)


class MovingAverage(AveragedModel):
    """An exponential moving average of weights, decay * average + (1 - decay) * weights.

    It starts at the weights after the first update. One that is skipped counts as any other: the same weights again.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """As torch's (2.13), which copies its counter to the device each time, and so waits for the device."""
        averages, weights = list[Tensor](self.module.parameters()), list[Tensor](model.parameters())
        copied = [zip(self.module.buffers(), model.buffers(), strict=True)]
        if self.n_averaged > 0:  # on the CPU, wherever the weights are
            assert self.multi_avg_fn is not None
            self.multi_avg_fn(averages, weights, self.n_averaged)
        else:
            copied.append(zip(averages, weights, strict=True))
        for own, other in itertools.chain(*copied):
            own.copy_(other)
        self.n_averaged += 1


def build_ema(model: nn.Module, decay: float) -> MovingAverage | None:
    """The moving average of the weights of `model`, on their device; None for decay 0."""
    return MovingAverage(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def average_warning(decay: float, steps: int) -> str:
    """A line where the moving average, which is what is saved and tested, stays near the weights that it starts at.

    Args:
        decay: of the average; 0: none.
        steps: of the whole run. The first weights keep decay^(steps - 1) of the average.
    """
    share = decay ** (steps - 1) if decay and steps > 1 else 0.0
    if share < _MUCH_OF_THE_START:
        return ""
    shorter = max(0.0, 1 - 10 / steps)
    return (
        f"optim.ema_decay {decay:g} over {steps:,} steps: {share:.0%} of the average, which is what is saved and "
        f"tested, is still the weights after the first step; try --optim.ema-decay {shorter:.4g}"
    )
