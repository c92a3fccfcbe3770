"""The official checkpoints of google-research/vision_transformer, `.npz` files of JAX arrays.

read the arrays -> infer the architecture from names and shapes -> hand every array over under timm's name
"""

import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import numpy as np
import timm
import torch
from torch import Tensor

from mpp.errors import UserError
from mpp.weights.base import Numerics, Weights

Arrays = Mapping[str, np.ndarray]

_SHOWN = 5  # names that a complaint lists
_PREFIXES = ("opt/target/", "params/")
_EMBEDDING = "embedding/kernel"
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_ATTENTION = "MultiHeadDotProductAttention_1"
_SIZES = {  # width, blocks, heads
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}
_HYBRIDS = {  # by units per stage: timm's name, width, blocks, heads, patch
    (): ("vit_tiny_r_s16_p8_224", 192, 12, 3, 8),
    (2, 2, 2, 2): ("vit_small_r26_s32_224", 384, 12, 6, 1),
    (3, 4, 9): ("vit_base_r50_s16_224", 768, 12, 12, 1),
    (3, 4, 6, 3): ("vit_large_r50_s32_224", 1024, 24, 16, 1),
}


@dataclass(frozen=True)
class _Shape:
    """What names and shapes of a checkpoint tell."""

    dim: int
    depth: int
    heads: int
    mlp: int
    patch: tuple[int, int]
    in_chans: int
    units: tuple[int, ...] | None
    """Of a hybrid's ResNet, per stage; None: not a hybrid."""


def read_jax_npz(path: Path) -> Weights:
    """A checkpoint of google-research/vision_transformer: ViTs and hybrids, fine-tuned or not.

    Names may stand under "opt/target/" (then the optimiser's state is left) or "params/". The input is square, its size
    what the position embeddings are for, with values in [-1, 1]. Checkpoints name no classes: they are "0", "1", ....
    `pre_logits` becomes the hidden layer of the head; without a head over it, it is left out.

    Raises:
        UserError: a file that cannot be read, or is something else; names that are missing or unknown are listed.
    """
    arrays = _under_prefix(_read(path))
    if not {_EMBEDDING, _POSITIONS} <= set(arrays):
        found = ", ".join(sorted(arrays)[:_SHOWN]) or "nothing"
        raise UserError(f"{path} is not a checkpoint of google-research/vision_transformer: it holds {found}, ...")
    try:
        shape = _shape(arrays)
        has_class_token, has_head = "cls" in arrays, "head/kernel" in arrays
        representation = arrays["pre_logits/kernel"].shape[1] if has_head and "pre_logits/kernel" in arrays else None
        name, args, units = _architecture(shape)
        grid = math.isqrt(arrays[_POSITIONS].shape[1] - has_class_token)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: names and shapes are not those of a ViT ({str(error) or repr(error)})") from error
    if grid**2 != arrays[_POSITIONS].shape[1] - has_class_token:
        count = arrays[_POSITIONS].shape[1]
        raise UserError(f"{path}: {count} position embeddings (class token: {has_class_token}) are no square grid")
    stride = 1 if shape.units is None else 4 * 2 ** max(len(shape.units) - 1, 0)
    return Weights(
        name=name,
        args=args | ({} if has_class_token else {"class_token": False}),
        state=_state(path, arrays, shape, representation is not None),
        image_hw=(grid * stride * shape.patch[0], grid * stride * shape.patch[1]),
        in_chans=shape.in_chans,
        pool="token" if has_class_token else "avg",
        classes=tuple(str(i) for i in range(arrays["head/kernel"].shape[-1])) if has_head else None,
        representation=representation,
        numerics=Numerics(original_stem=shape.units is not None, stem_units=units),
        origin=str(path),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            opened = np.load(file, allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an .npz of many; take the checkpoint itself")
            arrays = {name: opened[name] for name in opened.files}
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    # Whatever numpy, zipfile and zlib raise for a file that is cut off, pickled or something else.
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if path.is_file() and path.stat().st_size == 0:
            reason = "it is empty"
        elif "pickle" in reason.lower():
            reason = "it is a pickle, which could run code, or no .npz at all"
        raise UserError(f"{path} cannot be read as .npz: {reason}; download it again if it was cut off") from error
    return arrays


def _under_prefix(arrays: Arrays) -> Arrays:
    for prefix in _PREFIXES:
        if prefix + _EMBEDDING in arrays:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return arrays


def _shape(arrays: Arrays) -> _Shape:
    blocks = [int(found[1]) for name in arrays if (found := re.match(r"Transformer/encoderblock_(\d+)/", name))]
    units = None
    if "conv_root/kernel" in arrays:
        stages: dict[int, int] = {}
        for name in arrays:
            if found := re.match(r"block(\d+)/unit(\d+)/", name):
                stage, unit = int(found[1]), int(found[2])
                stages[stage] = max(stages.get(stage, 0), unit)
        units = tuple(stages[stage] for stage in range(1, len(stages) + 1))
        if arrays["conv_root/kernel"].shape[3] != 64:
            raise ValueError(f"a root convolution of {arrays['conv_root/kernel'].shape[3]} channels instead of 64")
    height, width, _, dim = arrays[_EMBEDDING].shape
    first = "Transformer/encoderblock_0/"
    _, heads, _ = arrays[f"{first}{_ATTENTION}/query/kernel"].shape
    _, mlp = arrays[f"{first}MlpBlock_3/Dense_0/kernel"].shape
    in_chans = arrays[_EMBEDDING if units is None else "conv_root/kernel"].shape[2]
    return _Shape(dim, max(blocks) + 1, heads, mlp, (height, width), in_chans, units)


def _architecture(shape: _Shape) -> tuple[str, dict[str, Any], tuple[int, ...] | None]:
    """timm's name, its arguments, and the units per stage of a stem that timm has no name for."""
    args: dict[str, Any] = {"act_layer": "gelu_tanh"}
    size = (shape.dim, shape.depth, shape.heads)
    square = shape.patch[0] == shape.patch[1]
    units = None
    if shape.units is None:
        name = f"vit_{_SIZES.get(size)}_patch{shape.patch[0]}_224"
        exact = square and timm.is_model(name)
        name = name if exact else "vit_base_patch16_224"
    elif shape.units in _HYBRIDS:
        name, *rest = _HYBRIDS[shape.units]
        exact = square and (*size, shape.patch[0]) == tuple(rest)
    else:
        name, units, exact = "vit_base_r50_s16_224", shape.units, False
    if exact and shape.mlp == 4 * shape.dim:
        return name, args, None
    ratio = shape.mlp / shape.dim
    if int(shape.dim * ratio) != shape.mlp:  # timm rounds down, and so may the division have been
        ratio = (shape.mlp + 0.5) / shape.dim
    args |= {"patch_size": shape.patch[0] if square else list(shape.patch), "embed_dim": shape.dim}
    return name, args | {"depth": shape.depth, "num_heads": shape.heads, "mlp_ratio": ratio}, units


def _state(path: Path, arrays: Arrays, shape: _Shape, tanh: bool) -> dict[str, Tensor]:
    """All arrays under timm's names."""
    places = _places(arrays, shape, tanh)
    known = {source for sources, _ in places.values() for source in sources}
    # Without a head over it, the hidden layer has no place.
    ignored = {"pre_logits/kernel", "pre_logits/bias"} if "head/kernel" not in arrays else set()
    wrong = {
        "missing": [name for name in sorted(known) if name not in arrays],
        "unexpected": [name for name in arrays if name not in known | ignored],
        "not of floating point": [name for name in sorted(known & set(arrays)) if arrays[name].dtype.kind != "f"],
    }
    if any(wrong.values()):
        told = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for kind, names in wrong.items()
            if names
        )
        raise UserError(f"{path}: not the weights of a ViT of {shape.depth} blocks ({told})")
    state = {}
    for name, (sources, change) in places.items():
        try:
            parts = [change(torch.from_numpy(arrays[source].astype(np.float32))) for source in sources]
            state[name] = torch.cat(parts).contiguous()
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{source} {arrays[source].shape}" for source in sources)
            raise UserError(f"{path}: a shape that no ViT has: {shapes}") from error
    return state


_Change = Callable[[Tensor], Tensor]


def _places(arrays: Arrays, shape: _Shape, tanh: bool) -> dict[str, tuple[list[str], _Change]]:
    """By timm's name: the JAX names, whose arrays are changed and then stacked along the first axis."""
    places: dict[str, tuple[list[str], _Change]] = {
        "pos_embed": ([_POSITIONS], _same),
        "patch_embed.proj.weight": ([_EMBEDDING], _convolution),
        "patch_embed.proj.bias": (["embedding/bias"], _same),
    }
    if "cls" in arrays:
        places["cls_token"] = (["cls"], _same)

    def add(ours: str, theirs: str, change: _Change, weight: str = "kernel") -> None:
        places[f"{ours}.weight"] = ([f"{theirs}/{weight}"], change)
        places[f"{ours}.bias"] = ([f"{theirs}/bias"], torch.flatten)

    for i in range(shape.depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        heads = [f"{theirs}/{_ATTENTION}/{name}" for name in ("query", "key", "value")]
        add(f"{ours}.norm1", f"{theirs}/LayerNorm_0", _same, "scale")
        places[f"{ours}.attn.qkv.weight"] = ([f"{name}/kernel" for name in heads], _into_heads)
        places[f"{ours}.attn.qkv.bias"] = ([f"{name}/bias" for name in heads], torch.flatten)
        add(f"{ours}.attn.proj", f"{theirs}/{_ATTENTION}/out", _out_of_heads)
        add(f"{ours}.norm2", f"{theirs}/LayerNorm_2", _same, "scale")
        add(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_3/Dense_0", torch.t)
        add(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_3/Dense_1", torch.t)
    add("norm", "Transformer/encoder_norm", _same, "scale")
    if shape.units is not None:
        _add_stem(places, shape.units)
    if "head/kernel" in arrays:
        add("head.fc" if tanh else "head", "head", torch.t)
        if tanh:
            add("head.pre_logits", "pre_logits", torch.t)
    return places


def _add_stem(places: dict[str, tuple[list[str], _Change]], units: tuple[int, ...]) -> None:
    def add(ours: str, conv: str, norm: str, their_conv: str, their_norm: str) -> None:
        places[f"{ours}{conv}.weight"] = ([f"{their_conv}/kernel"], _convolution)
        places[f"{ours}{norm}.weight"] = ([f"{their_norm}/scale"], torch.flatten)
        places[f"{ours}{norm}.bias"] = ([f"{their_norm}/bias"], torch.flatten)

    backbone = "patch_embed.backbone."
    add(f"{backbone}stem." if units else backbone, "conv", "norm", "conv_root", "gn_root")
    for stage, count in enumerate(units):
        for unit in range(count):
            ours, theirs = f"{backbone}stages.{stage}.blocks.{unit}.", f"block{stage + 1}/unit{unit + 1}/"
            for i in "123":
                add(ours, f"conv{i}", f"norm{i}", f"{theirs}conv{i}", f"{theirs}gn{i}")
            if unit == 0:
                add(f"{ours}downsample.", "conv", "norm", f"{theirs}conv_proj", f"{theirs}gn_proj")


def _same(x: Tensor) -> Tensor:
    return x


def _convolution(kernel_HWIO: Tensor) -> Tensor:
    return kernel_HWIO.permute(3, 2, 0, 1)


def _into_heads(kernel_DHE: Tensor) -> Tensor:
    return kernel_DHE.flatten(1).T


def _out_of_heads(kernel_HED: Tensor) -> Tensor:
    return kernel_HED.flatten(0, 1).T
