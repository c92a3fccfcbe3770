"""Settings of training. Free of torch, so that `--help` is instant.

Durations are texts with a unit: "1000 steps", "90 epochs", "1.28M images", "5%" (of the whole run).
Fields marked free may change between a run and its resumption.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from mpp.config import CHOSEN, Auto
from mpp.training.duration import parse_duration

T = TypeVar("T")


def chosen(value: T | Auto) -> T:
    """A setting after its auto was replaced."""
    assert value != "auto"
    return cast(T, value)


def check_duration(text: str, name: str) -> None:
    """Raises ValueError unless it is a duration or auto."""
    if text != "auto":
        parse_duration(text, name)


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and numerics."""

    length: str = field(default="auto", metadata=CHOSEN)
    """Length of the run: steps, epochs or images. auto: by the number of images, as the docs tell."""
    batch_size: int | Auto = field(default="auto", metadata=CHOSEN)
    """Global batch size: images per update over all devices. auto: by the number of images."""
    micro_batch: int | Auto = field(default="auto", metadata={"free": True})
    """Most images per device in one forward pass; larger shares of the batch are accumulated. The result is the same
    to rounding, but for drop_path, random_from batch, mixup and batch normalisation, which go by micro-batch. auto:
    what fits the memory, on CUDA found by trying."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic: auto takes bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    device: str = field(default="auto", metadata={"free": True})
    """auto, cuda, cuda:1 or cpu. Under torchrun auto and cuda give each process of a machine a GPU of its own."""
    parallel: Literal["ddp", "fsdp"] = field(default="ddp", metadata={"free": True})
    """Under torchrun: ddp keeps the whole model and optimiser on every device; fsdp shares them out (FSDP2), for models
    that do not fit. The result is the same to rounding, and a run may change from one to the other. One process alone
    has nobody to share with: there fsdp changes nothing."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata={"free": True})
    """torch.compile: auto is on for CUDA and off elsewhere, where it gains little. It needs a C compiler and Python's
    headers; where it cannot work, auto says so and goes without."""
    seed: int = 0
    """Every random draw derives from it."""

    def __post_init__(self) -> None:
        length = parse_duration("1 step" if self.length == "auto" else self.length, "train.length")
        if length.unit == "percent" or not length.value:
            raise ValueError(f"train.length needs steps, epochs or images above 0, got {self.length!r}")
        for key in ("batch_size", "micro_batch"):
            if getattr(self, key) != "auto" and getattr(self, key) < 1:
                raise ValueError(f"train.{key} must be at least 1, got {getattr(self, key)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"train.seed must be in [0, 2^31), got {self.seed}")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and its averages. Weight decay spares biases, norms, position embeddings, class and mask tokens."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    """adam is the paper's; adamw decouples the weight decay; sgd has momentum."""
    lr: float | Auto = field(default="auto", metadata=CHOSEN)
    """Base learning rate, reached after the warm-up. auto: by optimiser, batch and width of the encoder."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """Weight decay."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 leaves the gradients alone."""
    ema_decay: float | Auto = field(default=0.0, metadata=CHOSEN)
    """Decay of the exponential moving average of the weights; 0 keeps none; auto: 1 - 10 / steps, at most 0.9998. With
    one, it is what is exported."""

    def __post_init__(self) -> None:
        for key in ("lr", "eps"):
            if getattr(self, key) != "auto" and not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"optim.{key} must be positive and finite, got {getattr(self, key)}")
        for key in ("weight_decay", "clip_norm"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"optim.{key} must not be negative, got {getattr(self, key)}")
        average = 0.0 if self.ema_decay == "auto" else self.ema_decay
        if not all(0 <= b < 1 for b in (*self.betas, self.momentum, average)):
            got = f"{self.betas}, {self.momentum}, {self.ema_decay}"
            raise ValueError(f"optim.betas, optim.momentum and optim.ema_decay must be in [0, 1), got {got}")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run, relative to optim.lr."""

    kind: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    """Decay after the warm-up."""
    warmup: str = field(default="5%", metadata=CHOSEN)
    """Linear warm-up from 0. auto: 5% of a pretraining, 10% of a fine-tuning, at least 20 steps, at most a quarter."""
    cooldown: str = "0 steps"
    """Linear descent to 0 at the end (for constant and rsqrt)."""
    timescale: str = "10000 steps"
    """rsqrt: lr falls as 1 / sqrt(1 + (step - warmup) / timescale)."""

    def __post_init__(self) -> None:
        check_duration(self.warmup, "schedule.warmup")
        parse_duration(self.cooldown, "schedule.cooldown")
        if not parse_duration(self.timescale, "schedule.timescale").value:
            raise ValueError(f"schedule.timescale must be above 0, got {self.timescale!r}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    every: str = field(default="auto", metadata={"free": True})
    """Distance between checkpoints. auto: 5%, but at least 100 steps."""
    keep_last: int = field(default=2, metadata={"free": True})
    """Number of newest checkpoints kept."""
    keep_every: str = field(default="", metadata={"free": True})
    """Distance between checkpoints that are kept for good. Empty: none."""

    def __post_init__(self) -> None:
        check_duration(self.every, "checkpoint.every")
        if self.keep_every:
            parse_duration(self.keep_every, "checkpoint.keep_every")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be at least 1, got {self.keep_last}")


LogTo = Literal["tensorboard", "wandb", "mlflow"]


def check_different(values: Sequence[object], setting: str, what: str, valid: bool = True) -> None:
    """Raises ValueError if a value stands twice, or unless `valid`."""
    if not valid or len(set(values)) < len(values):
        raise ValueError(f"{setting} takes different {what}, got {' '.join(map(str, values)) or 'none'}")


@dataclass(frozen=True)
class RowsConfig:
    """What every run writes down, and how often."""

    every: str = field(default="auto", metadata=CHOSEN)
    """Distance between rows of metrics, each the mean over the steps since the last. auto: 20 rows or more, at most 50
    steps apart."""
    report: bool = field(default=True, metadata={"free": True})
    """Write report.html at the end: what the model learnt, on one page."""
    to: tuple[LogTo, ...] = field(default=("tensorboard",), metadata={"free": True})
    """Where figures go beside metrics.jsonl: tensorboard, wandb (Weights & Biases), mlflow. Project, server and offline
    mode are set by the services' own variables, such as WANDB_PROJECT, WANDB_MODE and MLFLOW_TRACKING_URI."""

    def __post_init__(self) -> None:
        check_duration(self.every, "log.every")
        check_different(self.to, "log.to", "loggers")


@dataclass(frozen=True)
class LogConfig(RowsConfig):
    """What is written down, and how often."""

    pictures: str = field(default="10%", metadata={"free": True})
    """Distance between pictures of reconstructions, always of the same images. Empty: none."""
    num_pictures: int = field(default=8, metadata={"free": True})
    """Images in each picture."""
    effective_rank: bool = field(default=True, metadata={"free": True})
    """Measure, at each evaluation (fewshot.every), with labels or without, how many directions the features of some
    training images use (RankMe): two images for each dimension of the features. Few tell that they collapse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures:
            parse_duration(self.pictures, "log.pictures")
        if self.num_pictures < 1:
            raise ValueError(f"log.num_pictures must be at least 1, got {self.num_pictures}")
