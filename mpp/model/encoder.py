"""The encoder: a timm VisionTransformer by its timm name, opened at one seam.

`embed(images)` gives the patch tokens before position embeddings; `encode(tokens)` adds class token and positions and
runs the blocks. Whatever happens in between (corruption, packing) needs to know nothing of the encoder's inside.
This is the only file that knows timm's private names.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import timm
import torch
from jaxtyping import Float, Int
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpp.errors import UserError
from mpp.model.attention import Attention, attention_weights, take, use_kernel
from mpp.model.block import Block, run_blocks
from mpp.model.choice import choose_kernel, task_of
from mpp.model.posembed import build_position
from mpp.model.settings import ModelConfig


class Encoder(nn.Module):
    """A timm VisionTransformer with the seam between patch embedding and blocks.

    Attributes:
        vit: the timm model, without head.
        grid: rows and columns of patches.
        patch: height and width in pixels of the image area behind one token.
    """

    def __init__(self, vit: VisionTransformer, position: nn.Module | None = None) -> None:
        super().__init__()
        self.vit: Any = vit  # its blocks and norms are typed as bare modules
        self.position = position
        rows, columns = vit.patch_embed.grid_size
        height, width = vit.patch_embed.img_size
        self.grid: tuple[int, int] = (rows, columns)
        self.image_hw: tuple[int, int] = (height, width)
        self.patch: tuple[int, int] = (height // rows, width // columns)
        self.in_chans: int = vit.in_chans
        self.embed_dim: int = vit.embed_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches dim"]:
        """Patch tokens of normalised images, before position embeddings, rows first (equation 1 without E_pos)."""
        tokens = self.vit.patch_embed(images)
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens

    def encode(
        self,
        tokens: Float[Tensor, "batch patches dim"],
        at: Int[Tensor, "batch k"] | None = None,
        entering: int = 0,
        every: bool = False,
    ) -> Float[Tensor, "batch tokens dim"]:
        """All tokens after the last block and LayerNorm (equations 1 to 4); `num_prefix_tokens` come first.

        Where only some patches are read, `at` names them, and those k tokens come back, in that order: the same
        numbers for less, since of the others a last block of timm's plain kind computes keys and values only.

        With `entering` these k tokens enter before the block of that number, position embeddings and all; the blocks
        before it run without them. With `every` all tokens come back nevertheless, for a decoder; then `entering` may
        be the number of blocks, and the k tokens are as they entered.

        Raises:
            ValueError: no block is left that the k tokens would go through.
        """
        x, blocks = self._enter(tokens), list(self.vit.blocks)
        if entering > len(blocks) - (not every):
            raise ValueError(f"entering {entering}: of {len(blocks)} blocks the last must run, but for a decoder")
        places = None if at is None else at + self.num_prefix_tokens
        if places is not None and entering == len(blocks):
            return self._run_without([*blocks, self.vit.norm], x, places)
        if places is not None and entering:
            x = self._run_without(blocks[:entering], x, places)
        checkpointing = self.vit.grad_checkpointing
        return self.vit.norm(run_blocks(blocks[entering:], x, None if every else places, checkpointing))

    def _run_without(self, blocks: Sequence[nn.Module], x: Tensor, absent: Int[Tensor, "batch k"]) -> Tensor:
        """The tokens after these blocks, through which those that are absent do not go; each k differ."""
        batch, count, width = x.shape
        present = torch.ones(batch, count, dtype=torch.int8, device=x.device).scatter(1, absent, 0)
        # Sorted, not nonzero: of a known size, so that nothing waits for the device.
        places = present.argsort(dim=1, descending=True, stable=True)[:, : count - absent.shape[1]]
        alone = take(x, places)
        alone = run_blocks(blocks, alone, None, self.vit.grad_checkpointing)
        return x.to(alone.dtype).scatter(1, places[..., None].expand(-1, -1, width), alone)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """`encode(embed(images))`."""
        return self.encode(self.embed(images))

    def attention_maps(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Iterator[Float[Tensor, "batch heads tokens tokens"]]:
        """Attention weights of one block after the other, by the explicit form; rows sum to 1.

        A block runs when its weights are asked for, so that they need not all be in memory: gradients are to be off
        around the loop, not around this call.

        Raises:
            UserError: an encoder whose blocks attend in a way of their own, in this call already.
        """
        attentions = [getattr(block, "attn", block) for block in self.vit.blocks]
        for attention in attentions:
            if not isinstance(attention, TimmAttention):
                raise UserError(
                    f"the attention of this ViT cannot be shown: its blocks have a {type(attention).__name__}, "
                    "not timm's Attention"
                )
        return self._attention_maps(images)

    def _attention_maps(self, images: Tensor) -> Iterator[Tensor]:
        x = self._enter(self.embed(images))
        entered: list[Tensor] = []
        for block in self.vit.blocks:
            # What enters differs by the kind of block: normalised before, or only after.
            hook = block.attn.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
            try:
                x = block(x)
            finally:
                hook.remove()
            yield _weights(block.attn, entered.pop())

    def _enter(self, tokens: Tensor) -> Tensor:
        if self.position is not None:
            tokens = tokens + self.position().to(tokens.dtype)
        if self.vit.dynamic_img_size:
            tokens = tokens.unflatten(1, self.grid)
        return self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(tokens)))


def _weights(attention: Any, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N N"]:
    """The weights that timm's attention, or ours, gives to these tokens."""
    joint = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, _ = joint.permute(2, 0, 3, 1, 4)
    return attention_weights(attention.q_norm(q), attention.k_norm(k))


def create_vit(config: ModelConfig, **overrides: Any) -> VisionTransformer:
    """timm's own model for `config`, without head and with mean-pooled patch tokens; `overrides` go to timm.

    Raises:
        UserError: an unknown name, a model that is not a VisionTransformer, sizes that do not fit.
    """
    if "." in config.name:
        bare = config.name.partition(".")[0]
        raise UserError(
            f"model.name {config.name!r} names weights; take {bare} for new ones, or --init {config.name} to "
            "go on from them"
        )
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models("vit_*"), 3)
        raise UserError(f"timm {timm.__version__} has no model {config.name!r}; near it: {', '.join(near) or 'none'}")
    if "vision_transformer" not in timm.models.model_entrypoint(config.name).__module__:
        raise UserError(
            f"model.name {config.name!r} is not a VisionTransformer, which masked patch prediction needs; "
            "vit_base_patch16_224 is one, vit_base_r50_s16_224 a hybrid"
        )
    settings: dict[str, Any] = {
        "img_size": config.image_hw,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "pos_embed": None if config.pos_embed == "learned" else "none",
        "act_layer": None if config.act == "gelu" else config.act,
        "drop_path_rate": config.drop_path,
    }
    if config.patch_size:
        settings["patch_size"] = (config.patch_size[0], config.patch_size[-1])
    settings.update(overrides)
    # fc_norm=False keeps the last LayerNorm where it is for the class token: before the pooling.
    vit = _call_timm(config, num_classes=0, global_pool="avg", fc_norm=False, **settings)
    if not isinstance(vit, VisionTransformer):
        raise UserError(
            f"model.name {config.name!r} is a {type(vit).__name__}; masked patch prediction needs a VisionTransformer"
        )
    return vit


def _call_timm(config: ModelConfig, **settings: Any) -> nn.Module:
    try:
        return timm.create_model(config.name, **settings)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        told = {k: v for k, v in settings.items() if v is not None and hasattr(config, k)}
        reason = str(error) or type(error).__name__
        raise UserError(f"timm cannot build {config.name!r} with {told}: {reason}") from error


def build_encoder(
    config: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """The encoder that `config` describes, freshly initialised, on `device` ("meta" allocates nothing).

    `dtype` is what attention will be computed in, under autocast.

    The weights are drawn on the CPU from torch's global generator, so they are the same for every device.

    Raises:
        UserError: see `create_vit`; an image that is not a whole number of patches; a kernel that cannot run.
    """
    device = torch.device(device)
    layers: dict[str, Any] = {"attn_layer": Attention}
    if all(type(block) is TimmBlock for block in _check(config).blocks):
        layers["block_fn"] = Block
    with torch.device("meta" if device.type == "meta" else "cpu"):
        vit = create_vit(config, **layers)
        position = build_position(config.pos_embed, vit.patch_embed.grid_size, vit.embed_dim)
    return ready(Encoder(vit, position), config, device, dtype)


def ready(encoder: Encoder, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Encoder:
    """The encoder on its device, with the checkpointing and the attention kernel of `config` (see `build_encoder`)."""
    encoder.vit.set_grad_checkpointing(config.grad_checkpointing)
    task = task_of(encoder.vit, 0, True, device, dtype)
    if task and device.type != "meta":
        use_kernel(encoder, choose_kernel(config.attention, task))
    return encoder.to(device)


def _check(config: ModelConfig) -> Any:
    """timm's model at its own size, unallocated; refuses what would be built as something else, or not at all."""
    with torch.device("meta"):
        vit: Any = create_vit(config, img_size=None)
    check_vit(vit, f"model.name {config.name!r}")
    if hasattr(vit.patch_embed, "backbone") and config.patch_size:
        raise UserError(f"model.patch_size does not apply to the hybrid {config.name!r}: its stem sets it")
    check_size(vit, config.image_hw)
    return vit


def check_vit(vit: Any, name: str) -> None:
    """Refuses a ViT, `name` in complaints, that cannot be trained by masked patch prediction as it is.

    Raises:
        UserError: blocks that attend in a way of their own; batch normalisation.
    """
    if not all(type(getattr(block, "attn", None)) in (TimmAttention, Attention) for block in vit.blocks):
        raise UserError(f"{name} has blocks with an attention of its own; choose another ViT")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vit.modules()):
        raise UserError(
            f"{name} has batch normalisation, whose statistics differ by process; "
            "choose a ViT or a hybrid without, such as vit_base_r50_s16_224"
        )


def check_size(vit: Any, image_hw: tuple[int, int]) -> None:
    """Refuses a size in pixels that is not a whole number of the ViT's patches.

    Raises:
        UserError: naming the sizes beside it.
    """
    hybrid = hasattr(vit.patch_embed, "backbone")
    step = vit.patch_embed.feat_ratio(as_scalar=False) if hybrid else vit.patch_embed.patch_size
    for size, patch in zip(image_hw, step, strict=True):
        if size % patch:
            low = size // patch * patch
            near = f"{low} or {low + patch}" if low else f"{patch}"
            raise UserError(f"model.img_size {size} is not a multiple of the patch size {patch}; take {near}")
