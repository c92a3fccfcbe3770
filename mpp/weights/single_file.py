"""Weights in a single file of tensors, .safetensors, .pth, .pt or .bin, under the names of several libraries.

all tensors in the file -> those of one model, found by its patch embedding -> timm's names -> architecture by shapes
"""

import argparse
import math
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from mpp.dist import world_from_environment
from mpp.errors import UserError
from mpp.model.encoder import is_vit
from mpp.system.meta_device import on_meta
from mpp.weights.base import Weights, create, list_names, misfits
from mpp.weights.numerics import named_vit

_PATCHES = ("patch_embed.proj.weight", "conv_proj.weight")  # timm's, DINO's and MAE's name; torchvision's
_TIMM_NAMES = (  # replaced in this order
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 trains its blocks in chunks
    (r"^class_token$", "cls_token"),  # from here on torchvision
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # by width, where it is not width / 64
_GIANT = (1536, 40)  # DINOv2's width and blocks of SwiGLU
_OF_ENCODER = re.compile(r"(blocks|patch_embed|norm|fc_norm|norm_pre|ln_pre|rel_pos|rope|.*pos_emb|.*tokens?)\b")
_OF_TRAINING = re.compile(r"mask_token|decoder")
_FOUND_FIRST, _FOUND_LAST = {"teacher", "ema"}, {"student"}


def read_single_file(path: Path, named: Weights | None = None) -> Weights:
    """Reads the weights of one model, named as by timm, DINO, DINOv2, MAE, torchvision's ViT or lightly-train's export.

    Of a whole checkpoint the model is found at whatever depth: the teacher or moving average where there is one.
    Heads of the pretraining, decoders and optimisers are left out, and a note on stderr says which names. Without
    `named`, a timm architecture without weights, the file must hold a plain ViT: width, depth, patch and MLP are those
    of its shapes, heads the width / 64 but for known sizes, and the input that of the positions. Files say nothing of
    normalisation: it is that of `named`, else ImageNet's for 3 channels.

    Raises:
        UserError: no file of tensors; no such model, or not all of it: names and shapes that do not fit are listed.
    """
    tensors = dict(_flat(_content(path)))
    prefix, theirs = _one_model(path, tensors, named)
    ours = _timm_name if named is None or is_vit(named.name) else str  # blocks.0.1. is a stage's in others
    state = {ours(name): value.float() if value.is_floating_point() else value for name, value in theirs.items()}
    try:
        weights = _architecture(state) if named is None else _sized(named, state)
    except (KeyError, IndexError, ValueError) as error:
        what = str(error) if isinstance(error, ValueError) else f"it lacks {error}"
        raise UserError(f"{path}: names and shapes are not those of a plain ViT ({what}); {_hint(path)}") from error
    weights = replace(weights, state=state, origin=str(path))
    classes = _classes(weights.name, state)
    with on_meta():
        model = create(weights, num_classes=len(classes or ()))
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    wanted = model.state_dict()
    wrong = misfits(wanted, state)
    left_over = wrong.pop("unexpected")
    wrong["unexpected"] = [name for name in left_over if _OF_ENCODER.match(name) and not _OF_TRAINING.match(name)]
    if problems := list_names(wrong):
        hint = _hint(path) if named is None else "leave out the name to take the architecture by shapes"
        raise UserError(f"{path} does not hold a whole {weights.name}: {problems}; {hint}")
    if world_from_environment().main:
        sizes = ", ".join(f"{key} {value}" for key, value in weights.args.items())
        found = (
            f"{weights.name}{f' ({sizes})' if sizes else ''}, {len(wanted)} tensors{f' of {prefix}*' * bool(prefix)}"
        )
        left = f"; left out {list_names({'others': left_over})}" if left_over else ""
        print(f"note: {path} is read as {found}{left}", file=sys.stderr)
    return replace(weights, state={name: state[name] for name in wanted}, classes=classes)


def _content(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of settings, beside the weights of many
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise half a dozen kinds, depending on where the bytes end
        found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = "truncated, or no file of tensors; download it again, or save a state_dict()"
        if found:
            reason = f"a pickle of {found[1]}, which could run code; save its state_dict() alone"
        raise UserError(f"cannot read the weights {path}: {reason}") from error


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries, by their keys joined with dots."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, Tensor):
        yield prefix, content


def _one_model(path: Path, tensors: Mapping[str, Tensor], named: Weights | None) -> tuple[str, dict[str, Tensor]]:
    """What stands before the names of the model, and its tensors without it."""
    marks = _PATCHES
    if named is not None and not is_vit(named.name):
        with on_meta():
            marks = (next(iter(create(named).state_dict())),)
    found = {name.removesuffix(mark) for name in tensors for mark in marks if name == mark or name.endswith(f".{mark}")}
    if not found:
        names = ", ".join(list(tensors)[:3]) or "none"
        if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors):
            raise UserError(f"{path} has Hugging Face's names: give the folder in which it lies beside its config.json")
        raise UserError(f"{path} holds no {' or '.join(marks)} ({len(tensors)} tensors: {names}); {_hint(path)}")

    def order(prefix: str) -> tuple[int, int, str]:
        words = {*re.split("[._]", prefix.lower())}
        return (0 if words & _FOUND_FIRST else 2 if words & _FOUND_LAST else 1), len(prefix), prefix

    prefix = min(found, key=order)
    return prefix, {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _timm_name(name: str) -> str:
    for pattern, ours in _TIMM_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _hint(path: Path) -> str:
    return f"of another architecture, give timm's name of it, --init NAME:{path}"


def _architecture(state: Mapping[str, Tensor]) -> Weights:
    """By names and shapes. KeyError, IndexError, ValueError: not a plain ViT's."""
    dim, channels, height, width = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name)))
    registers = next((state[name].shape[1] for name in ("register_tokens", "reg_token") if name in state), 0)
    heads = _HEADS.get(dim, dim // 64)
    two, down = ("w12", "w3") if "blocks.0.mlp.w12.weight" in state else ("fc1", "fc2")
    mlp, hidden = state[f"blocks.0.mlp.{two}.weight"].shape[0], state[f"blocks.0.mlp.{down}.weight"].shape[1]
    if mlp == 2 * hidden:
        if (dim, depth, height, width) != (*_GIANT, 14, 14):
            raise ValueError("a SwiGLU MLP")
        name, args = f"vit_giant_patch14_{'reg4_' * bool(registers)}dinov2", dict[str, Any]()
    else:
        if _HEADS.get(dim) is None and dim % 64:
            raise ValueError(f"a width of {dim}, whose heads are unknown")
        name, args = named_vit(height if height == width else [height, width], dim, depth, heads, mlp)
        others = {
            "class_token": "cls_token" in state,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "pre_norm": "norm_pre.weight" in state,
            "qk_norm": "blocks.0.attn.q_norm.weight" in state,
            "reg_tokens": registers,
            "init_values": 1e-5 if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & {*state} else None,
            "no_embed_class": _positions(state)[1],
        }
        plain = {"class_token": True, "qkv_bias": True, "pre_norm": False, "qk_norm": False}
        plain |= {"reg_tokens": 0, "init_values": None, "no_embed_class": False}
        args |= {key: value for key, value in others.items() if value != plain[key]}
    weights = Weights(name, args, None, (height, width), channels, *_normalisation(channels))
    return _sized(replace(weights, pool="token" if "cls_token" in state else "avg"), state)


def _sized(weights: Weights, state: Mapping[str, Tensor]) -> Weights:
    """For images of the size that the positions are for, where there are any. ValueError: these are no square grid."""
    if "pos_embed" not in state or not is_vit(weights.name):
        return weights
    if "fc_norm.weight" in state:  # as MAE fine-tunes
        weights = replace(weights, pool="avg")
    side = math.isqrt(_positions(state)[0])
    _, _, height, width = state["patch_embed.proj.weight"].shape
    if any(name.startswith("patch_embed.backbone.") for name in state):  # of a hybrid, whose stem has a stride, too
        with on_meta():
            rows, columns = create(weights).get_submodule("patch_embed").grid_size
        height, width = weights.image_hw[0] // rows, weights.image_hw[1] // columns
    return replace(weights, image_hw=(side * height, side * width))


def _positions(state: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Number of patches with a position, and whether the class and register tokens have none in timm's model."""
    count = state["pos_embed"].shape[1]
    tokens = [state[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in state]
    for own in (sum(tokens), 0):
        if math.isqrt(count - own) ** 2 == count - own:
            return count - own, (own == 0 and bool(tokens)) or "register_tokens" in state
    raise ValueError(f"{count} position embeddings, which are no square grid")


def _normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else ((0.5,), (0.5,))


def named_architecture(name: str, weights: Weights) -> Weights:
    """The architecture that a file is said to have, with the normalisation of the name's tag, or ImageNet's."""
    mean, std = _normalisation(weights.in_chans)
    if "." not in name:
        return replace(weights, mean=mean, std=std)
    config: Any = timm.get_pretrained_cfg(name)
    return replace(weights, mean=tuple(config.mean), std=tuple(config.std))


def _classes(name: str, state: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """Numbers for the classes of a linear head; None where there is none."""
    head = timm.get_pretrained_cfg(name).classifier or "head"  # pyright: ignore[reportOptionalMemberAccess]
    weight = state.get(f"{head}.weight")
    if weight is None or weight.ndim != 2 or f"{head}.bias" not in state:
        return None
    return tuple(map(str, range(len(weight))))
