"""Folders that timm loads: config.json and model.safetensors, in and out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg
from torch import Tensor

from mpp.data.settings import DecodeOptions, Framing
from mpp.errors import UserError
from mpp.model.encoder import Encoder, model_args
from mpp.model.settings import ModelConfig
from mpp.system.files import whole_folder
from mpp.system.process import global_draws
from mpp.weights.base import Weights, create, load
from mpp.weights.numerics import Numerics, numerics_from, read_init_args

HEAD_FILE = "head.safetensors"
"""A head with a hidden layer, which timm does not have, lies beside the model, which timm then loads headless."""
_OURS = "mpp"  # key of config.json with our additions to timm's
_SET_BY_US = ("num_classes", "in_chans", "global_pool", "img_size", "fc_norm", "drop_path_rate")


def timm_state(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's weights under timm's names, a 2-D position embedding written out as timm's table."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.vit.state_dict().items()}
    if encoder.position is not None:
        table = encoder.position().detach().float().cpu()
        if not encoder.vit.no_embed_class:  # then timm's table has rows for the class and register tokens too
            table = torch.cat([table.new_zeros(encoder.num_prefix_tokens, table.shape[1]), table])
        state["pos_embed"] = table[None].contiguous()
    return state


def encoder_weights(
    encoder: Encoder,
    config: ModelConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    reading: DecodeOptions,
    origin: str = "",
    init_args: Sequence[str] = (),
) -> Weights:
    """A pretrained encoder as weights, headless; its input has `mean` and `std` on a 0 to 1 scale.

    It pools the patch tokens by their mean: masked patch prediction never trains the class token. `init_args` are the
    part of the architecture that `config` cannot say (see `read_init_args`).
    """
    args, numerics = read_init_args(init_args)
    return Weights(
        config.name,
        model_args(config) | args,
        timm_state(encoder),
        config.image_hw,
        config.in_chans,
        mean,
        std,
        numerics=numerics,
        origin=origin,
        value_range=reading.value_range,
        background=reading.background,
    )


def save_timm_folder(
    encoder: Encoder,
    config: ModelConfig,
    folder: Path,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    reading: DecodeOptions = DecodeOptions(),  # noqa: B008  (frozen)
) -> None:
    """Writes a pretrained encoder as a folder for timm (see `encoder_weights` and `write_timm_folder`)."""
    write_timm_folder(encoder_weights(encoder, config, mean, std, reading, str(folder)), folder)


def write_timm_folder(weights: Weights, folder: Path) -> list[str]:
    """Writes `folder` so that `timm.create_model(f"local-dir:{folder}", pretrained=True)` gives this model.

    An earlier folder of that name is replaced once all is written.

    Returns what timm alone does not read of these weights, in sentences; mpp reads all of it back.
    """
    state = weights.state or {}
    tanh, units = weights.representation is not None, weights.numerics.stem_units
    names = None if tanh else weights.classes
    with global_draws():
        model = create(weights, num_classes=len(names or ()), plain=True)
    head = {name: value.contiguous() for name, value in state.items() if tanh and name.startswith("head.")}
    load(model, {k: v for k, v in state.items() if k not in head}, weights.label, head=names is not None)
    notes, ours = [], {"numerics": asdict(weights.numerics)}
    if weights.reading.pixel_settings != DecodeOptions(weights.in_chans).pixel_settings:
        ours |= {"value_range": list(weights.value_range), "background": list(weights.background)}
    if tanh:
        ours |= {"representation": weights.representation, "classes": list(weights.classes or ())}
        notes.append(f"the head's hidden tanh layer is in {HEAD_FILE}, which timm does not read: it loads headless")
    if weights.multi_label:
        ours |= {"multi_label": True}
        notes.append("an image may have several classes: take the sigmoid of timm's logits, not the softmax")
    if units is not None:
        notes.append(f"timm has no hybrid with the stem units {list(units)}: only mpp reads this folder")
    elif weights.numerics != Numerics():
        notes.append(
            f"timm computes with other constants than the original, {weights.numerics}: expect small differences"
        )
    data_config = {
        "input_size": (weights.in_chans, *weights.image_hw),
        "interpolation": weights.interpolation,
        "crop_pct": weights.crop_pct,
        "crop_mode": weights.crop_mode,
        "mean": per_channel(weights.mean, weights.in_chans),
        "std": per_channel(weights.std, weights.in_chans),
    }
    # The name's default entry describes somebody else's weights.
    own = dict.fromkeys(("license", "url", "hf_hub_id", "test_input_size", "test_crop_pct")) | {"tag": "mpp"}
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    # Of models that timm has a name for, it knows the arguments itself.
    args = None if units is None else {**weights.args, "img_size": list(weights.image_hw), "in_chans": weights.in_chans}
    config = {_OURS: ours} | ({"label_names": list(names)} if names else {})
    with whole_folder(folder) as temporary:
        timm.models.save_for_hf(model, str(temporary), config, args, safe_serialization=True, data_config=data_config)
        if head:
            save_file(head, temporary / HEAD_FILE)
    return notes


def read_timm_folder(folder: Path) -> Weights:
    """Reads what `write_timm_folder`, or timm itself, wrote.

    Raises:
        UserError: files that are missing, damaged or of another kind.
    """
    config = read_json(folder / "config.json")
    args = dict(config.get("model_args") or {})
    # timm's older folders have one dictionary for both.
    default: Mapping[str, Any] = (config.get("pretrained_cfg") or {}) if "pretrained_cfg" in config else config
    name = str(config.get("architecture", ""))
    if not timm.is_model(name):
        raise UserError(f"{folder / 'config.json'}: timm {timm.__version__} has no architecture {name!r}")
    size = default.get("input_size") or (3, 224, 224)
    side = args.get("img_size") or size[1:]
    height, width = (side, side) if isinstance(side, int) else side
    channels = int(args.get("in_chans") or size[0])
    ours: Mapping[str, Any] = config.get(_OURS) or {}
    classes, state = _class_names(config), read_tensors(folder, ("model.safetensors", "pytorch_model.bin"))
    if ours.get("representation"):
        classes, state = tuple(ours["classes"]), {**state, **read_tensors(folder, (HEAD_FILE,))}
    # timm's defaults, for folders of timm's that leave something out; they are for colour images.
    timms = PretrainedCfg()
    mean, std = (timms.mean, timms.std) if _OURS not in config and channels == len(timms.mean) else ((0.5,), (0.5,))
    return Weights(
        name,
        {key: value for key, value in args.items() if key not in _SET_BY_US},
        state,
        (int(height), int(width)),
        channels,
        tuple(default.get("mean") or mean),
        tuple(default.get("std") or std),
        str(config.get("global_pool") or "avg"),
        classes,
        ours.get("representation"),
        numerics_from(ours.get("numerics") or {}),
        str(folder),
        tuple(ours.get("value_range") or ()),
        tuple(ours.get("background") or (255,)),
        **timm_framing(default, folder / "config.json"),
        multi_label=bool(ours.get("multi_label")),
    )


def timm_framing(config: Mapping[str, Any], origin: str | Path) -> dict[str, Any]:
    """The evaluation settings of a timm config, as `Weights` has them, with timm's own defaults.

    Raises UserError for settings that are not timm's.
    """
    timms = PretrainedCfg()
    framing = {key: config.get(key) or getattr(timms, key) for key in ("crop_pct", "interpolation", "crop_mode")}
    try:
        Framing(**framing)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: {error}") from error
    return framing


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Of the head; numbers if the folder has no names; None without a head."""
    count = int(config.get("num_classes") or 0)
    names = config.get("label_names") or config.get("labels")  # in older ones
    if isinstance(names, dict):
        names = [names.get(str(i), str(i)) for i in range(count)]
    if not names or len(names) != count:
        names = range(count)
    return tuple(map(str, names)) if count else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({error})"
        raise UserError(f"cannot read {path}: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it is no JSON object")
    return content


def read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the first of these files that exists; no code in them is ever run.

    Raises UserError for no such file, a truncated one, or a pickle of something else than tensors.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has none of {', '.join(names)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise half a dozen kinds, depending on where the bytes end
        raise UserError(f"cannot read the weights {path}: truncated, or no file of plain tensors") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"cannot read the weights {path}: it has something else than named tensors")
    return content


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number for each channel."""
    return values * channels if len(values) == 1 else values
