"""The sizes of models, against the models themselves."""

from typing import Any

import pytest
from benchmarks.cost.shape import shape_of

from mpp.model.settings import ModelConfig
from mpp.objective.settings import ObjectiveConfig
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig


def config_of(model: dict[str, Any], **objective: Any) -> PretrainConfig:
    model = {"name": "vit_tiny_patch16_224", "depth": 3, **model}
    return PretrainConfig(model=ModelConfig(**model), objective=ObjectiveConfig(**objective))


@pytest.mark.parametrize(
    "config",
    [
        config_of({"img_size": (32, 64), "patch_size": (8,), "embed_dim": 96, "num_heads": 2}),
        config_of({"name": "vit_giant_patch14_224"}, ratio=0.15),
        config_of({"pos_embed": "none", "in_chans": 8}, bits=4),
        config_of({"pos_embed": "2d"}, target="pixels"),
        config_of({"pos_embed": "sincos2d"}, target="colour_4x4", decoder_depth=2),
        config_of({"name": "vit_so150m_patch16_reg4_gap_256"}, decoder_depth=1, detail=0.5, words=1.0),
    ],
    ids=lambda config: f"{config.model.name} {config.model.pos_embed} {config.objective.target}",
)
def test_what_is_counted_is_what_is_built(config: PretrainConfig) -> None:
    shape, built = shape_of(config), build_model(config, "meta")
    assert shape.parameters == sum(parameter.numel() for parameter in built.parameters())
    block: Any = built.encoder.vit.blocks[0]
    assert shape.block_parameters == sum(parameter.numel() for parameter in block.parameters())
    assert shape.patches == len(built.distance)
