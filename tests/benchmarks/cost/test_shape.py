"""The sizes of models, against the models themselves."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from benchmarks.cost.shape import NAMES, Shape, shape_of

from mpp.errors import UserError
from mpp.model.settings import ModelConfig
from mpp.objective.settings import ObjectiveConfig
from mpp.objective.target import build_target
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig


def check(model: ModelConfig, objective: ObjectiveConfig) -> Shape:
    """That the numbers are those of the model that is built."""
    shape, built = shape_of(model, objective), build_model(PretrainConfig(model=model, objective=objective), "meta")
    assert shape.parameters == sum(parameter.numel() for parameter in built.parameters())
    block: Any = built.encoder.vit.blocks[0]
    assert shape.block_parameters == sum(parameter.numel() for parameter in block.parameters())
    assert shape.depth == len(built.encoder.vit.blocks)
    assert (shape.heads, shape.hidden) == (block.attn.num_heads, block.mlp.fc1.out_features)
    assert (shape.patch, shape.outputs) == (built.encoder.patch, built.head.out_features)
    assert (shape.patches, shape.prefix) == (len(built.distance), built.encoder.num_prefix_tokens)
    return shape


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ({"img_size": (32, 64), "patch_size": (8,), "embed_dim": 96, "num_heads": 2}, {}),
        ({"name": "vit_giant_patch14_224"}, {"ratio": 0.15}),
        ({"pos_embed": "none", "in_chans": 8}, {"bits": 4}),
        ({"pos_embed": "2d"}, {"target": "pixels"}),
        ({"pos_embed": "sincos2d"}, {"target": "colour_4x4"}),
        ({"name": "vit_so150m_patch16_reg4_gap_256"}, {}),
        ({}, {"decoder_depth": 2}),
        ({"name": "vit_so150m_patch16_reg4_gap_256"}, {"decoder_depth": 1}),
    ],
)
def test_what_is_counted_is_what_is_built(model: Any, objective: Any) -> None:
    check(ModelConfig(**{"name": "vit_tiny_patch16_224", "depth": 3, **model}), ObjectiveConfig(**objective))


def test_the_table_is_timms() -> None:
    for name, size in NAMES.items():
        told = inspect.getsource(timm.models.model_entrypoint(name))
        said = {key: int(value) for key, value in re.findall(r"(patch_size|embed_dim|depth|num_heads)=(\d+)", told)}
        shape = shape_of(ModelConfig(name), ObjectiveConfig())
        assert said == {
            "patch_size": shape.patch[0],
            "embed_dim": shape.dim,
            "depth": shape.depth,
            "num_heads": shape.heads,
        }, name
        top, bottom = re.findall(r"mlp_ratio=(\d+)/(\d+)", told)[0] if "mlp_ratio" in told else (4, 1)
        assert shape.hidden == shape.dim * int(top) // int(bottom), (name, size)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "vit_base_r50_s16_224"}, "is not a plain ViT .*mpp-pretrain --dry-run measures any model"),
        ({"name": "vit_wee_patch16_reg1_gap_256"}, "is not a plain ViT"),
        ({"name": "vit_bse_patch16_224"}, "has no model 'vit_bse_patch16_224'; near it: vit_base_patch16_224"),
        ({"img_size": (220,)}, "model.img_size 220 is not a multiple of the patch size 16"),
        ({"embed_dim": 100}, "model.embed_dim 100 does not divide into 3 heads"),
    ],
)
def test_what_cannot_be_counted(model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        shape_of(ModelConfig(**{"name": "vit_tiny_patch16_224", **model}), ObjectiveConfig())


def test_patches_without_cells_are_refused_as_training_refuses_them() -> None:
    objective = ObjectiveConfig(target="colour_4x4")
    with pytest.raises(UserError) as training:
        build_target("colour_4x4", (14, 14), 3, objective.bits)
    for name, patch in (("vit_huge_patch14_224", ()), ("vit_tiny_patch16_224", (14,))):
        with pytest.raises(UserError, match=str(training.value)):
            shape_of(ModelConfig(name, patch_size=patch), objective)


def test_the_paper_vits_need_no_torch() -> None:
    code = (
        "import sys; from benchmarks.plan import plan; from benchmarks.settings import PlanBench; plan(PlanBench()); "
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, cwd=Path(inspect.getfile(Shape)).parents[2]
    )
    assert done.returncode == 0
