"""Settings of the tools that take images through a model: predict and embed. Free of torch, for `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpp.config import by_name
from mpp.data.settings import MAX_IMAGE_MB, DataConfig, check_max_image_mb
from mpp.downstream.settings import EncoderConfig, Pool, check_at_least
from mpp.errors import ConfigError

ENDINGS = (".npz", ".parquet", ".csv")
"""Of files of features."""
_OF_A_SEARCH = ("init", "images", "out", "index", "top", "duplicates", "encoder.device", "encoder.precision")


@dataclass(frozen=True)
class PredictRecipe:
    """Classify images with a fine-tuned model."""

    init: str = ""
    """A fine-tuned run, or any weights with a head: timm or Hugging Face folder, JAX .npz, timm name."""
    images: tuple[str, ...] = ()
    """Image files and folders of images; on the command line they need no --images."""
    data: str = ""
    """Images of all splits, instead of --images: array:FILE.npz, csv:FILE, shards:GLOB, ... as data.source of the
    training."""
    download: bool = False
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    top: int = 3
    """Classes named for each image."""
    out: str = ""
    """CSV file to write to instead of printing."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    max_image_mb: int = MAX_IMAGE_MB
    """Most megabytes (10**6 bytes) of an image, as data.max_image_mb; larger ones are left out."""

    def __post_init__(self) -> None:
        check_max_image_mb(self.max_image_mb, "max_image_mb")
        check_at_least(1, self, "top")


@dataclass(frozen=True)
class EmbedRecipe:
    """Write features of images, or find images that are alike in such a file."""

    init: str = ""
    """Encoder: a run folder, a timm or Hugging Face folder, a JAX .npz, a timm name, or random: and one of these. With
    --index the one it was made by, unless it has moved."""
    data: str = ""
    """Images, labelled or not, of all splits: folder:DIR, csv:FILE, ... as data.source of the training."""
    images: tuple[str, ...] = ()
    """Image files and folders of images, instead of --data. With --index what to look for: files, folders, or names of
    images in the index."""
    out: str = ""
    """File of features: NAME.npz, NAME.parquet or NAME.csv. The same command again goes on where it was stopped. With
    --index a folder for the list and the contact sheet; empty: they are only printed."""
    download: bool = False
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    layer: int = -1
    """Layer to read: a block of ViTs, a stage of others; 0 is the first, -1 the last, after its norm."""
    pool: Pool | Literal["none"] = "mean"
    """Mean of the patch tokens, class token, both side by side, the means of the image's quarters side by side, or
    none: every patch token, into an .npz alone."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers that are written."""
    max_bad: str = "1%"
    """Stop once more than this share of the images read could not be decoded."""
    index: str = ""
    """A file of features, .npz or .parquet, in which to look for images that are alike, by the cosine of their
    standardised features."""
    top: int = 10
    """With --index: neighbours of each image."""
    duplicates: float = 0.0
    """With --index: instead of neighbours, groups of images with at least this cosine, such as 0.98."""
    encoder: EncoderConfig = EncoderConfig()

    def __post_init__(self) -> None:
        check_at_least(1, self, "top")
        if not 0 <= self.duplicates <= 1:
            raise ValueError(f"duplicates is a cosine above 0 and up to 1, such as 0.98, got {self.duplicates:g}")
        try:
            DataConfig(max_bad=self.max_bad)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("data.")) from None

    @property
    def max_bad_share(self) -> float:
        """`max_bad` as a number from 0 to 1."""
        return DataConfig(max_bad=self.max_bad).max_bad_share


def check_predict(config: PredictRecipe) -> None:
    """Refuses settings that do not go together, before torch is loaded. Raises ConfigError."""
    if not config.init:
        raise ConfigError("no model: give --init, such as --init runs/ft")
    _check_images(config, "name files or folders, such as predict --init runs/ft image.jpg, or give --data")


def _check_images(config: PredictRecipe | EmbedRecipe, advice: str) -> None:
    if bool(config.data) == bool(config.images):
        raise ConfigError(f"{'both --data and --images' if config.data else 'no images'}: {advice}")


def check_embed(config: EmbedRecipe) -> None:
    """Refuses settings that do not go together, before torch is loaded. Raises ConfigError."""
    changed = [name for name, value in by_name(config).items() if value != by_name(EmbedRecipe())[name]]
    if config.index:
        if others := [f"--{name.replace('_', '-')}" for name in changed if name not in _OF_A_SEARCH]:
            raise ConfigError(f"{', '.join(others)} beside --index: how its features were made is in {config.index}")
        if bool(config.images) == bool(config.duplicates):
            what = "both --images and --duplicates" if config.images else "nothing to look for"
            raise ConfigError(f"{what}: give --images, such as --images query.jpg, or --duplicates, such as 0.98")
        if Path(config.index).suffix not in ENDINGS[:2]:
            raise ConfigError(
                f"--index {config.index}: takes a file of features that ends in {' or '.join(ENDINGS[:2])}"
            )
        return
    for name in ("top", "duplicates"):
        if name in changed:
            raise ConfigError(
                f"--{name} looks into features that are there: give them by --index, such as features.npz"
            )
    if not config.init:
        raise ConfigError("no encoder: give --init, such as --init runs/first, or --index to look into features")
    _check_images(config, "give --data, such as --data folder:/my/images, or --images, such as --images a.jpg")
    if not config.out:
        raise ConfigError("nowhere to write to: give --out, such as --out features.npz")
    if (ending := Path(config.out).suffix) not in ENDINGS:
        known = f"{', '.join(ENDINGS[:2])} or {ENDINGS[2]}"
        raise ConfigError(f"--out {config.out}: features are written to {known}, not {ending or 'a folder'}")
    if config.pool == "none" and ending != ".npz":
        raise ConfigError(f"--out {config.out}: of patch tokens (--pool none) only .npz can be written")
