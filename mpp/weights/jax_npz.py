"""The official checkpoints of google-research/vision_transformer, `.npz` files of JAX arrays.

read the arrays -> infer the architecture from names and shapes -> give every array timm's name and layout
"""

import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import numpy as np
import torch
from torch import Tensor

from mpp.errors import UserError
from mpp.weights.base import Weights, list_names
from mpp.weights.numerics import Numerics, named_vit, vit_args

_EMBEDDING = "embedding/kernel"
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_HYBRIDS = {  # by units per stage: timm's name, width, blocks, heads, patch
    (): ("vit_tiny_r_s16_p8_224", 192, 12, 3, 8),
    (2, 2, 2, 2): ("vit_small_r26_s32_224", 384, 12, 6, 1),
    (3, 4, 9): ("vit_base_r50_s16_224", 768, 12, 12, 1),
    (3, 4, 6, 3): ("vit_large_r50_s32_224", 1024, 24, 16, 1),
}
_BLOCK, _ATTENTION = r"Transformer/encoderblock_(\d+)", "MultiHeadDotProductAttention_1"
_STEM, _UNIT = "patch_embed.backbone.{stem}", r"block(\d+)/unit(\d+)"
_OUR_UNIT = "patch_embed.backbone.stages.{0}.blocks.{1}."
_ARRAYS = {"cls": "cls_token", _POSITIONS: "pos_embed"}
_LAYERS = {  # JAX's name: timm's
    "embedding": "patch_embed.proj",
    f"{_BLOCK}/LayerNorm_0": "blocks.{0}.norm1",
    f"{_BLOCK}/{_ATTENTION}/(query|key|value|out)": "blocks.{0}.attn.{1}",
    f"{_BLOCK}/LayerNorm_2": "blocks.{0}.norm2",
    f"{_BLOCK}/MlpBlock_3/Dense_0": "blocks.{0}.mlp.fc1",
    f"{_BLOCK}/MlpBlock_3/Dense_1": "blocks.{0}.mlp.fc2",
    "Transformer/encoder_norm": "norm",
    "conv_root": _STEM + "conv",
    "gn_root": _STEM + "norm",
    f"{_UNIT}/conv([123])": _OUR_UNIT + "conv{2}",
    f"{_UNIT}/gn([123])": _OUR_UNIT + "norm{2}",
    f"{_UNIT}/conv_proj": _OUR_UNIT + "downsample.conv",
    f"{_UNIT}/gn_proj": _OUR_UNIT + "downsample.norm",
    "head": "head",
    "pre_logits": "head.pre_logits",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def read_jax_npz(path: Path) -> Weights:
    """Reads a checkpoint of google-research/vision_transformer: ViTs and hybrids, fine-tuned or not.

    Names may stand under "opt/target/" (then the optimiser's state is left) or "params/". The input is square, its size
    by the number of position embeddings, with values in [-1, 1]. Checkpoints name no classes: they are "0", "1", ....
    `pre_logits` becomes the hidden layer of the head; without a head over it, it is left out.

    Raises:
        UserError: a file that cannot be read, or is something else; unknown names are listed.
    """
    arrays = _read(path)
    if not {_EMBEDDING, _POSITIONS} <= set(arrays):
        found = ", ".join(sorted(arrays)[:5]) or "nothing"
        raise UserError(f"{path} is not a checkpoint of google-research/vision_transformer: it holds {found}, ...")
    has_class_token, has_head = "cls" in arrays, "head/kernel" in arrays
    if not has_head:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("pre_logits/")}
    try:
        units = _stem_units(arrays)
        name, args = _architecture(arrays, units)
        height, width, channels, _ = arrays[_EMBEDDING].shape
        count = arrays[_POSITIONS].shape[1]
        representation = arrays["pre_logits/kernel"].shape[1] if "pre_logits/kernel" in arrays else None
        if units is not None:
            channels = arrays["conv_root/kernel"].shape[2]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: names and shapes are not those of a ViT ({str(error) or repr(error)})") from error
    grid = math.isqrt(count - has_class_token)
    if grid**2 != count - has_class_token:
        raise UserError(f"{path}: {count} position embeddings (class token: {has_class_token}) are no square grid")
    stride = 1 if units is None else 4 * 2 ** max(len(units) - 1, 0)
    return Weights(
        name=name,
        args=args if has_class_token else {**args, "class_token": False},
        state=_state(path, arrays, "" if units == () else "stem.", representation is not None),
        image_hw=(grid * stride * height, grid * stride * width),
        in_chans=channels,
        pool="token" if has_class_token else "avg",
        classes=tuple(str(i) for i in range(arrays["head/kernel"].shape[-1])) if has_head else None,
        representation=representation,
        numerics=Numerics(original_stem=units is not None, stem_units=None if units in _HYBRIDS else units),
        origin=str(path),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the model, their names without prefix."""
    try:
        with path.open("rb") as file:
            opened = np.load(file, allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an .npz of many; take the checkpoint itself")
            arrays = {name: opened[name] for name in opened.files}
    # Whatever numpy, zipfile and zlib raise for a file that is cut off, pickled or something else.
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if path.is_file() and path.stat().st_size == 0:
            reason = "it is empty"
        elif "pickle" in reason.lower():
            reason = "it is a pickle, which could run code, or no .npz at all"
        raise UserError(f"{path} cannot be read as .npz: {reason}; download it again if it was cut off") from error
    prefix = next((prefix for prefix in ("opt/target/", "params/") if prefix + _EMBEDDING in arrays), "")
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _stem_units(arrays: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
    """Units per stage of a hybrid's ResNet; None if it is no hybrid."""
    if "conv_root/kernel" not in arrays:
        return None
    stages: dict[int, int] = {}
    for name in arrays:
        if found := re.match(_UNIT, name):
            stage, unit = int(found[1]), int(found[2])
            stages[stage] = max(stages.get(stage, 0), unit)
    return tuple(stages[stage] for stage in range(1, len(stages) + 1))


def _architecture(arrays: Mapping[str, np.ndarray], units: tuple[int, ...] | None) -> tuple[str, dict[str, Any]]:
    """timm's name and its arguments."""
    depth = 1 + max(int(found[1]) for name in arrays if (found := re.match(_BLOCK, name)))
    height, width, _, dim = arrays[_EMBEDDING].shape
    _, heads, _ = arrays[f"Transformer/encoderblock_0/{_ATTENTION}/query/kernel"].shape
    _, mlp = arrays["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape
    patch = height if height == width else [height, width]
    if units is None:
        name, args = named_vit(patch, dim, depth, heads, mlp)
    else:
        name, *sizes = _HYBRIDS.get(units, ("vit_base_r50_s16_224",))
        known = sizes == [dim, depth, heads, patch] and mlp == 4 * dim
        args = {} if known else vit_args(patch, dim, depth, heads, mlp)
    return name, {"act_layer": "gelu_tanh"} | args


def _state(path: Path, arrays: Mapping[str, np.ndarray], stem: str, tanh: bool) -> dict[str, Tensor]:
    """All arrays under timm's names, in timm's layout."""
    names = {name: _timm_name(name, stem) for name in arrays}
    wrong = {
        "unexpected": [name for name, ours in names.items() if ours is None],
        "not of floating point": [name for name, array in arrays.items() if array.dtype.kind != "f"],
    }
    if any(wrong.values()):
        raise UserError(f"{path}: not the weights of a ViT ({list_names(wrong)})")
    state: dict[str, Tensor] = {}
    for name, ours in names.items():
        try:
            state[str(ours)] = _timm_layout(name, torch.from_numpy(arrays[name].astype(np.float32)))
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path}: a shape that no ViT has: {name} {arrays[name].shape}") from error
    for name in [name for name in state if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            try:
                state[name.replace("query", "qkv")] = torch.cat([state[part] for part in parts])
            except RuntimeError as error:
                shapes = ", ".join(f"{part} {tuple(state[part].shape)}" for part in parts)
                raise UserError(f"{path}: shapes that no ViT has: {shapes}") from error
            for part in parts:
                del state[part]
    if tanh:
        state = {re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name): x for name, x in state.items()}
    return state


def _timm_name(name: str, stem: str) -> str | None:
    layer, _, leaf = name.rpartition("/")
    for pattern, ours in _LAYERS.items():
        if (found := re.fullmatch(pattern, layer)) and leaf in _LEAVES:
            numbers = list(found.groups())
            if pattern.startswith(_UNIT):  # JAX counts stages and units from 1
                numbers[:2] = [int(number) - 1 for number in numbers[:2]]
            ours = ours.format(*numbers, stem=stem).replace("attn.out", "attn.proj")
            return f"{ours}.{_LEAVES[leaf]}"
    return _ARRAYS.get(name)


def _timm_layout(name: str, x: Tensor) -> Tensor:
    if name in _ARRAYS:
        return x
    if not name.endswith("/kernel"):
        return x.flatten()
    if x.ndim == 4:  # of a convolution: height, width, in, out
        return x.permute(3, 2, 0, 1).contiguous()
    if x.ndim == 3:  # of attention: in, heads, width of a head; or heads, width, out
        x = x.flatten(0, 1) if name.endswith("/out/kernel") else x.flatten(1)
    return x.t().contiguous()
