"""What the data can be told. Free of torch, so that `--help` is instant."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from mpp.errors import UserError

MAX_IMAGE_MB = 700
"""Default of max_image_mb: Pillow's own limit of a decompression bomb, 178,956,970 pixels, at 4 bytes each."""
_INF = float("inf")


@dataclass(frozen=True)
class Reading:
    """How whatever a file holds becomes uint8 pixels of so many channels."""

    channels: int = 3
    """Of the pixels."""
    value_range: tuple[float, ...] = ()
    """Values that become 0 and 255: low high, or one such pair per channel. (): 0 to the largest of an unsigned
    integer type, 0 to 1 for floating point."""
    background: tuple[int, ...] = (255,)
    """Shows through where an image is transparent, 0 to 255: one number, or one per channel."""
    max_bytes: int = MAX_IMAGE_MB * 10**6
    """Of an image, as a file and decoded; a larger one is refused before it is read or decoded."""

    @property
    def of_pixels(self) -> dict[str, Any]:
        """What the pixels of an image depend on; the limit only says whether there are any."""
        return {"channels": self.channels, "value_range": self.value_range, "background": self.background}

    def flags(self) -> list[str]:
        """The flags that make a training read like this; none where it does so anyway."""
        plain = Reading()
        return [
            f"--{name} {flag_numbers(values)}"
            for name, values, usual in (
                ("data.value-range", self.value_range, plain.value_range),
                ("data.background", self.background, plain.background),
                ("model.in-chans", (self.channels,), (plain.channels,)),
                ("data.max-image-mb", (self.max_bytes // 10**6,), (plain.max_bytes // 10**6,)),
            )
            if values != usual
        ]


INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Framing:
    """How an image of any size is brought to the input size for evaluation; in timm's words, and as timm does it."""

    crop_pct: float = 1.0
    """Side of the input over that of the image once it is resized; the rest is cropped away, or filled up past 1."""
    interpolation: str = "bicubic"
    """One of INTERPOLATIONS."""
    crop_mode: str = "center"
    """center: the shorter side fits, and the centre is taken; squash: both sides fit, whatever becomes of the aspect;
    border: the longer side fits, and the rest is filled up."""
    fill: tuple[int, ...] = (0,)
    """What there is outside of the image, 0 to 255: one number, or one per channel."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct < _INF:
            raise ValueError(f"crop_pct must be positive, got {self.crop_pct}")
        for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}")


def flag_numbers(values: Iterable[float]) -> str:
    """Numbers as on a command line, with all their digits: `0 4095 0.25`."""
    return " ".join(repr(float(value)).removesuffix(".0") for value in values)


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are augmented."""

    source: str = ""
    """folder:DIR, csv:FILE, shards:GLOB, array:FILE.npy, hf:NAME_OR_DIR, cifar10:DIR, cifar100:DIR or demo; several
    joined by " + ", with weights or without: "3 * folder:A + 1 * folder:B"; a name that holds " + " in quotes,
    folder:"/x/A + B". `--data` is short for it."""
    download: bool = field(default=False, metadata={"free": True})
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Random resized crop: smallest and largest share of the image's area. 1 1 takes the largest centred crop."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Random resized crop: smallest and largest aspect ratio, relative to the input's own."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of an up-down flip; 0.5 suits satellite and microscopy images."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Colour jitter strength: brightness, contrast, saturation, hue (the last two need 3 channels)."""
    grayscale: float = 0.0
    """Probability of dropping the colours (needs 3 channels)."""
    mean: tuple[float, ...] = (0.5,)
    """Normalisation mean on a 0 to 1 scale, one number or one per channel."""
    std: tuple[float, ...] = (0.5,)
    """Normalisation standard deviation on a 0 to 1 scale, one number or one per channel."""
    value_range: tuple[float, ...] = ()
    """Values that become black and white: low high, or such a pair per channel. Empty: the whole range of an unsigned
    integer type, 0 to 1 for floating point. Images of 12 bits in 16: 0 4095."""
    background: tuple[int, ...] = (255,)
    """Shows through where an image is transparent, 0 to 255: one number, or one per channel."""
    workers: int = field(default=-1, metadata={"free": True})
    """Loader processes per device; -1 takes the cores there are, shared between local ranks, or none where a CPU of two
    cores trains."""
    decode: Literal["cpu", "cuda"] = "cpu"
    """Where ordinary JPEGs of the training are decoded; cuda (nvJPEG) helps where there are few cores for a GPU."""
    cache: Literal["auto", "none", "pixels"] = field(default="auto", metadata={"free": ("auto", "none")})
    """Decode once, and keep the pixels in $MPP_CACHE. auto: where that pays and takes at most a quarter of the memory
    and of the free disk; the training reads the same bits as with none. pixels: always, exact pixels, and small ones
    are cropped faster, by another rounding; for images of one size."""
    keep: bool = field(default=False, metadata={"free": True})
    """Keep in $MPP_CACHE what is fetched of remote shards."""
    max_bad: str = field(default="1%", metadata={"free": True})
    """Stop once more than this share of the images read could not be decoded."""
    max_image_mb: int = field(default=MAX_IMAGE_MB, metadata={"free": True})
    """Most megabytes (10**6 bytes) of an image: as a file, and decoded, which is height x width x channels x bytes of a
    value, and 4 a pixel at least. A larger one is not read, and counts as one that could not be decoded. While an image
    is decoded, a loader process takes up to five times as much: 3.5 GB at 700."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale must be two numbers, 0 < low <= high <= 1, got {list(self.crop_scale)}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio must be two numbers, 0 < low <= high, got {list(self.crop_ratio)}")
        for key in ("hflip", "vflip", "grayscale"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"data.{key} is a probability, 0 to 1, got {getattr(self, key)}")
        if any(v < 0 for v in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(f"data.jitter takes strengths of 0 and more, hue at most 0.5, got {list(self.jitter)}")
        if any(s <= 0 for s in self.std):
            raise ValueError(f"data.std must be positive, got {list(self.std)}")
        pairs = list(zip(self.value_range[::2], self.value_range[1::2], strict=False))
        if len(self.value_range) % 2 or not all(-_INF < low < high < _INF for low, high in pairs):
            raise ValueError(f"data.value_range takes pairs low high, low < high, got {list(self.value_range)}")
        if any(not 0 <= value <= 255 for value in self.background):
            raise ValueError(f"data.background takes numbers from 0 to 255, got {list(self.background)}")
        if self.keep and self.source and "://" not in f"{self.source} {getattr(self, 'test', '')}":
            raise ValueError(f"data.keep is for remote shards, such as s3://..., and {self.source} is not remote")
        if self.workers < -1:
            raise ValueError(f"data.workers must be -1 (auto) or at least 0, got {self.workers}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad is a share such as 1%, got {self.max_bad!r}")
        check_max_image_mb(self.max_image_mb, "data.max_image_mb")

    def reading(self, channels: int) -> Reading:
        """How files become pixels of so many channels.

        Raises:
            UserError: settings of another number of channels.
        """
        for key, whole in (("mean", channels), ("std", channels), ("background", channels)):
            if len(getattr(self, key)) not in (1, whole):
                raise UserError(f"data.{key} takes one number or {whole}, one per channel of the images")
        if len(self.value_range) not in (0, 2, 2 * channels):
            raise UserError(f"data.value_range takes low high, or {channels} such pairs, one per channel of the images")
        return Reading(channels, self.value_range, self.background, self.max_image_mb * 10**6)

    @property
    def max_bad_share(self) -> float:
        """`max_bad` as a number from 0 to 1, or -1 where it is none."""
        try:
            return float(self.max_bad.removesuffix("%")) / (100 if self.max_bad.endswith("%") else 1)
        except ValueError:
            return -1.0


def check_max_image_mb(value: int, name: str) -> None:
    """Raises ValueError for a limit that no image passes."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
