"""A timm architecture with its weights: where every way in ends and every way out starts.

open_weights(spec) -> Weights          (opening.py: a run, a timm folder or name, a Hugging Face folder, a JAX .npz)
build(weights, num_classes=10)         a module that computes what the original computes: images -> logits
save_timm_folder(...)                  (timm_folder.py, huggingface.py, onnx.py: the ways out)
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpp.data.settings import MAX_IMAGE_MB, DecodeOptions, Framing
from mpp.errors import UserError
from mpp.model.attention import Attention, use_kernel
from mpp.model.kernel_choice import choose_kernel, task_of
from mpp.model.positions import resample_table
from mpp.system.process import global_draws, without_warnings
from mpp.weights.heads import TanhHead, classifier_names, zero_head
from mpp.weights.hybrid import create_hybrid, use_original_stem

_SHOWN = 5  # names that a complaint lists


@dataclass(frozen=True)
class Numerics:
    """Where the original of the weights computes otherwise than timm's model of that name."""

    norm_eps: float | None = None
    """Epsilon of every LayerNorm of a ViT. None: timm's."""
    original_stem: bool = False
    """A hybrid's ResNet as the paper's JAX code has it: GroupNorm eps 1e-6, (w - mean) / (std + 1e-5)."""
    stem_units: tuple[int, ...] | None = None
    """Units per stage of a hybrid's ResNet that timm has no name for; () is the root convolution alone."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A timm architecture, its weights under timm's names, and what its input looks like."""

    name: str
    """timm's name of the architecture, without a tag."""
    args: Mapping[str, Any]
    """For timm.create_model, JSON values only; not num_classes, in_chans, global_pool, img_size or drop rates."""
    state: Mapping[str, Tensor] | None
    """Weights under timm's names, head included where `classes` is given. None: freshly initialised."""
    image_hw: tuple[int, int]
    """Input height and width in pixels."""
    in_chans: int = 3
    mean: tuple[float, ...] = (0.5,)
    """Of the input on a 0 to 1 scale, one number or one per channel."""
    std: tuple[float, ...] = (0.5,)
    pool: str = "avg"
    """timm's global_pool. Of ViTs: avg, the mean of the patch tokens, token, the class token, or timm's others."""
    classes: tuple[str, ...] | None = None
    """Of the head, in its order; None: there is no head."""
    representation: int | None = None
    """Width of the hidden tanh layer of the head (the paper's pre-training head, JAX's pre_logits); None: linear."""
    numerics: Numerics = field(default=Numerics())
    origin: str = ""
    """What it was opened from."""
    value_range: tuple[float, ...] = ()
    """Of the files that the input is read from (see `DecodeOptions`)."""
    background: tuple[int, ...] = (255,)
    """Likewise."""
    crop_pct: float = 1.0
    """Of evaluation (see `Framing`)."""
    interpolation: str = "bicubic"
    """Likewise."""
    crop_mode: str = "center"
    """Likewise."""
    max_image_mb: int = MAX_IMAGE_MB
    """Of an image that is read: no property of the weights, but of those who read images for them."""

    @property
    def reading(self) -> DecodeOptions:
        """How files become the pixels that `mean` and `std` are for."""
        return DecodeOptions(self.in_chans, self.value_range, self.background, self.max_image_mb * 10**6)

    @property
    def framing(self) -> Framing:
        """How images are brought to the input size for evaluation; timm fills borders with the mean."""
        fill = tuple(round(255 * mean) for mean in self.mean) if self.crop_mode == "border" else (0,)
        return Framing(self.crop_pct, self.interpolation, self.crop_mode, fill)


def build(
    weights: Weights,
    *,
    classes: tuple[str, ...] | None = None,
    representation: int | None = None,
    pool: str | None = None,
    image_hw: tuple[int, int] | None = None,
    drop_path: float = 0.0,
    attention: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The timm model with the weights in it, on `device`, in training mode as every new module.

    Its `forward` gives logits (B, K) for normalised images (B, C, H, W) where there is a head, else pooled features
    (B, D); `forward_features`, `forward_head` and `forward_intermediates` are timm's. Fresh weights come from torch's
    global CPU generator.

    Args:
        weights: what to build.
        classes: of a new head, zero-initialised (appendix B.1.1); None keeps the head of the weights; () drops it.
        representation: width of the new head's hidden tanh layer; 0: the encoder's; None: a linear head.
        pool: instead of the weights' own.
        image_hw: another input size; position embeddings are resampled (section 3.2, "Fine-tuning").
        drop_path: stochastic depth rate.
        attention: kernel for ViTs: auto, xformers, sdpa, explicit; see `settle_kernel` for the fastest.
        device: where to.
        dtype: what attention will be computed in.

    Raises:
        UserError: names or shapes that do not fit (they are listed), a size or pooling that the model cannot have.
    """
    keep_head = classes is None and weights.classes is not None
    names = weights.classes if classes is None else classes
    if classes is None:
        representation = weights.representation
    size = image_hw or weights.image_hw
    model = create(weights, num_classes=len(names or ()), pool=pool, image_hw=size, drop_path=drop_path)
    if names and representation is not None:
        if not isinstance(model, VisionTransformer):
            raise UserError(f"{weights.name} is not a ViT and takes no hidden layer in its head; leave it out")
        width: int = model.num_features
        model.set_submodule("head", TanhHead(width, representation or width, len(names)))
    if weights.state is not None:
        state = dict(weights.state)
        if "pos_embed" in state and isinstance(model, VisionTransformer) and model.pos_embed is not None:
            state["pos_embed"] = resampled(state["pos_embed"], weights, model)
        if size == weights.image_hw or isinstance(model, VisionTransformer):
            load(model, state, weights.origin or weights.name, head=keep_head)
        else:
            _load_resized(model, weights, size, head=keep_head)
    if names and not keep_head:
        zero_head(model)
    device = torch.device(device)
    if task := task_of(model, 0, False, device, dtype):
        use_kernel(model, choose_kernel(attention, task))
    return model.to(device)


def is_vit(name: str) -> bool:
    """Whether timm's model of that name is a VisionTransformer, hybrids included."""
    return "vision_transformer" in timm.models.model_entrypoint(name).__module__


def create(
    weights: Weights,
    *,
    num_classes: int = 0,
    pool: str | None = None,
    image_hw: tuple[int, int] | None = None,
    drop_path: float = 0.0,
    plain: bool = False,
) -> Any:
    """The freshly initialised timm model that the weights are for, with the numerics of their original.

    Args:
        weights: what for; its state is only looked at.
        num_classes: of a linear head; 0: none.
        pool: instead of the weights' own.
        image_hw: instead of the weights' own.
        drop_path: stochastic depth rate.
        plain: timm's own attention and numerics, for writing out; a stem that timm has no name for stays.

    Raises:
        UserError: an unknown name, arguments that timm refuses, a pooling that these weights cannot have.
    """
    if not timm.is_model(weights.name):
        near = difflib.get_close_matches(weights.name, timm.list_models(), 3)
        raise UserError(f"timm {timm.__version__} has no model {weights.name!r}; near it: {', '.join(near) or 'none'}")
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": weights.in_chans, **weights.args}
    if drop_path:
        settings["drop_path_rate"] = drop_path
    own_pool, pool = weights.pool, pool or weights.pool
    if is_vit(weights.name):
        settings |= {"img_size": image_hw or weights.image_hw, "global_pool": pool}
        after_pooling = weights.state is not None and "fc_norm.weight" in weights.state
        if after_pooling and pool != own_pool:
            raise UserError(
                f"{weights.origin or weights.name} has its last norm after pooling by {own_pool}; keep that"
            )
        if not after_pooling and pool in ("avg", "avgmax", "max", "token"):
            settings["fc_norm"] = False  # the last norm stays where the class token needs it: before the pooling
        if not plain:
            settings["attn_layer"] = Attention
    elif pool != own_pool:
        raise UserError(f"{weights.name} is not a ViT: it pools by {own_pool} and cannot by {pool}")
    elif timm.get_pretrained_cfg(weights.name).fixed_input_size:  # pyright: ignore[reportOptionalMemberAccess]
        settings["img_size"] = image_hw or weights.image_hw
    numerics = Numerics(stem_units=weights.numerics.stem_units) if plain else weights.numerics
    try:
        if numerics.stem_units is not None:
            model = create_hybrid(numerics.stem_units, **settings)
        else:
            model = _create(weights.name, settings)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        told = {k: v for k, v in settings.items() if k not in ("attn_layer", "fc_norm", "num_classes")}
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"timm cannot build {weights.name!r} with {told}: {reason}") from error
    if numerics.original_stem:
        use_original_stem(model)
    if numerics.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = numerics.norm_eps
    return model


def _create(name: str, settings: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, **settings)
    except TypeError:
        if "attn_layer" not in settings:
            raise
        # Some ViTs have blocks of their own kind, and keep timm's attention.
        return timm.create_model(name, **{k: v for k, v in settings.items() if k != "attn_layer"})


def load(model: nn.Module, state: Mapping[str, Tensor], origin: str, *, head: bool) -> None:
    """Copies the weights into the model; every name and shape must fit.

    Args:
        model: as `create` gives it.
        state: under the model's names.
        origin: what complaints call the weights.
        head: whether the classification head is loaded, too; else what `state` has of it is left out.

    Raises:
        UserError: listing the missing and the unexpected names, and the shapes that differ.
    """
    prefixes = classifier_names(model)
    wanted = {k: v for k, v in model.state_dict().items() if head or not k.startswith(prefixes)}
    given = {k: v for k, v in state.items() if head or not k.startswith(prefixes)}
    shapes = [
        f"{name} {tuple(given[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    found = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": shapes,
    }
    if any(found.values()):
        told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in found.items() if names)
        raise UserError(f"{origin}: the weights do not fit {type(model).__name__} ({told})")
    model.load_state_dict(given, strict=False)


def _load_resized(model: Any, weights: Weights, image_hw: tuple[int, int], *, head: bool) -> None:
    """Copies the weights into a model of that other size, which is no ViT: as they are, or resampled by timm.

    Raises:
        UserError: weights of another model, or of one that is for its own size alone.
    """
    origin, state = weights.origin or weights.name, dict(weights.state or {})
    try:
        return load(model, state, origin, head=head)
    except UserError:  # tables of positions, perhaps
        pass
    with global_draws():
        own = create(weights, num_classes=model.num_classes)
    load(own, state, origin, head=head)
    settings: dict[str, Any] = {"img_size": image_hw}
    if isinstance(model, SwinTransformer):  # timm would scale the windows, too
        stages: Any = model.layers
        settings["window_size"] = [stage.blocks[0].window_size for stage in stages]
    try:
        with without_warnings(category=UserWarning):  # torch's, about how timm interpolates
            own.set_input_size(**settings)
        return load(model, own.state_dict(), origin, head=head)
    except (AssertionError, AttributeError, RuntimeError, TypeError, UserError, ValueError) as error:
        (height, width), (rows, columns) = weights.image_hw, image_hw
        raise UserError(
            f"{origin} is for images of {height} x {width} pixels, and timm cannot make {weights.name} take "
            f"{rows} x {columns}: leave out --img-size (in fine-tuning --model.img-size)"
        ) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def resampled(table: Tensor, weights: Weights, model: Any) -> Tensor:
    """The position embeddings of the weights, for the grid of the model (section 3.2, "Fine-tuning").

    Raises:
        UserError: a table that is not for the weights' own size.
    """
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    old, new = _grid(model, weights.image_hw), model.patch_embed.grid_size
    if old[0] * old[1] != table.shape[1] - prefix:
        rows = table.shape[1] - prefix
        raise UserError(f"{weights.origin}: {rows} position embeddings are not the {old[0]} x {old[1]} of its patches")
    if old == new:
        return table
    return torch.cat([table[:, :prefix], resample_table(table[:, prefix:], old, new)], dim=1)


def _grid(model: Any, image_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of images of that size, which need not be the model's own."""
    embed, (rows, columns) = model.patch_embed, image_hw
    if hasattr(embed, "backbone"):  # its padding decides, as timm finds out, too
        embed.backbone.eval()
        with torch.no_grad():
            maps = embed.backbone(model.pos_embed.new_zeros(1, model.in_chans, *image_hw))
        embed.backbone.train()
        rows, columns = (maps[-1] if isinstance(maps, list | tuple) else maps).shape[-2:]
    return rows // embed.patch_size[0], columns // embed.patch_size[1]
