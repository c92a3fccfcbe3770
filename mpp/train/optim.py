"""The optimiser: Adam or AdamW over two groups of parameters, and the moving average of the weights."""

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpp.train.config import OptimConfig

NO_DECAY = ("pos_embed", "cls_token", "reg_token", "mask_token", "position")
"""Parts of names of parameters with two or more dimensions that weight decay spares."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters with and without weight decay; biases, norms, positions and extra tokens have none."""
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim <= 1 or any(part in NO_DECAY for part in name.split("."))
            (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Adam (weight decay as L2 on the gradient) or AdamW (decoupled), as one fused kernel where there is one."""
    kind = {"adam": Adam, "adamw": AdamW}[config.name]
    device = next(model.parameters()).device.type
    return kind(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=device in ("cuda", "cpu"),
    )


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights, decay * average + (1 - decay) * weights; None for decay 0.

    It starts at the weights after the first update.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
