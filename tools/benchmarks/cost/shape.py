"""The sizes of a model, which all costs are counted from: the model is built without memory, and asked."""

from dataclasses import dataclass
from typing import Any

from mpp.errors import UserError, command
from mpp.objective.image_words import COMPONENTS, IMAGE_WORDS
from mpp.objective.masking import num_picked
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig


@dataclass(frozen=True)
class Shape:
    """A ViT with the head of masked patch prediction, in numbers."""

    channels: int
    image: tuple[int, int]
    """Height and width in pixels."""
    patch: tuple[int, int]
    """Height and width of a patch in pixels."""
    dim: int
    """Token width."""
    depth: int
    """Blocks."""
    heads: int
    hidden: int
    """Width of the MLP."""
    prefix: int
    """Tokens before those of the patches: the class token."""
    position: int
    """Parameters of the position embedding."""
    picked: int
    """K, corrupted patches of an image: the last block computes its output for these alone."""
    outputs: int
    """Width of the head."""
    pixel_target: bool = False
    detail: bool = False
    """Whether a second head predicts the pixels of a patch."""
    words: int = 0
    """Visual words and mean colours: outputs of a head at the corrupted patches, and of another at the rest."""
    word_windows: tuple[int, int] = (0, 0)
    """Windows of a patch that are compared with the words, and values of each."""
    image_words: int = 0
    """Words of whole images: outputs of a head at the mean token of the rest."""
    image_components: int = 0
    """Values of a whole image that are compared with its words."""
    early: int = 0
    """Blocks that run without the corrupted patches."""
    decoder: int = 0
    """Blocks of a decoder behind the encoder's."""

    @property
    def pixels(self) -> int:
        """Values of an image."""
        return self.channels * self.image[0] * self.image[1]

    @property
    def patch_values(self) -> int:
        """Values of a patch."""
        return self.channels * self.patch[0] * self.patch[1]

    @property
    def patches(self) -> int:
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    @property
    def tokens(self) -> int:
        """Patches and prefix."""
        return self.patches + self.prefix

    @property
    def block_parameters(self) -> int:
        """Of one block: two norms, qkv, projection, MLP."""
        d, m = self.dim, self.hidden
        return 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * m + m + d)

    @property
    def blocks(self) -> int:
        """The encoder's and the decoder's."""
        return self.depth + self.decoder

    @property
    def details(self) -> int:
        """Width of the second head; 0 without one."""
        return self.patch_values * self.detail

    @property
    def asking(self) -> int:
        """Tokens of the last block for which more than keys and values is computed."""
        return self.tokens if self.words and not self.decoder else self.picked

    @property
    def head_parameters(self) -> int:
        """Of the last norm, a decoder's own, and the heads."""
        outputs = self.outputs + self.details + 2 * self.words + self.image_words
        return 2 * self.dim * (1 + (self.decoder > 0)) + outputs * (self.dim + 1)

    @property
    def root_parameters(self) -> int:
        """Of all but the blocks: patch embedding, prefix tokens, positions, [mask] embedding, last norms and heads."""
        return self.dim * (self.patch_values + 1 + self.prefix + 1) + self.position + self.head_parameters

    @property
    def parameters(self) -> int:
        return self.root_parameters + self.blocks * self.block_parameters


def shape_of(config: PretrainConfig) -> Shape:
    """Reads the sizes off the model that a run of this config trains.

    Raises:
        UserError: settings that training refuses, or a model that is not a plain ViT.
    """
    model = build_model(config, "meta")
    encoder, objective, words, of_image = model.encoder, config.objective, model.words, model.image_words
    vit: Any = encoder.vit
    dim, prefix, (rows, columns) = encoder.embed_dim, encoder.num_prefix_tokens, encoder.grid
    positions = {"learned": (rows * columns + prefix) * dim, "2d": (rows + columns) * (dim // 2)}
    shape = Shape(
        channels=config.model.in_chans,
        image=encoder.image_hw,
        patch=encoder.patch,
        dim=dim,
        depth=len(vit.blocks),
        heads=vit.blocks[0].attn.num_heads,
        hidden=getattr(getattr(vit.blocks[0].mlp, "fc1", None), "out_features", 0),
        prefix=prefix,
        position=positions.get(config.model.pos_embed, 0),
        picked=num_picked(objective.ratio, rows * columns),
        outputs=model.head.out_features,
        pixel_target=objective.target == "pixels",
        detail=objective.detail > 0,
        words=0 if words is None else words.outputs,
        word_windows=(0, 0) if words is None else (words.windows[0] * words.windows[1], len(words.middle)),
        image_words=0 if of_image is None else IMAGE_WORDS,
        image_components=0 if of_image is None else COMPONENTS,
        early=objective.mask_enters,
        decoder=objective.decoder_depth,
    )
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != shape.parameters:  # whatever has other parts has other parameters
        raise UserError(
            f"model.name {config.model.name!r} is not a plain ViT ({found:,} parameters, not {shape.parameters:,}), "
            f"which the formulas are for; {command('pretrain')} --dry-run measures any model"
        )
    return shape
