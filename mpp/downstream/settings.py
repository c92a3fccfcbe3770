"""What the downstream evaluations can be told. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from mpp.data.settings import DataConfig
from mpp.training.schedule import parse_duration
from mpp.training.settings import CheckpointConfig, LogTo, ScheduleConfig, TrainConfig, check_log_to


@dataclass(frozen=True)
class FewshotConfig:
    """Few-shot linear regression on frozen features while pretraining runs (section 4.1 and table 5 of the paper)."""

    data: str = field(default="", metadata={"free": True})
    """Labelled source. Empty: none, and no few-shot evaluation. Its own test split is used where it has one."""
    test: str = field(default="", metadata={"free": True})
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    every: str = field(default="auto", metadata={"free": True})
    """Distance between evaluations. auto: as many as cost less than 2% of the run, at most 20; one always ends it."""
    shots: tuple[int, ...] = field(default=(1, 5, 10, 25), metadata={"free": True})
    """Labelled images per class."""
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"free": True})
    """Draws of the shots, one result each."""
    l2: float = field(default=2.0**10, metadata={"free": True})
    """Strength of the L2 regularisation."""
    max_test: int = field(default=2000, metadata={"free": True})
    """Most test images, drawn once by a fixed seed."""

    def __post_init__(self) -> None:
        if self.every != "auto":
            parse_duration(self.every, "fewshot.every")
        if not self.shots or any(k < 1 for k in self.shots):
            raise ValueError(f"fewshot.shots takes numbers of at least 1, got {list(self.shots)}")
        if not self.seeds or any(s < 0 for s in self.seeds):
            raise ValueError(f"fewshot.seeds takes numbers of at least 0, got {list(self.seeds)}")
        if not self.l2 > 0:
            raise ValueError(f"fewshot.l2 must be positive, got {self.l2}")
        if self.max_test < 1:
            raise ValueError(f"fewshot.max_test must be at least 1, got {self.max_test}")
        if self.test and not self.data:
            raise ValueError("fewshot.test needs fewshot.data, the labelled images to learn from")


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier: the encoder that `init` names, or a new one, with a head on top."""

    name: str = ""
    """With --init none: any timm name, such as vit_tiny_patch16_224 or resnet18."""
    img_size: tuple[int, ...] = ()
    """Input size in pixels, one number or height and width. Empty: that of the weights. Positions are resampled."""
    patch_size: tuple[int, ...] = ()
    """With --init none: patch size in pixels. Empty: the size in the name."""
    embed_dim: int | None = None
    """With --init none: token width. None: the width in the name."""
    depth: int | None = None
    """With --init none: number of transformer blocks. None: the depth in the name."""
    num_heads: int | None = None
    """With --init none: attention heads. None: the number in the name."""
    in_chans: int = 3
    """With --init none: image channels."""
    pool: Literal["auto", "avg", "token"] = "auto"
    """What a ViT's head reads: mean of the patch tokens or class token. auto: as the weights do; none: avg."""
    head: Literal["linear", "tanh", "keep"] = "linear"
    """A new linear layer, zero-initialised; the paper's head for pre-training, with a hidden tanh layer; the init's."""
    representation: int = 0
    """Width of the tanh head's hidden layer; 0: the encoder's."""
    drop_path: float = 0.0
    """Stochastic depth rate at the last block, rising linearly from 0."""
    attention: Literal["auto", "xformers", "sdpa", "explicit"] = "auto"
    """Attention kernel of ViTs: auto takes the faster at the start, on CUDA of xformers (where it runs) and sdpa, on a
    CPU of sdpa and explicit, which needs more memory."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a second forward pass."""

    def __post_init__(self) -> None:
        for key in ("img_size", "patch_size"):
            value = getattr(self, key)
            if len(value) > 2 or any(v < 1 for v in value):
                raise ValueError(f"model.{key} takes one or two positive numbers, got {list(value)}")
        for key in ("embed_dim", "depth", "num_heads", "in_chans"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"model.{key} must be at least 1, got {value}")
        if self.representation < 0:
            raise ValueError(f"model.representation must be at least 0, got {self.representation}")
        if self.representation and self.head != "tanh":
            raise ValueError(f"model.representation is for model.head tanh, not {self.head}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path must be in [0, 1), got {self.drop_path}")


@dataclass(frozen=True)
class LabelledConfig(DataConfig):
    """Labelled images, how many of the labels are used, and how the images are augmented."""

    test: str = ""
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    labels: str = "100%"
    """Share of the labelled training images that is used, the same share of each class."""
    labels_seed: int = 0
    """Which images those are; a smaller share is part of a larger one."""
    holdout: str = "10%"
    """Share of the training images on which a sweep over several optim.lr chooses."""
    randaugment: str = ""
    """timm's RandAugment, such as rand-m9-mstd0.5-inc1. Empty: none."""
    mean: tuple[float, ...] = ()
    """Normalisation mean on a 0 to 1 scale, one number or one per channel. Empty: that of the weights (none: 0.5)."""
    std: tuple[float, ...] = ()
    """Normalisation standard deviation on a 0 to 1 scale. Empty: that of the weights (none: 0.5)."""
    value_range: tuple[float, ...] = ()
    """Values that become black and white: low high, or such a pair per channel. Empty: that of the weights."""
    background: tuple[int, ...] = ()
    """Shows through where an image is transparent, 0 to 255. Empty: that of the weights (none: 255)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_share(self.labels, "data.labels")
        if parse_share(self.holdout, "data.holdout") == 1:
            raise ValueError(f"data.holdout must leave images to train on, such as 10%, got {self.holdout!r}")
        if self.labels_seed < 0:
            raise ValueError(f"data.labels_seed must be at least 0, got {self.labels_seed}")


def parse_share(text: str, name: str = "a share") -> float:
    """`1%` or `0.01` as 0.01.

    Raises:
        ValueError: no such number, or not above 0 and up to 1 (100%).
    """
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise ValueError(f"{name} is above 0% and up to 100%, such as 1% or 0.01; got {text!r}")
    return share


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy, and what softens its targets (timm's parts)."""

    smoothing: float = 0.0
    """Label smoothing."""
    mixup: float = 0.0
    """Mixup's alpha; 0: none. With cutmix, too, one of the two is drawn for each batch."""
    cutmix: float = 0.0
    """CutMix's alpha; 0: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"loss.smoothing must be in [0, 1), got {self.smoothing}")
        for key in ("mixup", "cutmix"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"loss.{key} must not be negative, got {getattr(self, key)}")


@dataclass(frozen=True)
class FinetuneOptimConfig:
    """Optimiser and its averages. Weight decay spares biases, norms, position embeddings and class token."""

    name: Literal["sgd", "adamw", "adam"] = "sgd"
    """sgd with momentum is the paper's."""
    lr: tuple[float, ...] = (0.01,)
    """Base learning rate. Several: each is tried, the best on a held-out part of the training images is taken."""
    momentum: float = 0.9
    """Of sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adam and adamw: decay rates of the first and second moment."""
    eps: float = 1e-8
    """Of adam and adamw."""
    weight_decay: float = 0.0
    """Weight decay."""
    layer_decay: float = 1.0
    """Each layer's learning rate is this share of that of the layer above."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 leaves the gradients alone."""
    ema_decay: float = 0.0
    """Polyak averaging: decay of the moving average of the weights, such as 0.9999; 0 keeps none. It is what is tested
    and exported."""

    def __post_init__(self) -> None:
        if not self.lr or any(not 0 < lr < float("inf") for lr in self.lr) or len(set(self.lr)) < len(self.lr):
            raise ValueError(f"optim.lr takes different positive numbers, got {list(self.lr)}")
        if not self.eps > 0:
            raise ValueError(f"optim.eps must be positive, got {self.eps}")
        for key in ("weight_decay", "clip_norm"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"optim.{key} must not be negative, got {getattr(self, key)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if not all(0 <= b < 1 for b in (*self.betas, self.momentum, self.ema_decay)):
            told = f"{self.betas}, {self.momentum}, {self.ema_decay}"
            raise ValueError(f"optim.betas, optim.momentum and optim.ema_decay must be in [0, 1), got {told}")


@dataclass(frozen=True)
class FinetuneLogConfig:
    """What is written down, and how often."""

    every: str = "50 steps"
    """Distance between rows of metrics, each the mean over the steps since the last."""
    evaluate: str = field(default="", metadata={"free": True})
    """Distance between evaluations on the test images. Empty: at the end alone."""
    report: bool = field(default=True, metadata={"free": True})
    """Write report.html at the end: what the model learnt, on one page."""
    to: tuple[LogTo, ...] = field(default=("tensorboard",), metadata={"free": True})
    """Where figures go beside metrics.jsonl: tensorboard, wandb (Weights & Biases), mlflow. Project, server and offline
    mode are set by the services' own variables, such as WANDB_PROJECT, WANDB_MODE and MLFLOW_TRACKING_URI."""

    def __post_init__(self) -> None:
        parse_duration(self.every, "log.every")
        check_log_to(self.to)
        if self.evaluate:
            parse_duration(self.evaluate, "log.evaluate")


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune an encoder, or train one from scratch, to classify labelled images."""

    init: str = ""
    """A run folder, a timm or Hugging Face ViT folder, a JAX .npz, a timm name; random: and one of these for its
    architecture alone; none for a new model by --model.name."""
    run_dir: str = field(default="", metadata={"free": True})
    """Folder of the run: config, metrics, checkpoints, results, model. The same command again resumes it."""
    resume: Literal["auto", "force"] = field(default="auto", metadata={"free": True})
    """auto resumes run_dir if its config is the same; force resumes with the changed one."""
    model: ClassifierConfig = ClassifierConfig()
    data: LabelledConfig = LabelledConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig(length="10k steps", batch_size=512)
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: FinetuneLogConfig = FinetuneLogConfig()
