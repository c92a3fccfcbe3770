"""Operations against torch's own counter, and by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.cost.flops import EXPLICIT, FUSED, flops, total
from benchmarks.cost.shape import shape_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mpp.model.settings import ModelConfig
from mpp.objective.image_words import COMPONENTS
from mpp.objective.masking import draw_corruption, pick_patches
from mpp.objective.settings import ObjectiveConfig
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig
from tests.benchmarks.tiny import TINY


def _sdpa(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch 2.13 counts sdpa's kernels on CUDA; the one on the CPU computes the same.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def check(model: ModelConfig, objective: ObjectiveConfig, batch: int = 2) -> None:
    """Compares the operations of forward pass and training step with those of the product's own, an image."""
    config = PretrainConfig(model=model, objective=objective)
    built, generator = build_model(config, "cpu"), torch.Generator().manual_seed(0)
    grid = built.encoder.grid
    picked = pick_patches(batch, grid, objective.ratio, generator)
    corruption = draw_corruption(picked, grid[0] * grid[1], generator, objective.split)
    images = torch.randint(0, 256, (batch, model.in_chans, *model.image_hw), dtype=torch.uint8, generator=generator)
    components = torch.zeros(batch, COMPONENTS) if objective.words else None
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        loss = built(images, corruption, components)[0]
        forward = counter.get_total_flops() // batch
        loss.backward()
    parts = flops(shape_of(config), FUSED if model.attention == "sdpa" else EXPLICIT, model.grad_checkpointing)
    found = sum(part.forward for part in parts.values()), total(parts)
    assert found == (forward, counter.get_total_flops() // batch)


LATE = {"ratio": 0.75, "split": (1.0, 0.0, 0.0), "mask_enters": 2}


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ({}, {}),
        ({"attention": "explicit"}, {}),
        ({"grad_checkpointing": True}, {}),
        ({"img_size": (32, 48), "in_chans": 1, "depth": 3}, {"ratio": 0.15, "target": "colour_4x4"}),
        ({"pos_embed": "2d", "attention": "explicit", "grad_checkpointing": True}, {"target": "pixels"}),
        ({"depth": 4, "attention": "explicit"}, {**LATE, "detail": 1.0}),
        ({"grad_checkpointing": True}, {**LATE, "decoder_depth": 1}),
        ({}, {"decoder_depth": 2}),
        ({"depth": 4}, {**LATE, "words": 4.0}),
        ({"img_size": (56,), "patch_size": (14,)}, {"decoder_depth": 1, "words": 1.0}),
    ],
)
def test_every_part_is_what_torch_counts(model: Any, objective: Any) -> None:
    check(replace(TINY, **{"attention": "sdpa", **model}), ObjectiveConfig(**objective))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_the_usual_widths(size: str) -> None:
    check(ModelConfig(f"vit_{size}_patch16_224", depth=2, attention="sdpa"), ObjectiveConfig(), batch=1)
