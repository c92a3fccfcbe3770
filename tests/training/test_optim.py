"""Parameter groups, Adam against big_vision's chain and its formula, the moving average against its own."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpp.data.transform import Normalise
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.target import build_target
from mpp.training.loop import State, fit
from mpp.training.optim import average_warning, build_ema, build_optimizer, parameter_groups
from mpp.training.schedule import Schedule, learning_rate
from mpp.training.settings import OptimConfig

SIZE: dict[str, Any] = {"img_size": (28,), "depth": 2, "embed_dim": 48, "num_heads": 3}
MODELS = {
    "plain": ModelConfig("vit_tiny_patch16_224", patch_size=(14,), **SIZE),
    "2d": ModelConfig("vit_tiny_patch16_224", patch_size=(14,), pos_embed="2d", **SIZE),
    "registers and layer scale": ModelConfig("vit_small_patch14_reg4_dinov2", **SIZE),
    "hybrid": ModelConfig("vit_tiny_r_s16_p8_224", img_size=(64,), depth=1),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_weight_decay_is_for_the_matrices_of_layers_alone(config: ModelConfig) -> None:
    encoder, normalise = build_encoder(config), Normalise((0.5,), (0.5,), 3)
    model = MaskedPatchPrediction(encoder, build_target("mean_colour", encoder.patch, 3, 3), normalise)
    kernels = {m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    model.encoder.vit.norm.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert {group["weight_decay"]: {*group["params"]} for group in groups} == {
        0.1: kernels,
        0.0: {p for p in model.parameters() if p.requires_grad} - kernels,
    }
    assert [len(group["params"]) for group in groups] == [len({*group["params"]}) for group in groups]


class Layer(nn.Module):
    """A kernel and a bias whose gradients are what the batch says."""

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(kernel.clone()), nn.Parameter(bias.clone())


def weights_after_each_step(
    data: Any, key: str, names: tuple[str, str], config: OptimConfig, weight_decay: float, rate: Callable[[int], float]
) -> list[np.ndarray]:
    """Kernels and biases (steps, ...) of a training whose gradients, clipped to a norm of 1, are those of a fixture."""
    model = Layer(*(torch.from_numpy(data[f"{key}/init/{name}"]) for name in names))
    state = State(model, build_optimizer(parameter_groups(model, weight_decay), config))
    seen: list[list[np.ndarray]] = []

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return sum(((p * g).sum() for p, g in zip(model.parameters(), batch, strict=True)), torch.zeros(())), {}

    gradients = zip(*(torch.from_numpy(data[f"{key}/grad/{name}"]) for name in names), strict=True)
    note = lambda state: seen.append([p.detach().numpy().copy() for p in model.parameters()])  # noqa: E731
    fit(state, model, gradients, step, Schedule(12, 1, 1, rate, clip_norm=1.0), [(1, note)])
    return [np.stack(values) for values in zip(*seen, strict=True)]


def test_updates_equal_big_visions(shared: Callable[[str], Path]) -> None:
    """Its chain (clip to 1, Adam, times 0.01, plus 0.05 of the kernels, all times the schedule) is AdamW with the
    weight decay 0.05 / 0.01: torch multiplies that by the learning rate, 0.01 times the schedule."""
    data = np.load(shared("fixtures/optim.npz"), allow_pickle=False)
    rate = lambda step: 0.01 * data["adam/schedule"][step].item()  # noqa: E731
    names = ("layer/kernel", "layer/bias")
    found = weights_after_each_step(data, "adam", names, OptimConfig("adamw"), 0.05 / 0.01, rate)
    for name, ours in zip(names, found, strict=True):
        np.testing.assert_allclose(ours, data[f"adam/float32/{name}"], atol=1e-6, rtol=1e-6)


def test_updates_equal_the_paper_s_fine_tuning(shared: Callable[[str], Path]) -> None:
    """SGD with momentum 0.9 after clipping the global norm to 1, cosine rule (vision_transformer, appendix B.1.1)."""
    data = np.load(shared("fixtures/optim.npz"), allow_pickle=False)
    rate = learning_rate("cosine", 0.03, 12, 3)
    np.testing.assert_allclose([rate(step) for step in range(12)], data["sgd/lr"], rtol=1e-6)
    found = weights_after_each_step(data, "sgd", ("a", "b"), OptimConfig("sgd", momentum=0.9), 0.0, rate)
    for name, ours in zip("ab", found, strict=True):
        np.testing.assert_allclose(ours, data[f"sgd/float32/{name}"], atol=1e-6, rtol=1e-6)


def test_layer_decay_scales_the_rate_of_each_layer_by_its_depth() -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=48, num_heads=3, num_classes=2)
    groups = parameter_groups(model, 0.1, 0.5)
    scale, decay = (
        {p: group[key] for group in groups for p in group["params"]} for key in ("lr_scale", "weight_decay")
    )
    assert set(scale) == set(model.parameters())
    # Embeddings, three blocks, the last norm and the head: the layers above each.
    assert scale[model.head.weight] == 1
    blocks = [scale[block.mlp.fc1.weight] for block in model.blocks]
    assert blocks == [blocks[2] / 4, blocks[2] / 2, blocks[2]]
    assert scale[model.patch_embed.proj.weight] == scale[model.pos_embed] == blocks[0] / 2
    assert (decay[model.pos_embed], decay[model.norm.weight], decay[model.head.weight]) == (0, 0, 0.1)
    before = {p: p.detach().clone() for p in scale}
    state = State(model, build_optimizer(groups, OptimConfig("sgd", momentum=0.0)))
    step = lambda model, batch: (sum((p.sum() for p in model.parameters()), torch.zeros(())), {})  # noqa: E731
    fit(state, model, iter([None]), step, Schedule(1, 1, 1, lambda _: 0.01), [])
    for p, old in before.items():
        torch.testing.assert_close(p.detach(), old - 0.01 * scale[p] * (1 + decay[p] * old))


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_updates_equal_torch_s_with_weight_decay_for_the_kernel_alone(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    ours, reference = (Layer(torch.ones(3, 2).double(), torch.ones(4).double()) for _ in range(2))
    options: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-3}
    optimizer = build_optimizer(parameter_groups(ours, 0.2), OptimConfig(name, **options))
    groups = [{"params": [reference.kernel], "weight_decay": 0.2}, {"params": [reference.bias], "weight_decay": 0}]
    torchs = kind(groups, lr=0.1, **options)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(5):
        for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
            one.grad = other.grad = torch.randn_like(one)
        optimizer.step()
        torchs.step()
    torch.testing.assert_close(ours.state_dict(), reference.state_dict(), rtol=0, atol=1e-12)


def test_the_moving_average_is_torch_s_own_to_the_bit_and_loads_its_state() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    ema, reference = build_ema(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    assert ema is not None
    for number in range(6):
        if number == 3:  # as from a checkpoint of before
            ema = build_ema(model, 0.9)
            assert ema is not None
            ema.load_state_dict(reference.state_dict())
        for p in model.parameters():
            p.data += torch.randn_like(p)
        model(torch.randn(5, 2, 4, 4))
        for average in (ema, reference):
            average.update_parameters(model)
        assert list(ema.state_dict()) == list(reference.state_dict())
        torch.testing.assert_close(ema.state_dict(), reference.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("decay", "steps", "share"), [(0.9998, 20, 1.0), (0.9998, 2000, 0.67), (0.9, 10, 0.39)])
def test_an_average_that_stays_at_its_start_is_a_warning(decay: float, steps: int, share: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = build_ema(model, decay)
    assert ema is not None
    for step in range(steps):
        model.weight.data.fill_(float(step == 0))  # 1 after the first step, 0 after all others
        ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(share, abs=0.005)
    assert f"over {steps:,} steps: {share:.0%} of the average" in average_warning(decay, steps)
    (shorter,) = re.findall(r"--optim.ema-decay (\S+)$", average_warning(decay, steps))
    assert not average_warning(float(shorter), steps)
    assert not average_warning(0.0, steps)
    assert not average_warning(0.9998, 10_000)
    assert not average_warning(0.9998, 1)
