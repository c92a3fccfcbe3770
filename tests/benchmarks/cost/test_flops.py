"""Operations against torch's own counter, and by hand."""

from typing import Any

import pytest
import torch
from benchmarks.cost.flops import EXPLICIT, FUSED, Passes, flops, total
from benchmarks.cost.shape import Shape, shape_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mpp.model.settings import ModelConfig
from mpp.objective.masking import draw_corruption, pick_patches
from mpp.objective.settings import ObjectiveConfig
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig

TINY = ModelConfig("vit_tiny_patch16_224", img_size=(32,), patch_size=(8,), embed_dim=48, num_heads=3, depth=2)


def _sdpa(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch 2.13 counts sdpa's kernels on CUDA; the one on the CPU computes the same.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def counted(model: ModelConfig, objective: ObjectiveConfig, batch: int = 2) -> tuple[int, int]:
    """Operations of the product's forward pass and of all of a training step, an image."""
    config = PretrainConfig(model=model, objective=objective)
    built = build_model(config, "cpu")
    generator = torch.Generator().manual_seed(0)
    grid = built.encoder.grid
    picked = pick_patches(batch, grid, objective.ratio, generator)
    corruption = draw_corruption(picked, grid[0] * grid[1], generator, objective.split)
    images = torch.randint(0, 256, (batch, model.in_chans, *model.image_hw), dtype=torch.uint8, generator=generator)
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        loss: Tensor = built(images, corruption)[0]
        forward = counter.get_total_flops()
        loss.backward()
    return forward // batch, counter.get_total_flops() // batch


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ({}, {}),
        ({"img_size": (32, 48), "in_chans": 1, "depth": 3}, {"ratio": 0.15, "target": "colour_4x4"}),
        ({"pos_embed": "2d"}, {"target": "pixels"}),
        ({"depth": 4}, {"ratio": 0.75, "split": (1.0, 0.0, 0.0), "mask_enters": 2, "detail": 1.0}),
        ({}, {"ratio": 0.75, "split": (1.0, 0.0, 0.0), "mask_enters": 2, "decoder_depth": 1}),
        ({}, {"decoder_depth": 2}),
    ],
)
def test_every_part_is_what_torch_counts(changes: Any, objective: Any, kernel: Any, checkpointing: bool) -> None:
    from dataclasses import replace

    model = replace(TINY, **changes, attention=kernel, grad_checkpointing=checkpointing)
    told = ObjectiveConfig(**objective)
    parts = flops(shape_of(model, told), FUSED if kernel == "sdpa" else EXPLICIT, checkpointing)
    forward = sum(part.forward for part in parts.values())
    assert (forward, total(parts)) == counted(model, told)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_the_usual_sizes(size: str) -> None:
    model = ModelConfig(f"vit_{size}_patch16_224", attention="sdpa")
    parts = flops(shape_of(model, ObjectiveConfig()))
    forward = sum(part.forward for part in parts.values())
    assert (forward, total(parts)) == counted(model, ObjectiveConfig(), batch=1)


def test_by_hand() -> None:
    # 4 patches of 2 values and a class token, width 3, two blocks, MLP of 5, 2 corrupted, 7 outputs
    shape = Shape(1, (4, 2), (2, 1), 3, 2, 1, 5, 1, 15, 2, 7)
    assert (shape.patches, shape.tokens) == (4, 5)
    first = 2 * 5 * 3 * (9 + 3) + 2 * 2 * 5 * 5 * 3  # qkv and projection of 5 tokens; 5 x 5 weights twice
    last = 2 * 5 * 3 * 6 + 2 * 2 * 3 * 6 + 2 * 2 * 2 * 5 * 3  # keys and values of 5; queries and projection of 2
    assert flops(shape, EXPLICIT) == {
        "patch embedding": Passes(2 * 4 * 2 * 3, 2 * 4 * 2 * 3),
        "attention": Passes(first + last, 2 * (first + last)),
        "MLP": Passes(2 * 2 * (5 + 2) * 3 * 5, 2 * 2 * 2 * (5 + 2) * 3 * 5),
        "head": Passes(2 * 2 * 3 * 7, 2 * 2 * 2 * 3 * 7),
        "baselines": Passes(2 * 2 * 4, 0),
    }
