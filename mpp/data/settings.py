"""Settings of the data. Free of torch, so that `--help` is instant."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from mpp.errors import ConfigError

MAX_IMAGE_MB = 700
"""Default of max_image_mb: Pillow's own limit of a decompression bomb, 178,956,970 pixels, at 4 bytes each."""
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
_INF = float("inf")


@dataclass(frozen=True)
class DecodeOptions:
    """How a file's content becomes uint8 pixels. Raises ConfigError for numbers for other channels."""

    channels: int = 3
    value_range: tuple[float, ...] = ()
    """Values that become 0 and 255: low high, or one such pair per channel. (): 0 to the largest of an unsigned
    integer type, 0 to 1 for floating point."""
    background: tuple[int, ...] = (255,)
    """Shows through where an image is transparent, 0 to 255: one number, or one per channel."""
    max_bytes: int = MAX_IMAGE_MB * 10**6
    """Most bytes of an image, as a file and decoded; a larger one is refused before it is read or decoded."""

    def __post_init__(self) -> None:
        _check_range(self.value_range)
        _check_channels("background", self.background, self.channels)
        if len(self.value_range) not in (0, 2, 2 * self.channels):
            what = f"low high, or {self.channels} such pairs, one per channel of the images"
            raise ConfigError(f"data.value_range takes {what}, got {list(self.value_range)}")

    @property
    def pixel_settings(self) -> dict[str, Any]:
        """Those that the pixels depend on: all but the limit."""
        return {"channels": self.channels, "value_range": self.value_range, "background": self.background}

    def flags(self) -> list[str]:
        """The flags by which a training decodes like this; none for defaults."""
        default = DecodeOptions()
        return [
            f"--{name} {flag_numbers(values)}"
            for name, values, usual in (
                ("data.value-range", self.value_range, default.value_range),
                ("data.background", self.background, default.background),
                ("model.in-chans", (self.channels,), (default.channels,)),
                ("data.max-image-mb", (self.max_bytes // 10**6,), (default.max_bytes // 10**6,)),
            )
            if values != usual
        ]


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
    and of the free disk; the training reads the same bits as with none. pixels: always, exact pixels, of images of one
    size."""
    keep: bool = field(default=False, metadata={"free": True})
    """Keep in $MPP_CACHE what is fetched of remote shards."""
    max_bad: str = field(default="1%", metadata={"free": True})
    """Stop once more than this share of the images read could not be decoded."""
    max_image_mb: int = field(default=MAX_IMAGE_MB, metadata={"free": True})
    """Most megabytes (10**6 bytes) of an image: as a file, and decoded, which is height x width x channels x bytes of a
    value, and 4 a pixel at least. A larger one is not read, and counts as one that could not be decoded. While an image
    is decoded, a loader process takes up to five times as much: 3.5 GB at 700."""

    def __post_init__(self) -> None:
        _check_range(self.value_range)
        check_max_image_mb(self.max_image_mb, "data.max_image_mb")
        (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
        for key, fits, rule in (
            ("crop_scale", 0 < low <= high <= 1, "must be two numbers, 0 < low <= high <= 1"),
            ("crop_ratio", 0 < narrow <= wide, "must be two numbers, 0 < low <= high"),
            ("hflip", 0 <= self.hflip <= 1, "is a probability, 0 to 1"),
            ("vflip", 0 <= self.vflip <= 1, "is a probability, 0 to 1"),
            ("grayscale", 0 <= self.grayscale <= 1, "is a probability, 0 to 1"),
            ("jitter", min(self.jitter) >= 0 and self.jitter[3] <= 0.5, "takes strengths from 0, hue at most 0.5"),
            ("std", all(value > 0 for value in self.std), "must be positive"),
            ("background", all(0 <= value <= 255 for value in self.background), "takes numbers from 0 to 255"),
            ("workers", self.workers >= -1, "must be -1 (auto) or at least 0"),
            ("max_bad", 0 <= self.max_bad_share <= 1, "is a share such as 1%"),
        ):
            if not fits:
                value = getattr(self, key)
                shown = list(value) if isinstance(value, tuple) else repr(value)
                raise ValueError(f"data.{key} {rule}, got {shown}")
        if self.keep and self.source and "://" not in f"{self.source} {getattr(self, 'test', '')}":
            raise ValueError(f"data.keep is for remote shards, such as s3://..., and {self.source} is not remote")

    def decode_options(self, channels: int) -> DecodeOptions:
        """How files become pixels of so many channels. Raises ConfigError for settings of another number."""
        for key in ("mean", "std"):
            _check_channels(key, getattr(self, key), channels)
        return DecodeOptions(channels, self.value_range, self.background, self.max_image_mb * 10**6)

    @property
    def max_bad_share(self) -> float:
        """`max_bad` as a number from 0 to 1; -1 where it is not a number."""
        try:
            return float(self.max_bad.removesuffix("%")) / (100 if self.max_bad.endswith("%") else 1)
        except ValueError:
            return -1.0


def flag_numbers(values: Iterable[float]) -> str:
    """Numbers as on a command line, with all their digits: `0 4095 0.25`."""
    return " ".join(repr(float(value)).removesuffix(".0") for value in values)


def check_max_image_mb(value: int, name: str) -> None:
    """Raises ValueError for a limit that no image passes."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_group(pattern: str, name: str) -> None:
    """Raises ValueError unless it is empty or a regular expression with a group, such as `(patient[0-9]+)`."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{name} is no regular expression ({error}), got {pattern!r}") from error
    if pattern and not groups:
        raise ValueError(f"{name} needs brackets around what tells groups apart, as '(patient[0-9]+)', got {pattern!r}")


def _check_range(values: tuple[float, ...]) -> None:
    pairs = zip(values[::2], values[1::2], strict=False)
    if len(values) % 2 or not all(-_INF < low < high < _INF for low, high in pairs):
        raise ConfigError(f"data.value_range takes pairs low high, low < high, got {list(values)}")


def _check_channels(key: str, values: tuple[float, ...], channels: int) -> None:
    if len(values) not in (1, channels):
        raise ConfigError(f"data.{key} takes one number or {channels}, one per channel of the images")
