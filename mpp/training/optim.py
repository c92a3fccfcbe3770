"""The optimiser over groups of parameters, and the moving average of the weights."""

import copy
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

NO_DECAY = ("pos_embed", "cls_token", "reg_token", "mask_token", "position")
"""Parts of names of parameters with two or more dimensions that weight decay spares."""
OPTIMISER_COPIES = {"sgd": 1, "adam": 2, "adamw": 2}
"""Numbers that each optimiser keeps for a weight."""
_LARGE_SHARE = 0.2  # of the average: where the first weights keep more of it, the user is warned


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay; biases, norms, positions and extra tokens have none.

    A `layer_decay` below 1 groups by depth as well (timm's rule): `lr_scale`, by which `fit` multiplies the learning
    rate, is layer_decay to the power of the layers above, 1 for the head.
    """
    spared = {name for name, _ in model.named_parameters() if any(part in NO_DECAY for part in name.split("."))}
    spared |= getattr(model, "no_weight_decay", set)()
    if layer_decay < 1:
        layers: Any = param_groups_layer_decay(model, weight_decay, tuple(spared), layer_decay=layer_decay)
        return [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in layers]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if parameter.ndim > 1 and name not in spared]
    others = [parameter for name, parameter in named if parameter.ndim <= 1 or name in spared]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: Any) -> Optimizer:
    """Build SGD with momentum, Adam (weight decay as L2 on the gradient) or AdamW (decoupled), as one fused kernel.

    `config` is an OptimConfig or FinetuneOptimConfig; the learning rate is set by the loop before each update.
    """
    first = groups[0]["params"][0]
    fused = first.device.type in ("cuda", "cpu")
    if config.name == "sgd":  # torch has no fused one for shards
        sgd = SGD(groups, lr=0.0, momentum=config.momentum, fused=fused and not isinstance(first, DTensor))
        sgd.register_step_pre_hook(_begin_momentum)
        return sgd
    kind = {"adam": Adam, "adamw": AdamW}[config.name]
    return kind(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def _begin_momentum(sgd: Optimizer, *_: object) -> None:
    """Start at zero the momentum that no update has made yet.

    torch (2.13) allocates it in the first fused update and leaves it uninitialised where that one is skipped for a
    gradient that is not finite; the next would add that memory to the weights.
    """
    for group in sgd.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and sgd.state[p].get("momentum_buffer") is None:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)


class MovingAverage(nn.Module):
    """An exponential moving average of weights, decay * average + (1 - decay) * weights.

    It starts at the weights after the first update. A skipped update counts as any other. Its state is that of torch's
    `AveragedModel`, which copies its counter to the device at each update (torch 2.13), and so waits for the device.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.register_buffer("n_averaged", torch.tensor(0))
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`; buffers are copied."""
        weight = 1 - self.decay if self.n_averaged > 0 else 1.0
        averages, weights = list[Tensor](self.module.parameters()), list[Tensor](model.parameters())
        torch._foreach_lerp_(averages, weights, weight)  # pyright: ignore[reportPrivateImportUsage]
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)
        self.n_averaged += 1


def build_ema(model: nn.Module, decay: float) -> MovingAverage | None:
    """Build the moving average of the weights of `model`, on their device; None for decay 0."""
    return MovingAverage(model, decay) if decay else None


def average_warning(decay: float, steps: int) -> str:
    """Return a warning where the average of a run of so many steps stays near the weights it starts at, else "".

    The weights after the first step keep decay^(steps - 1) of the average, which is what is saved and tested.
    """
    share = decay ** (steps - 1) if decay and steps > 1 else 0.0
    if share < _LARGE_SHARE:
        return ""
    return (
        f"optim.ema_decay {decay:g} over {steps:,} steps: {share:.0%} of the average, which is what is saved and "
        f"tested, is still the weights after the first step; try --optim.ema-decay {max(0.0, 1 - 10 / steps):.4g}"
    )


def constant_rate(optimizer: Optimizer) -> None:
    """Set a learning rate, which is otherwise the loop's to set."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
