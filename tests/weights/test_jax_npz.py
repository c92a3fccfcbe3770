"""JAX checkpoints against the authors' own code, and against timm's loader."""

import pickle
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

VITS = ["vit_token", "vit_token_rep", "vit_gap"]
HYBRIDS = ["hybrid", "hybrid_stem_only"]
ATOL = 1e-5
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
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


def test_gradients_are_the_authors(shared: Shared) -> None:
    model, given = read(shared, "vit_token")
    grads = np.load(shared("fixtures/vit_token_grads.npz"))
    loss = F.cross_entropy(model(nchw(given["image"])), torch.from_numpy(grads["labels"]).long())
    loss.backward()
    np.testing.assert_allclose(loss.item(), grads["loss"], rtol=1e-6)
    ours = jax_arrays({name: parameter.grad for name, parameter in model.named_parameters()}, heads=3)
    assert {f"grad/{name}" for name in ours} == {name for name in grads if name.startswith("grad/")}
    for name, grad in ours.items():
        theirs = grads[f"grad/{name}"]
        # Beside its size an absolute part: the gradients of the keys' biases are zero but for rounding.
        tolerance = 1e-5 * float(np.abs(theirs).max()) + 1e-6
        np.testing.assert_allclose(grad, theirs, rtol=0, atol=tolerance, err_msg=name)


def jax_arrays(state: Mapping[str, torch.Tensor], heads: int) -> dict[str, np.ndarray]:
    """A timm ViT's tensors under the names and in the layout of the released checkpoints."""
    dim = state["norm.weight"].shape[0]
    arrays: dict[str, torch.Tensor] = {}

    def norm(theirs: str, ours: str) -> None:
        arrays[f"{theirs}/scale"], arrays[f"{theirs}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    def dense(theirs: str, ours: str) -> None:
        arrays[f"{theirs}/kernel"], arrays[f"{theirs}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]

    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].permute(2, 3, 1, 0)
    arrays["embedding/bias"] = state["patch_embed.proj.bias"]
    arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    for i in range(sum(name.endswith("norm1.weight") for name in state)):
        block, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        norm(f"{block}/LayerNorm_0", f"{ours}.norm1")
        norm(f"{block}/LayerNorm_2", f"{ours}.norm2")
        kernels = state[f"{ours}.attn.qkv.weight"].reshape(3, heads, dim // heads, dim)
        biases = state[f"{ours}.attn.qkv.bias"].reshape(3, heads, dim // heads)
        for j, part in enumerate(("query", "key", "value")):
            arrays[f"{attention}/{part}/kernel"] = kernels[j].permute(2, 0, 1)
            arrays[f"{attention}/{part}/bias"] = biases[j]
        arrays[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(heads, dim // heads, dim)
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        dense(f"{block}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
        dense(f"{block}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
    norm("Transformer/encoder_norm", "norm")
    if "patch_embed.backbone.conv.weight" in state:  # of a hybrid of the root convolution alone
        arrays["conv_root/kernel"] = state["patch_embed.backbone.conv.weight"].permute(2, 3, 1, 0)
        norm("gn_root", "patch_embed.backbone.norm")
    if "head.weight" in state:
        dense("head", "head")
    return {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in arrays.items()}


def small(**settings: Any) -> Any:
    """A timm model with no weight at its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_224", **(SMALL | {"num_classes": 5, "act_layer": "gelu_tanh"} | settings)
    )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def write(path: Path, arrays: Mapping[str, np.ndarray], prefix: str = "") -> Path:
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})  # pyright: ignore[reportArgumentType]
    return path


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_what_timm_reads_from_the_same_file(prefix: str, tmp_path: Path) -> None:
    source = small()
    arrays = jax_arrays(source.state_dict(), 3)
    # timm takes "params/" for big_vision's names: it is shown the file without.
    bare = write(tmp_path / "bare.npz", arrays)
    path = write(tmp_path / "weights.npz", arrays, prefix)
    if prefix == "opt/target/":
        path = write(path, {prefix + k: v for k, v in arrays.items()} | {"opt/state/step": np.ones(1, np.int64)})
    theirs = small()
    for parameter in theirs.parameters():
        parameter.data.zero_()
    theirs.load_pretrained(str(bare))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = build(read_jax_npz(path), attention="sdpa").eval()(images)
        torch.testing.assert_close(ours, theirs(images), rtol=0, atol=ATOL)
        torch.testing.assert_close(ours, source(images), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("settings", "hw", "expected"),
    [
        ({"in_chans": 5, "mlp_ratio": 1.7}, (32, 32), {"in_chans": 5, "pool": "token"}),
        ({"patch_size": (8, 4), "img_size": (32, 16)}, (32, 16), {"pool": "token"}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, (32, 32), {"pool": "avg"}),
    ],
    ids=["channels", "flat patches", "mean-pooled, no class token"],
)
def test_shape_pooling_and_head_are_inferred(
    settings: dict[str, Any], hw: tuple[int, int], expected: dict[str, Any], tmp_path: Path
) -> None:
    source = small(**settings)
    weights = read_jax_npz(write(tmp_path / "a.npz", jax_arrays(source.state_dict(), 3)))
    assert (weights.name, weights.image_hw, weights.args["act_layer"]) == ("vit_base_patch16_224", hw, "gelu_tanh")
    assert {key: getattr(weights, key) for key in expected} == expected
    assert (weights.classes, weights.representation) == (("0", "1", "2", "3", "4"), None)
    assert (weights.mean, weights.std) == ((0.5,), (0.5,))
    images = torch.randn(2, weights.in_chans, *hw)
    torch.testing.assert_close(build(weights).eval()(images), source(images), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("vit_tiny_patch16_224", 224, 197),
        ("vit_tiny_patch16_224", 64, 17),
        ("vit_small_patch32_224", 224, 50),
        ("vit_tiny_r_s16_p8_224", 64, 5),
    ],
)
def test_a_shape_that_timm_names_gets_that_name(name: str, size: int, tokens: int, tmp_path: Path) -> None:
    source = timm.create_model(name, img_size=size, num_classes=0)
    state = source.state_dict()
    weights = read_jax_npz(write(tmp_path / "a.npz", jax_arrays(state, source.blocks[0].attn.num_heads)))
    assert (weights.name, weights.image_hw, weights.args) == (name, (size, size), {"act_layer": "gelu_tanh"})
    assert (weights.classes, weights.state["pos_embed"].shape[1]) == (None, tokens)  # pyright: ignore


def test_hybrids_get_the_name_or_the_units(shared: Shared) -> None:
    own, named = (read_jax_npz(shared(f"fixtures/{name}_params.npz")) for name in HYBRIDS)
    assert (own.name, own.numerics.stem_units, own.image_hw) == ("vit_base_r50_s16_224", (2, 1), (32, 32))
    assert (named.name, named.numerics.stem_units, named.image_hw) == ("vit_tiny_r_s16_p8_224", None, (64, 64))


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
    whole |= {"pre_logits/kernel": np.zeros((24, 7), np.float32), "pre_logits/bias": np.zeros(7, np.float32)}
    del whole["head/bias"]
    with pytest.raises(UserError, match=r"2 missing: blocks\.1\.norm2\.weight, head\.fc\.bias"):
        build(read_jax_npz(write(tmp_path / "b.npz", whole)))


POSITIONS = "Transformer/posembed_input/pos_embedding"
KEY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/kernel"


def damaged(path: Path, how: str) -> None:
    arrays = jax_arrays(small().state_dict(), 3)
    contents = {"empty": b"", "text": b"<html>not found</html>", "pickled": pickle.dumps({"embedding/kernel": 1})}
    others: dict[str, dict[str, Any]] = {
        "objects": {"embedding/kernel": np.array([{}], dtype=object)},
        "foreign": {"a": np.zeros(2)},
        "nothing": {},
        "bent": arrays | {"embedding/kernel": arrays["embedding/kernel"][0]},
        "oblong": arrays | {POSITIONS: arrays[POSITIONS][:, :-2]},
        "another key": arrays | {KEY: np.zeros((20, 3, 8), np.float32)},
        "no blocks": {name: array for name, array in arrays.items() if "encoderblock" not in name},
    }
    write(path, others.get(how, arrays))
    whole = path.read_bytes()
    if how == "single":
        with path.open("wb") as file:
            np.save(file, arrays["cls"])
    elif how in ("truncated", "flipped"):
        middle = len(whole) // 2
        rest = b"" if how == "truncated" else bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
        path.write_bytes(whole[:middle] + rest)
    elif how in contents:
        path.write_bytes(contents[how])


REASONS = {
    "missing": r"weights\.npz is not there",
    "empty": "it is empty",
    "text": "pickle|no .npz",
    "pickled": "pickle",
    "objects": "pickle",
    "truncated": "cannot be read as .npz",
    "flipped": "cannot be read as .npz",
    "single": "single array",
    "foreign": "it holds a, ",
    "nothing": "it holds nothing",
    "bent": "not those of a ViT",
    "oblong": "15 position embeddings .* no square grid",
    "another key": "shapes that no ViT has: .*attn.key.weight",
    "no blocks": "not those of a ViT",
}


@pytest.mark.parametrize(("how", "reason"), REASONS.items(), ids=REASONS)
def test_damaged_files_are_refused_in_a_line(how: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    if how != "missing":
        damaged(path, how)
    with pytest.raises(UserError, match=reason) as caught:
        read_jax_npz(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
