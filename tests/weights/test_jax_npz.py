"""JAX checkpoints against the authors' own code, and against timm's models."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from mpp.errors import UserError
from mpp.weights.base import TanhHead, build
from mpp.weights.jax_npz import read_jax_npz
from tests import runs

VITS = ["vit_token", "vit_token_rep", "vit_gap"]
HYBRIDS = ["hybrid", "hybrid_stem_only"]
ATOL = 1e-5
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
POSITIONS = "Transformer/posembed_input/pos_embedding"
Shared = Callable[[str], Path]


def read(shared: Shared, name: str, size: int | None = None) -> tuple[Any, Mapping[str, np.ndarray]]:
    weights = read_jax_npz(shared(f"fixtures/{name}_params.npz"))
    model = build(weights, image_hw=(size, size) if size else None, attention="explicit").eval()
    return model, np.load(shared(f"fixtures/{name}_io.npz"))


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", VITS + HYBRIDS)
def test_tokens_features_and_logits_are_the_authors(name: str, shared: Shared) -> None:
    model, given = read(shared, name)
    images = nchw(given["image"])
    outputs: dict[str, torch.Tensor] = {}
    modules = {"embedding": model.patch_embed, "posembed_input": model.pos_drop, "encoder_norm": model.norm}
    modules |= {f"encoderblock_{i}": block for i, block in enumerate(model.blocks)}
    for key, module in modules.items():
        module.register_forward_hook(lambda _, __, out, key=key: outputs.update({key: out}))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        if isinstance(model.head, TanhHead):
            features = model.head.representation(features)
        close(features, given["features"])
        close(model(images), given["logits"])
    # Tokens reach 10, and the authors' own float32 is true to 2e-5; the stems' many sums use that up.
    atol = 2e-5 if name in HYBRIDS else ATOL
    for key, tokens in outputs.items():
        theirs = given[f"mid/{key}"].reshape(tokens.shape)
        np.testing.assert_allclose(tokens.numpy(), theirs, rtol=0, atol=atol, err_msg=key)
    between = {key.removeprefix("mid/") for key in given if key.startswith("mid/")}
    assert set(outputs) == between - {"gn_root", "block1", "block2"}


@pytest.mark.parametrize("size", [30, 29])
def test_a_hybrid_at_odd_sizes(size: int, shared: Shared) -> None:
    model, given = read(shared, "hybrid", size)
    with torch.no_grad():
        close(model(nchw(given[f"image_{size}"])), given[f"logits_{size}"])
    same = build(read_jax_npz(shared("fixtures/hybrid_params.npz")))
    assert torch.equal(model.pos_embed, same.pos_embed)


def test_gradients_are_the_authors(shared: Shared, tmp_path: Path) -> None:
    model, given = read(shared, "vit_token")
    grads = np.load(shared("fixtures/vit_token_grads.npz"))
    loss = F.cross_entropy(model(nchw(given["image"])), torch.from_numpy(grads["labels"]).long())
    loss.backward()
    np.testing.assert_allclose(loss.item(), grads["loss"], rtol=1e-6)
    theirs = {name.removeprefix("grad/"): grads[name] for name in grads if name.startswith("grad/")}
    theirs = read_jax_npz(write(tmp_path / "grads.npz", theirs)).state or {}
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # Beside its size an absolute part: the gradients of the keys' biases are zero but for rounding.
        tolerance = 1e-5 * float(theirs[name].abs().max()) + 1e-6
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=0, atol=tolerance, msg=name)


def jax_arrays(state: Mapping[str, torch.Tensor], heads: int) -> dict[str, np.ndarray]:
    """A timm ViT's weights under the names and in the layout of the released checkpoints."""
    dim = state["norm.weight"].shape[0]
    arrays = {POSITIONS: state["pos_embed"]}
    layers = {"embedding": "patch_embed.proj", "Transformer/encoder_norm": "norm", "head": "head"}
    # Of a hybrid of the root convolution alone.
    layers |= {"conv_root": "patch_embed.backbone.conv", "gn_root": "patch_embed.backbone.norm"}
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    for i in range(sum(name.endswith("norm1.weight") for name in state)):
        block, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        layers |= {f"{block}/LayerNorm_0": f"{ours}.norm1", f"{block}/LayerNorm_2": f"{ours}.norm2"}
        layers |= {f"{block}/MlpBlock_3/Dense_{j}": f"{ours}.mlp.fc{j + 1}" for j in range(2)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        kernels = state[f"{ours}.attn.qkv.weight"].reshape(3, heads, dim // heads, dim).permute(0, 3, 1, 2)
        biases = state[f"{ours}.attn.qkv.bias"].reshape(3, heads, dim // heads)
        for j, part in enumerate(("query", "key", "value")):
            arrays |= {f"{attention}/{part}/kernel": kernels[j], f"{attention}/{part}/bias": biases[j]}
        arrays[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].t().reshape(heads, dim // heads, dim)
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
    for theirs, ours in layers.items():
        if f"{ours}.weight" in state:
            weight = state[f"{ours}.weight"]
            weight = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.t()
            arrays[f"{theirs}/{'scale' if weight.ndim == 1 else 'kernel'}"] = weight
        if f"{ours}.bias" in state:
            arrays[f"{theirs}/bias"] = state[f"{ours}.bias"]
    return {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in arrays.items()}


def small(**settings: Any) -> Any:
    """A timm model with no weight at its initial value."""
    torch.manual_seed(0)
    settings = SMALL | {"num_classes": 5, "act_layer": "gelu_tanh"} | settings
    model = timm.create_model("vit_base_patch16_224", **settings)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


@pytest.mark.parametrize(
    ("prefix", "settings", "expected"),
    [
        ("", {"in_chans": 5, "mlp_ratio": 1.7}, {"in_chans": 5, "pool": "token"}),
        ("opt/target/", {"patch_size": (8, 4), "img_size": (32, 16)}, {"image_hw": (32, 16), "pool": "token"}),
        ("params/", {"class_token": False, "global_pool": "avg", "fc_norm": False}, {"pool": "avg"}),
    ],
    ids=["channels", "flat patches", "mean-pooled, no class token"],
)
def test_shape_pooling_and_head_are_inferred(
    prefix: str, settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    source = small(**settings)
    arrays = {prefix + name: array for name, array in jax_arrays(source.state_dict(), 3).items()}
    if prefix:
        arrays["opt/state/step"] = np.ones(1, np.int64)
    weights = read_jax_npz(write(tmp_path / "a.npz", arrays))
    expected = {"name": "vit_base_patch16_224", "image_hw": (32, 32), "classes": tuple("01234")} | expected
    assert {key: getattr(weights, key) for key in expected} == expected
    assert (weights.args["act_layer"], weights.representation) == ("gelu_tanh", None)
    images = torch.randn(2, weights.in_chans, *weights.image_hw)
    torch.testing.assert_close(build(weights).eval()(images), source(images), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [("vit_tiny_patch16_224", 64, 17), runs.slow("vit_small_patch32_224", 224, 50), ("vit_tiny_r_s16_p8_224", 64, 5)],
)
def test_a_shape_that_timm_names_gets_that_name(name: str, size: int, tokens: int, tmp_path: Path) -> None:
    source = timm.create_model(name, img_size=size, num_classes=0)
    state = source.state_dict()
    weights = read_jax_npz(write(tmp_path / "a.npz", jax_arrays(state, source.blocks[0].attn.num_heads)))
    assert (weights.name, weights.image_hw, weights.args) == (name, (size, size), {"act_layer": "gelu_tanh"})
    assert (weights.classes, weights.state["pos_embed"].shape[1]) == (None, tokens)  # pyright: ignore


def test_a_hidden_layer_without_a_head_is_left_out(tmp_path: Path) -> None:
    arrays = jax_arrays(small(num_classes=0).state_dict(), 3)
    arrays |= {"pre_logits/kernel": np.zeros((24, 7), np.float32), "pre_logits/bias": np.zeros(7, np.float32)}
    weights = read_jax_npz(write(tmp_path / "a.npz", arrays))
    assert (weights.classes, weights.representation) == (None, None)
    assert build(weights).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 24)


def test_missing_and_unexpected_names_are_listed(tmp_path: Path) -> None:
    arrays = jax_arrays(small().state_dict(), 3)
    whole = dict(arrays)
    arrays["Transformer/surprise"] = np.zeros(3, np.float32)
    arrays["cls"] = arrays["cls"].astype(np.int64)
    with pytest.raises(UserError, match=r"a\.npz: .*1 unexpected: Transformer/surprise; 1 not of floating point: cls"):
        read_jax_npz(write(tmp_path / "a.npz", arrays))
    del whole["Transformer/encoderblock_1/LayerNorm_2/scale"]
    with pytest.raises(UserError, match=r"a\.npz: .*1 missing: blocks\.1\.norm2\.weight"):
        build(read_jax_npz(write(tmp_path / "a.npz", whole)))


KEY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/kernel"


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {  # of the arrays, or of the bytes of a good file
    "empty": (lambda _: b"", "it is empty"),
    "text": (lambda _: b"<html>not found</html>", "pickle|no .npz"),
    "truncated": (lambda whole: whole[: len(whole) // 2], "cannot be read as .npz"),
    "flipped": (lambda whole: whole[:4000] + bytes([whole[4000] ^ 0xFF]) + whole[4001:], "cannot be read as .npz"),
    "single": (lambda _: npy(np.zeros(3)), "single array"),
    "objects": (lambda _: {"embedding/kernel": np.array([{}], dtype=object)}, "pickle"),
    "foreign": (lambda _: {"a": np.zeros(2)}, "it holds a, "),
    "nothing": (lambda _: {}, "it holds nothing"),
    "bent": (lambda arrays: arrays | {"embedding/kernel": arrays["embedding/kernel"][0]}, "not those of a ViT"),
    "oblong": (lambda arrays: arrays | {POSITIONS: arrays[POSITIONS][:, :-2]}, "15 position .* no square grid"),
    "another key": (lambda arrays: arrays | {KEY: np.zeros((20, 3, 8), np.float32)}, "that no ViT has: .*attn.key"),
    "no blocks": (lambda arrays: {k: x for k, x in arrays.items() if "block" not in k}, "not those of a ViT"),
}


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_refused_in_a_line(how: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[how]
    arrays = jax_arrays(small().state_dict(), 3)
    path = write(tmp_path / "weights.npz", arrays)
    if how in ("empty", "text", "truncated", "flipped", "single"):
        path.write_bytes(damage(path.read_bytes()))
    else:
        write(path, damage(arrays))
    with pytest.raises(UserError, match=reason) as caught:
        read_jax_npz(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
