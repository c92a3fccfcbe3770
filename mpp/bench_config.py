"""What each measurement can be told. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class FewshotBench:
    """Time few-shot least squares for many L2 values against scikit-learn's Ridge in a loop over the values."""

    classes: int = 1000
    """Classes."""
    shots: int = 10
    """Images per class."""
    dim: int = 768
    """Features per image."""
    num_l2: int = 30
    """Values of L2, powers of two around 2**10."""
    num_test: int = 1000
    """Test images whose class is predicted with each value."""
    repeats: int = 3
    """Times that each side is measured, in turns."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 2 if field.name == "classes" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} must be at least {least}, got {getattr(self, field.name)}")


@dataclass(frozen=True)
class DataBench:
    """Time decoding and augmentation beside Pillow and torchvision, the loader, and a very long index."""

    data: str = "demo"
    """The images: a source such as folder:/my/photos. Photographs tell the most."""
    images: int = 300
    """Images of it that are measured, the first ones, read beforehand."""
    size: int = 224
    """Side of the crops, in pixels."""
    repeats: int = 5
    """Times that each side is measured, in turns."""
    workers: int = 2
    """Loader processes whose rate is set beside that of one."""
    entries: int = 10_000_000
    """Images in the index of shards that is opened; 0 leaves that part out."""
    reads: int = 1_000_000
    """Images that a loader worker reads from it while its memory is watched."""

    def __post_init__(self) -> None:
        for key, least in (("images", 1), ("size", 8), ("repeats", 1), ("workers", 1), ("entries", 0), ("reads", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
