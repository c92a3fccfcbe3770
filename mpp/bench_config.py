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
