"""Weights in a single file, under the names of the libraries that write them, against their own models."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from mpp.errors import UserError
from mpp.system.meta_device import on_meta
from mpp.weights.base import build, create
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import read_timm_folder, write_timm_folder
from tests.weights.models import dinov2_names, timm_model, vit

SMALL: dict[str, Any] = {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def deit3_names(state: State) -> State:
    return {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): value for name, value in state.items()}


def layouts() -> dict[str, tuple[nn.Module, Any]]:
    """By name of the layout: a model, and what its library writes of it."""
    plain, half, headed = timm_model(**SMALL), timm_model(**SMALL).half(), timm_model(num_classes=5, **SMALL)
    state, zeros = plain.state_dict(), {name: 0 * value for name, value in plain.state_dict().items()}
    pooled = timm_model(num_classes=5, global_pool="avg", fc_norm=True, **SMALL)
    registers = timm_model(**SMALL, reg_tokens=4, no_embed_class=True, init_values=1e-5)
    deit3 = timm_model(**SMALL, no_embed_class=True, init_values=1e-5)
    torch.manual_seed(0)
    torchvision = TorchvisionViT(32, 8, 2, 2, 128, 256, num_classes=5)
    for parameter in torchvision.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    decoder = {"mask_token": zeros["cls_token"], "decoder_pos_embed": zeros["pos_embed"]}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.ones(8)}
    head = {"head.mlp.0.weight": torch.ones(8, 128), "head.last_layer.weight_g": torch.ones(8, 1)}
    dinov2 = under("backbone.", dinov2_names(registers))
    return {
        "timm": (headed, headed.state_dict()),
        "timm in half precision": (half.float(), {name: value.half() for name, value in half.state_dict().items()}),
        "MAE with decoder": (plain, {"model": state | decoder, "args": argparse.Namespace(lr=1), "epoch": 3}),
        "MAE fine-tuned": (pooled, {"model": pooled.state_dict()}),
        "DINO": (
            plain,
            {
                "student": under("module.backbone.", zeros) | under("module.", head),
                "teacher": under("backbone.", state) | head,
                "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]},
            },
        ),
        "DINOv2": (registers, {"teacher": dinov2 | under("dino_head.", head), "iteration": 7}),
        "DeiT III": (deit3, {"model": deit3_names(deit3.state_dict())}),
        "torchvision": (torchvision, torchvision.state_dict()),
        "Lightning": (plain, {"state_dict": under("model._model.", state), "pytorch-lightning_version": "2"}),
        "lightly-train": (registers, dinov2_names(registers)),
    }


LAYOUTS = layouts()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_computes_what_its_library_computes(layout: str, tmp_path: Path) -> None:
    model, content = LAYOUTS[layout]
    torch.save(content, tmp_path / "weights.pth")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    weights = open_weights(str(tmp_path / "weights.pth"))
    write_timm_folder(weights, tmp_path / "folder")
    with torch.no_grad():
        expected = model.eval()(images)
        for opened in (weights, read_timm_folder(tmp_path / "folder")):
            torch.testing.assert_close(build(opened).eval()(images), expected, rtol=1e-5, atol=1e-5)
    assert weights.image_hw == (32, 32)
    assert weights.mean == (0.485, 0.456, 0.406)
    assert weights.classes == (tuple("01234") if expected.shape == (2, 5) else None)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_small_patch16_224", {}),  # DINO
        ("vit_base_patch16_224", {}),  # MAE
        pytest.param("vit_huge_patch14_224", {}, marks=pytest.mark.slow),  # MAE: heads of width 80
        ("vit_small_patch14_dinov2", {}),
        ("vit_base_patch14_reg4_dinov2", {}),
        pytest.param("vit_giant_patch14_dinov2", {}, marks=pytest.mark.slow),  # SwiGLU
        pytest.param("vit_giant_patch14_reg4_dinov2", {}, marks=pytest.mark.slow),
        ("vit_base_patch32_clip_224", {}),  # a norm before the blocks
        ("vit_medium_patch16_reg4_gap_256", {}),  # no class token
        ("vit_tiny_patch16_224", {"in_chans": 1}),
    ],
)
def test_the_architecture_is_known_by_shapes(
    name: str, args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_meta():
        model: Any = timm.create_model(name, num_classes=0, **args)
    monkeypatch.setattr("mpp.weights.single_file._content", lambda _: dict(model.state_dict()))
    (tmp_path / "weights.pth").touch()
    weights = open_weights(str(tmp_path / "weights.pth"))
    with on_meta():
        built = create(weights)
    heads = [each.blocks[0].attn.num_heads for each in (model, built)]
    assert heads[0] == heads[1]
    assert weights.image_hw == model.patch_embed.img_size
    assert {key: value.shape for key, value in built.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_a_name_gives_the_architecture_of_any_model(tmp_path: Path) -> None:
    model = timm_model("test_resnet", num_classes=3)
    save_file(under("module.", model.state_dict()), tmp_path / "weights.safetensors")
    images = torch.randn(2, 3, 64, 64)
    spec = f"test_resnet:{tmp_path / 'weights.safetensors'}"
    with torch.no_grad():
        built = build(open_weights(spec)).eval()
        torch.testing.assert_close(built(images), model(images), rtol=1e-5, atol=1e-5)
    assert open_weights(f"random:{spec}").state is None


@pytest.mark.parametrize(
    ("name", "args", "image_hw"),
    [
        ("mobilenetv3_small_050", {}, None),  # blocks.STAGE.BLOCK
        ("vit_tiny_r_s16_p8_224", {}, (224, 224)),  # a hybrid, whose stem has a stride before that of the patches
        ("vit_tiny_r_s16_p8_224", {"img_size": 320}, (320, 320)),
    ],
)
def test_names_and_sizes_of_others_than_plain_vits(
    name: str, args: dict[str, Any], image_hw: tuple[int, int] | None, tmp_path: Path
) -> None:
    state = timm_model(name, **args).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    weights = open_weights(f"{name}:{tmp_path / 'weights.pth'}")
    found = build(weights).state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert image_hw in (None, weights.image_hw)


def test_a_tag_gives_the_normalisation(tmp_path: Path) -> None:
    torch.save(timm_model("test_vit").state_dict(), tmp_path / "a.bin")
    file = tmp_path / "a.bin"
    assert open_weights(f"test_vit.r160_in1k:{file}").mean == (0.5, 0.5, 0.5)
    assert open_weights(f"test_vit:{file}").mean == open_weights(str(file)).mean == (0.485, 0.456, 0.406)


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(LAYOUTS["MAE with decoder"][1], tmp_path / "mae.pth")
    open_weights(str(tmp_path / "mae.pth"))
    note = capsys.readouterr().err
    assert "30 tensors of model.*; left out 2 others: decoder_pos_embed, decoder_blocks.0.norm1.weight" in note


def without(*names: str) -> State:
    return {key: value for key, value in LAYOUTS["timm"][1].items() if key not in names}


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ({}, r"holds no patch_embed.proj.weight or conv_proj.weight \(0 tensors: none\)"),
    "a CNN": ({"conv1.weight": torch.ones(1)}, r"\(1 tensors: conv1.weight\); .*--init NAME:.*\.pth$"),
    "Hugging Face's names": (
        {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(1)},
        "give the folder in which it lies beside its config.json",
    ),
    "a block cut away": (without("blocks.1.norm2.weight", "norm.bias"), "2 missing: blocks.1.norm2.weight, norm.bias"),
    "no positions": (without("pos_embed"), "not those of a plain ViT .it lacks 'pos_embed'"),
    "odd positions": (
        without() | {"pos_embed": torch.ones(1, 13, 128)},
        "13 position embeddings, which are no square grid",
    ),
    "another shape": (
        without() | {"blocks.1.norm1.bias": torch.ones(3)},
        r"1 of another shape: blocks.1.norm1.bias \(3,\) for \(128,\)",
    ),
    "more than a plain ViT": (
        without() | {"blocks.0.attn.relative_position_bias_table": torch.ones(3), "rope.periods": torch.ones(3)},
        "2 unexpected: blocks.0.attn.relative_position_bias_table, rope.periods",
    ),
    "a width of unknown heads": (
        without() | {"patch_embed.proj.weight": torch.ones(100, 3, 8, 8)},
        "a width of 100, whose heads are unknown",
    ),
    "code": (nn.Linear(1, 1), r"a pickle of torch.nn.modules.linear.Linear, which could run code; save its state_dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_whole_model_is_refused(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as error:
        open_weights(str(tmp_path / "weights.pth"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["pth", "bin", "safetensors"])
def test_a_file_cut_off_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(without(), path)
    else:
        torch.save(without(), path)
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(UserError, match=r"cannot read the weights .*: truncated, or no file of tensors"):
        open_weights(str(path))


def test_another_name_is_refused(tmp_path: Path) -> None:
    torch.save(without(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"does not hold a whole vit_tiny_patch16_224: .*; leave out the name"):
        open_weights(str(tmp_path / "weights.pth"), "vit_tiny_patch16_224")


def test_a_file_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    write_timm_folder(vit(pool="avg"), tmp_path / "model")
    opened = open_weights(str(tmp_path / "model" / "model.safetensors"))
    assert (opened.pool, opened.mean, opened.classes) == ("avg", (0.5,) * 3, ("a", "b"))
