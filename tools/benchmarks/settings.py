"""Settings of the measurements. Free of torch: `--help` is instant."""

import re
from dataclasses import dataclass
from typing import Literal

from mpp.pretraining.settings import PretrainConfig
from mpp.training.duration import parse_duration


def _at_least(config: object, **least: int) -> None:
    """Refuses settings below their least value."""
    for key, value in least.items():
        if getattr(config, key) < value:
            raise ValueError(f"{key} must be at least {value}, got {getattr(config, key)}")


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
        _at_least(self, classes=2, shots=1, dim=1, num_l2=1, num_test=1, repeats=1)


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
        _at_least(self, images=1, size=8, repeats=1, workers=1, entries=0, reads=0)


@dataclass(frozen=True)
class StepBench:
    """Time the training step beside timm's supervised step, other masked image modelling, and a matrix product."""

    models: tuple[str, ...] = ()
    """timm names. Empty: vit_small_patch16_224; on CUDA Ti/16, S/16, B/16 and L/16."""
    img_size: tuple[int, ...] = (224,)
    """Input size in pixels: one number for a square, two for height and width."""
    patch_size: tuple[int, ...] = ()
    """Patch size in pixels. Empty: the size in the name."""
    batch: int = 0
    """Images per step; what does not fit in the memory of a GPU is halved. 0: 16; on CUDA 256."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic: auto takes bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, for every side but those at their own defaults: auto is on for CUDA and off elsewhere."""
    repeats: int = 5
    """Times that each side is measured, in turns."""
    peers: Literal["on", "off"] = "on"
    """off leaves out vit-pytorch and transformers."""
    data: str = "demo"
    """Source whose wait for data is measured in a short run; empty leaves that out."""

    def __post_init__(self) -> None:
        _at_least(self, batch=0, repeats=1)


@dataclass(frozen=True)
class TrainingBench:
    """Time whole pretraining runs, from the loader to the log, of this checkout beside another one of the project."""

    against: str = ""
    """Folder of the other checkout, such as a git worktree of an older commit. Empty: this one alone is measured."""
    recipes: tuple[str, ...] = (
        "study/benefit_cpu.yaml: --data.source demo",
        "study/benefit_cpu.yaml: --data.source demo --model.img-size 48",
        "pretrain/demo.yaml",
    )
    """What is trained, each "FILE" or "FILE: FLAGS": a config of pretraining, or of a study, whose pretraining is
    taken; by its path, or as it is named below this checkout's configs. Both sides get what it sets; each has its own
    defaults for the rest."""
    precision: tuple[Literal["bf16", "fp16", "fp32"], ...] = ()
    """Arithmetic, each in turn. Empty: what auto takes here, and fp32."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    steps: int = 100
    """Length of each run; its first quarter does not count."""
    repeats: int = 3
    """Times that each side is measured, in turns."""

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ValueError("recipes takes at least one, such as pretrain/demo.yaml")
        _at_least(self, steps=20, repeats=1)  # 20: a row of the log each, of which the first quarter does not count


@dataclass(frozen=True)
class AttentionBench:
    """Time the attention kernels beside each other, forward and backward, for the token counts of usual ViTs."""

    sizes: tuple[str, ...] = ("32/4", "224/16", "384/16", "518/14")
    """Side of the image and of its patches, in pixels; there is one class token beside the patches."""
    tokens: int = 65_536
    """Tokens in a batch, over all its images."""
    heads: int = 12
    """Attention heads."""
    width: int = 64
    """Features of a head."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic: auto takes bf16 where the hardware has it."""
    repeats: int = 7
    """Times that each kernel is measured, in turns."""

    def __post_init__(self) -> None:
        _at_least(self, tokens=1, heads=1, width=1, repeats=1)
        for size in self.sizes:
            sides = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", size, re.ASCII)
            if not sides or int(sides[1]) % int(sides[2]):
                raise ValueError(f"sizes takes an image side and a patch side that divides it, as 224/16, got {size!r}")


PLAN_ALIASES = {
    "data": "data.source",
    "model": "model.name",
    "optim": "optim.name",
    "ema": "optim.ema_decay",
    "ratio": "objective.ratio",
    **{name: f"model.{name}" for name in ("img_size", "patch_size", "grad_checkpointing")},
    **{name: f"train.{name}" for name in ("batch_size", "micro_batch", "precision", "parallel")},
}
"""Short names of the settings of a run that a plan turns on."""


@dataclass(frozen=True)
class PlanBench(PretrainConfig):
    """What a pretraining run with these settings costs, on paper: FLOPs, memory, time, loader, storage, traffic."""

    device: str = "h200"
    """h200, h100, a100-80, a100-40, l40s, rtx4090, v100 or cpu."""
    devices: int = 1
    """Devices that the run has."""
    per_node: int = 8
    """Devices in one machine."""
    images: str = "1.28M"
    """Images of the source, as a number: 1281167 or 1.28M."""
    epochs: float | None = None
    """Passes over them. None: train.length."""
    efficiency: float = 0.4
    """Share of the data sheet's peak that training attains."""
    images_per_second: float = 0.0
    """Of one device in whole steps, as measured; with it the efficiency is not asked. 0: not measured."""
    images_per_core: float = 680.0
    """Images that a core reads and augments in a second (`bench data` measures it)."""
    image_kib: float = 26.0
    """Mean size of an image file; the default is that of photographs at 256 pixels, JPEG quality 90."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_images  # noqa: B018  (raises)
        if not self.device:
            raise ValueError("device must be a name, such as h200")
        _at_least(self, devices=1, per_node=1)
        for key in ("images_per_core", "image_kib", "epochs"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{key} must be above 0, got {value}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency is a share, above 0 and at most 1, got {self.efficiency}")
        if not 0 <= self.images_per_second < float("inf"):
            raise ValueError(f"images_per_second must be at least 0, got {self.images_per_second}")

    @property
    def num_images(self) -> int:
        """`images` as a number."""
        try:
            number = parse_duration(f"{self.images} images", "images").value
        except ValueError:
            number = 0.0
        if not 1 <= number < float("inf"):
            raise ValueError(f"images takes a number such as 50000, 1.3M or 14M, got {self.images!r}")
        return round(number)


@dataclass(frozen=True)
class SavingBench:
    """Time how long training stops to save itself, beside writing the same state at once."""

    model: str = "vit_large_patch16_224"
    """timm name; its state is weights and Adam's two moments, fp32."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    folder: str = ""
    """Folder in which the checkpoints are written, and removed again. Empty: one for temporary files."""
    repeats: int = 3
    """Times that each side is measured, in turns."""

    def __post_init__(self) -> None:
        _at_least(self, repeats=1)


@dataclass(frozen=True)
class GpuBench:
    """Every measurement that needs a CUDA device, briefly, as one table."""

    models: tuple[str, ...] = ("vit_base_patch16_224", "vit_large_patch16_224")
    """timm names; other libraries are measured at the first alone."""
    batch: int = 256
    """Images per step; what does not fit is halved."""
    repeats: int = 3
    """Times that each side is measured, in turns."""
    workers: int = 8
    """Loader processes."""

    def __post_init__(self) -> None:
        _at_least(self, batch=1, repeats=1, workers=1)
