"""One string opens weights, wherever they come from.

runs/first              a run of this library: its model/ folder
DIR                     a timm folder (config.json names an architecture) or a Hugging Face ViT (model_type vit)
FILE.npz                an official JAX checkpoint of the paper's authors
FILE.pth                tensors of a ViT under the names of timm, DINO, DINOv2, MAE or torchvision (single_file.py)
NAME:FILE.pth           the same, or any other model, as timm's architecture of that name
resnet18.a1_in1k        a timm name: its pretrained weights, from the hub or its cache
random:ANY OF THESE     the same architecture, freshly initialised
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

from mpp.errors import UserError, command
from mpp.model.encoder import is_eva, is_vit, similar_names
from mpp.system.meta_device import on_meta
from mpp.weights.base import Weights
from mpp.weights.huggingface import read_hf_folder
from mpp.weights.jax_npz import read_jax_npz
from mpp.weights.single_file import named_architecture, read_single_file
from mpp.weights.timm_folder import read_json, read_timm_folder, timm_framing

_FORMS = "a run folder, a timm or Hugging Face folder, a .npz, .safetensors or .pth file, a timm name, or random:ANY"
_BESIDE_CONFIG = ("model.safetensors", "pytorch_model.bin")


def open_weights(spec: str, architecture: str = "") -> Weights:
    """The weights that `spec` names (see above); `architecture` is timm's name for a single file, as NAME: before it.

    Raises:
        UserError: nothing of that name, something else than weights, or files that are damaged.
    """
    if not spec:
        raise UserError(f"no weights were given: --init takes {_FORMS}")
    name, colon, file = spec.removeprefix("random:").partition(":")
    of_name = bool(colon) and timm.is_model(name.partition(".")[0]) and Path(file).expanduser().is_file()
    if spec.startswith("random:"):
        inner = spec.removeprefix("random:")
        if not of_name and not Path(inner).expanduser().exists():
            return replace(_open_timm(inner.removeprefix("timm:"), pretrained=False), origin=spec)
        return open_weights(inner, architecture).untrained()
    path = Path(spec).expanduser()
    if path.is_dir():
        return replace(_open_folder(path), origin=spec)
    if path.is_file():
        return replace(_open_file(path, architecture), origin=spec)
    if of_name:
        return replace(_open_file(Path(file).expanduser(), name), origin=spec)
    if "/" in spec or path.suffix in (".npz", ".pt", ".pth", ".bin", ".safetensors"):
        raise UserError(f"--init {spec}: there is no such file or folder")
    return _open_timm(spec.removeprefix("timm:"), pretrained=True)


def _open_file(path: Path, architecture: str) -> Weights:
    if path.suffix == ".npz":
        return read_jax_npz(path)
    folder = path.absolute().parent
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file():
        hint = f"{command('convert')} --init {path} --out DIR makes a folder of it"
        raise UserError(f"--init {path}: a checkpoint of a run; give the run, {folder.parent}, or {hint}")
    if path.name in _BESIDE_CONFIG and (folder / "config.json").is_file() and not architecture:
        return _open_folder(folder)
    named = named_architecture(architecture, _open_timm(architecture, pretrained=False)) if architecture else None
    return read_single_file(path, named)


def _open_folder(folder: Path) -> Weights:
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        if not (folder / "model" / "config.json").is_file():
            raise UserError(
                f"--init {folder}: this run has no model/ yet; it is written when the run ends, and "
                f"{command('convert')} makes one of its newest checkpoint"
            )
        return read_timm_folder(folder / "model")
    if not (folder / "config.json").is_file():
        state = "is empty" if not any(folder.iterdir()) else "holds no config.json"
        raise UserError(f"--init {folder}: the folder {state}; --init takes {_FORMS}")
    config = read_json(folder / "config.json")
    if "architecture" in config:
        return read_timm_folder(folder)
    if config.get("model_type") == "vit":
        return read_hf_folder(folder)
    kind = config.get("model_type") or config.get("architectures") or "unknown"
    raise UserError(f"--init {folder}: a model of type {kind} cannot be read; of Hugging Face's models only vit can")


def _open_timm(name: str, pretrained: bool) -> Weights:
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        raise UserError(
            f"--init {name}: neither a file, a folder nor a model of timm {timm.__version__}; near it: "
            f"{similar_names(bare)}"
        )
    of_tokens = is_vit(bare) or is_eva(bare)
    if pretrained:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its tries
        try:
            model: Any = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub's, requests' and urllib's errors differ by version
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problem = f"its pretrained weights could not be fetched ({reason}); are you online? "
            if isinstance(error, RuntimeError):
                problem = f"timm has no pretrained weights for it ({reason}); "
            raise UserError(f"--init {name}: {problem}random:{bare} takes the architecture alone") from error
        config: dict[str, Any] = model.pretrained_cfg
    else:
        config = timm.get_pretrained_cfg(bare).to_dict()  # pyright: ignore[reportOptionalMemberAccess]
        with on_meta():
            model = timm.create_model(bare) if of_tokens else None
    return Weights(
        bare,
        {},
        {key: value.detach() for key, value in model.state_dict().items()} if pretrained else None,
        tuple(config["input_size"][1:]),
        config["input_size"][0],
        tuple(config["mean"]),
        tuple(config["std"]),
        # A ViT's own default is written down nowhere but in the model.
        str(model.global_pool) if of_tokens else "avg",
        _class_names(config) if pretrained else None,
        origin=name,
        **timm_framing(config, name),
    )


def _class_names(config: dict[str, Any]) -> tuple[str, ...] | None:
    count = int(config.get("num_classes") or 0)
    subset = infer_imagenet_subset(config) if count > 1 else None
    if subset is not None:
        info = ImageNetInfo(subset)
        if info.num_classes() == count:
            return tuple(info.label_descriptions())
    return tuple(map(str, range(count))) if count else None
