"""Settings of the tools that check, pack and cache images. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass
from typing import Literal

from mpp.data.settings import MAX_IMAGE_MB, DataConfig, check_group


@dataclass(frozen=True)
class _Images:
    """The images that a tool looks after, named as for the training (there with `data.` in front)."""

    data: str = ""
    """The images: folder:DIR, csv:FILE, or any other source."""
    download: bool = False
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it."""
    in_chans: int = 3
    """Channels of the images, as model.in_chans."""
    value_range: tuple[float, ...] = ()
    """Values that become black and white: low high, or such a pair per channel. Empty: see data.value_range."""
    background: tuple[int, ...] = (255,)
    """Shows through where an image is transparent, 0 to 255: one number, or one per channel."""
    max_bad: str = "1%"
    """The share of the images past which bad ones are too many."""
    max_image_mb: int = MAX_IMAGE_MB
    """Most megabytes (10**6 bytes) of an image, as data.max_image_mb; larger ones are bad."""
    workers: int = -1
    """Processes; -1 takes the cores there are."""

    def __post_init__(self) -> None:
        if self.in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {self.in_chans}")
        self.data_config.decode_options(self.in_chans)

    @property
    def data_config(self) -> DataConfig:
        """The settings that the training has, too, checked as there."""
        return DataConfig(
            self.data,
            value_range=self.value_range,
            background=self.background,
            workers=self.workers,
            max_bad=self.max_bad,
            max_image_mb=self.max_image_mb,
        )


@dataclass(frozen=True)
class ShardRecipe(_Images):
    """Pack images into tar shards (WebDataset naming), with an index, checksums and a manifest."""

    out: str = ""
    """Folder of the shards. The same command again goes on where it stopped."""
    shard_images: int = 10_000
    """Most images in a shard."""
    shard_mb: int = 512
    """Most megabytes (10**6 bytes) in a shard, headers included."""
    resize: int = 0
    """Shrink images whose shorter side is longer than this many pixels to it; 0 leaves all as they are."""
    encode: Literal["keep", "jpeg", "png", "webp"] = "keep"
    """keep: the file as it is, and what was resized as JPEG if it was one, else PNG; or all as one of these."""
    quality: int = 92
    """Of JPEG and lossy WebP, 1 to 100."""
    shuffle: bool = True
    """Mix the images, so that each shard has some of all classes; false: in the order of the source."""
    seed: int = 0
    """Of the shuffle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("shard_images", 1), ("shard_mb", 1), ("resize", 0), ("quality", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
        if self.quality > 100:
            raise ValueError(f"quality is 1 to 100, got {self.quality}")
        if self.encode != "keep" and self.in_chans not in (1, 3):
            others = "keep writes others as .npy"
            raise ValueError(f"encode {self.encode} takes in_chans 1 or 3, got {self.in_chans}; {others}")


@dataclass(frozen=True)
class CheckRecipe(_Images):
    """Look at images before a run: what they are, what is bad, and what the objective would see."""

    out: str = ""
    """Folder for contact_sheet.png, bad_files.csv, duplicates.csv, near_duplicates.csv (with pairs, .png) and
    report.json. Empty: only the printed report."""
    near: int = 6
    """Images of two splits are near-duplicates if at most this many of the 64 bits of their perceptual hashes differ, 0
    to 7; -1 looks for none."""
    group: str = ""
    """As data.group of fine-tuning: says how many groups of images the splits share."""
    images: int = 0
    """Look at this many images, drawn evenly; 0: at all."""
    img_size: tuple[int, ...] = (224,)
    """As model.img_size: one number or height and width."""
    patch_size: tuple[int, ...] = (16,)
    """As model.patch_size: one number or height and width."""
    bits: int = 3
    """As objective.bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("img_size", "patch_size"):
            value = getattr(self, key)
            if len(value) not in (1, 2) or any(v < 1 for v in value):
                raise ValueError(f"{key} takes one or two positive numbers, got {list(value)}")
        if not -1 <= self.near <= 7:
            raise ValueError(f"near is 0 to 7 bits, or -1 to look for no near-duplicates, got {self.near}")
        check_group(self.group, "group")
        if self.images < 0:
            raise ValueError(f"images is at least 0 (all of them), got {self.images}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is 1 to 8, got {self.bits}")
        if any(side % patch for side, patch in zip(self.image_hw, self.patch_hw, strict=True)):
            raise ValueError(f"img_size {list(self.img_size)} is not a multiple of patch_size {list(self.patch_size)}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        return self.img_size[0], self.img_size[-1]

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return self.patch_size[0], self.patch_size[-1]


@dataclass(frozen=True)
class CacheRecipe:
    """Say what lies in the cache, the folder MPP_CACHE, by default ~/.cache/mpp, and clear it; what is in use stays."""

    clear: tuple[str, ...] = ()
    """Kinds to remove, as it lists them, or all: index, unpacked, kept, pixels, features, datasets, left-over."""
    limit: str = ""
    """Remove what was used longest ago until the cache has no more than, say, 50GB or 20% of the disk. Of all kinds
    unless clear names some."""
    files: bool = False
    """List every file."""
