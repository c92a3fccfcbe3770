"""A small recipe of settings."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Encoder:
    """The encoder."""

    name: str = "vit_base"
    """Name in timm."""
    size: tuple[int, ...] = (224,)
    """Pixels."""
    width: int | None = None
    """Token width."""
    remat: bool = False
    """Recompute activations."""


@dataclass(frozen=True)
class Optimiser:
    """The optimiser."""

    lr: float = 2e-4
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates."""
    kind: Literal["adam", "adamw"] = "adamw"
    """Which one."""
    log_every: str = field(default="50 steps", metadata={"free": True})
    """Distance between rows."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class Source:
    """The data."""

    source: str = ""
    """Where the images are."""
    workers: int = -1
    """Processes."""


@dataclass(frozen=True)
class Recipe:
    """A small recipe."""

    run_dir: str = field(default="", metadata={"free": True})
    """Folder of the run."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to compile."""
    dry_run: bool = False
    """Write nothing."""
    encoder: Encoder = Encoder(name="vit_small")
    optim: Optimiser = Optimiser()
    data: Source = field(default=Source(), metadata={"free": True})
