"""What each recipe can be told: the parts' own dataclasses, put together. Free of torch: `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from mpp.data.config import DataConfig
from mpp.downstream.config import FewshotConfig
from mpp.model.config import ModelConfig
from mpp.objective.config import ObjectiveConfig
from mpp.train.config import CheckpointConfig, LogConfig, OptimConfig, ScheduleConfig, TrainConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a Vision Transformer without labels by masked patch prediction."""

    run_dir: str = field(default="", metadata={"free": True})
    """Folder of the run: config, metrics, checkpoints, pictures, model. The same command again resumes it."""
    resume: Literal["auto", "force"] = field(default="auto", metadata={"free": True})
    """auto resumes run_dir if its config is the same; force resumes with the changed one."""
    dry_run: bool = field(default=False, metadata={"free": True})
    """Build everything, run two steps and one evaluation, report cost, write nothing."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    fewshot: FewshotConfig = FewshotConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
