"""Settings of pretraining and of the conversion of weights. Free of torch: `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from mpp.data.settings import DataConfig, check_group
from mpp.downstream.settings import check_size
from mpp.model.settings import ModelConfig
from mpp.objective.settings import ObjectiveConfig
from mpp.training.duration import parse_duration
from mpp.training.settings import CheckpointConfig, LogConfig, OptimConfig, ScheduleConfig, TrainConfig


@dataclass(frozen=True)
class FewshotConfig:
    """Few-shot linear regression on frozen features while pretraining runs (section 4.1 and table 5 of the paper)."""

    data: str = field(default="", metadata={"free": True})
    """Labelled source. Empty: none, and no few-shot evaluation. Its own test split is used where it has one."""
    test: str = field(default="", metadata={"free": True})
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    group: str = field(default="", metadata={"free": True})
    """As data.group of fine-tuning: a pattern in the images' names; images of one group are never parted."""
    every: str = field(default="auto", metadata={"free": True})
    """Distance between evaluations, of the features' effective rank, too (log.effective_rank). auto: as many as cost
    less than 2% of the run, at most 20; one always ends it."""
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
        if min(self.shots, default=0) < 1:
            raise ValueError(f"fewshot.shots takes numbers of at least 1, got {list(self.shots)}")
        if min(self.seeds, default=-1) < 0:
            raise ValueError(f"fewshot.seeds takes numbers of at least 0, got {list(self.seeds)}")
        if not self.l2 > 0:
            raise ValueError(f"fewshot.l2 must be positive, got {self.l2}")
        if self.max_test < 1:
            raise ValueError(f"fewshot.max_test must be at least 1, got {self.max_test}")
        check_group(self.group, "fewshot.group")
        if self.test and not self.data:
            raise ValueError("fewshot.test needs fewshot.data, the labelled images to learn from")


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a Vision Transformer without labels by masked patch prediction."""

    run_dir: str = field(default="", metadata={"free": True})
    """Folder of the run: config, metrics, checkpoints, pictures, model. The same command again resumes it."""
    resume: Literal["auto", "force"] = field(default="auto", metadata={"free": True})
    """auto resumes run_dir if its config is the same; force resumes with the changed one."""
    dry_run: bool = field(default=False, metadata={"free": True})
    """Build everything, run two steps and one evaluation, report cost, write nothing."""
    init: str = ""
    """Weights of a ViT to go on from: a run folder, a timm or Hugging Face folder, a JAX .npz or a timm name. Settings
    of model and data with their default values then take those of the weights (so say 224 224, not 224, to mean it).
    Empty: new weights."""
    init_args: tuple[str, ...] = ()
    """Filled in from init: what model.* cannot say of its architecture, such as mlp_ratio=2.0."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    fewshot: FewshotConfig = FewshotConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if self.init_args and not self.init:
            raise ValueError("init_args is filled in from the weights of init; leave it out")


@dataclass(frozen=True)
class ConvertRecipe:
    """Convert weights (a run, JAX .npz, Hugging Face folder or timm name) to a timm or Hugging Face folder or ONNX."""

    init: str = ""
    """What to convert: a run folder or a checkpoint in one, a timm or Hugging Face ViT folder, a JAX .npz, or a timm
    name."""
    out: str = ""
    """Where to: a folder, or a file that ends in .onnx."""
    format: Literal["auto", "timm", "hf", "onnx"] = "auto"
    """auto: ONNX for a name that ends in .onnx, else a timm folder."""
    img_size: tuple[int, ...] = ()
    """Another input size: position embeddings are resampled. Empty: that of the weights."""

    def __post_init__(self) -> None:
        check_size(self.img_size, "img_size")
