"""What each recipe can be told: the parts' own dataclasses, put together. Free of torch: `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from mpp.data.config import MAX_IMAGE_MB, DataConfig, check_max_image_mb
from mpp.downstream.config import FewshotConfig, FinetuneConfig, parse_share
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


Pool = Literal["mean", "token", "mean+token"]
"""Of the patch tokens, the class token, or both side by side."""


@dataclass(frozen=True)
class FrozenConfig:
    """How a frozen encoder runs."""

    img_size: tuple[int, ...] = ()
    """Input size in pixels, one number or height and width. Empty: that of the weights."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the encoder."""
    workers: int = -1
    """Loader processes; -1 takes the cores there are."""
    max_image_mb: int = MAX_IMAGE_MB
    """Most megabytes (10**6 bytes) of an image, as data.max_image_mb; larger ones are left out."""
    cache: bool = True
    """Keep features in $MPP_CACHE or ~/.cache/mpp, by a hash of weights, data and transform."""
    seed: int = 0
    """Of the weights of random: encoders."""

    def __post_init__(self) -> None:
        _check_size(self.img_size, "encoder.img_size")
        if self.workers < -1:
            raise ValueError(f"encoder.workers must be -1 (auto) or at least 0, got {self.workers}")
        check_max_image_mb(self.max_image_mb, "encoder.max_image_mb")
        if self.seed < 0:
            raise ValueError(f"encoder.seed must be at least 0, got {self.seed}")


def _check_different(names: tuple[str, ...], setting: str = "init", what: str = "encoders") -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{setting} takes different {what}, got {' '.join(names)}")


def _check_pool(pool: tuple[str, ...]) -> None:
    if not pool or len(set(pool)) < len(pool):
        raise ValueError(f"pool takes different ones of mean, token and mean+token, got {' '.join(pool) or 'none'}")


def _check_size(img_size: tuple[int, ...], setting: str) -> None:
    if len(img_size) > 2 or any(v < 1 for v in img_size):
        raise ValueError(f"{setting} takes one or two positive numbers, got {list(img_size)}")


@dataclass(frozen=True)
class FewshotRecipe:
    """Few-shot linear regression on frozen features: accuracy by shots for each encoder, layer and pooling."""

    init: tuple[str, ...] = ()
    """Encoders, one or several side by side: run folders, timm or Hugging Face folders, JAX .npz, timm names, or
    random: and one of these."""
    data: str = ""
    """Labelled source, as data.source of the training: folder:DIR with class folders, csv:FILE, ..."""
    test: str = ""
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    download: bool = False
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    out: str = ""
    """Folder for fewshot.csv and fewshot.png, with several layers for layers.png, too. Empty: the table is printed,
    nothing is written."""
    pool: tuple[Pool, ...] = ("mean", "token")
    """Mean of the patch tokens, class token, or both side by side, each in turn. Encoders without a class token have
    the mean alone. Every feature is standardised before the fit, so neither half of mean+token outweighs the other,
    but with twice the features the same l2 regularises half as much: compare them with l2 cv."""
    layers: tuple[int | Literal["all"], ...] = (-1,)
    """Layers that are read, each in turn, or the word all: of ViTs blocks, of others stages; 0 is the first, -1 the
    last, which is read after its norm. Of several layers or poolings each draw chooses one, too, by cross-validation on
    its shots."""
    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Labelled images per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Draws of the shots, one result each."""
    l2: str = "1024"
    """Strength of the L2 regularisation, or cv: chosen for each draw by cross-validation on its shots."""
    max_test: int = 0
    """Most test images, drawn once by a fixed seed; 0: all."""
    encoder: FrozenConfig = FrozenConfig()

    def __post_init__(self) -> None:
        _check_different(self.init)
        _check_pool(self.pool)
        if not self.layers or len(set(self.layers)) < len(self.layers) or ("all" in self.layers and self.layers[1:]):
            raise ValueError(f"layers takes different numbers or the word all, got {' '.join(map(str, self.layers))}")
        if not self.shots or any(k < 1 for k in self.shots) or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots takes different numbers of at least 1, got {list(self.shots)}")
        if not self.seeds or any(s < 0 for s in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds takes different numbers of at least 0, got {list(self.seeds)}")
        if self.max_test < 0:
            raise ValueError(f"max_test must be at least 0, got {self.max_test}")
        try:
            positive = self.l2 == "cv" or 0 < float(self.l2) < float("inf")
        except ValueError:
            positive = False
        if not positive:
            raise ValueError(f"l2 takes a positive number or cv, got {self.l2!r}")


@dataclass(frozen=True)
class ProbeRecipe:
    """Probes on frozen features: a linear classifier or nearest neighbours, from all labels."""

    init: tuple[str, ...] = ()
    """Encoders, one or several side by side, as for the few-shot tool."""
    data: str = ""
    """Labelled source, as data.source of the training: folder:DIR with class folders, csv:FILE, ..."""
    test: str = ""
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    download: bool = False
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    kind: Literal["linear", "knn"] = "linear"
    """linear: logistic regression by L-BFGS; knn: k nearest neighbours by cosine."""
    labels: str = "100%"
    """Share of the labelled training images that is used, the same share of each class."""
    labels_seed: int = 0
    """Which images those are."""
    pool: tuple[Pool, ...] = ("mean", "token")
    """Mean of the patch tokens, class token, or both side by side, each in turn; held-out training images choose one of
    them. Encoders without a class token have the mean alone. linear standardises every feature, so neither half of
    mean+token outweighs the other; in the cosine of knn the half with the longer vectors does."""
    layer: int = -1
    """Whose output is read: of ViTs a block, of others a stage; 0 is the first, -1 the last, which is read after its
    norm."""
    l2: tuple[float, ...] = ()
    """linear: strengths to choose from on a held-out part of the training images. Empty: a grid."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """knn: numbers of neighbours to choose from."""
    temperature: float = 0.07
    """knn: neighbours count by exp(cosine / temperature)."""
    out: str = ""
    """Folder for probe.csv. Empty: nothing is written."""
    encoder: FrozenConfig = FrozenConfig()

    def __post_init__(self) -> None:
        _check_different(self.init)
        _check_pool(self.pool)
        parse_share(self.labels, "labels")
        if any(not 0 < l2 < float("inf") for l2 in self.l2):
            raise ValueError(f"l2 takes positive, finite numbers, got {list(self.l2)}")
        if not self.k or any(k < 1 for k in self.k):
            raise ValueError(f"k takes numbers of at least 1, got {list(self.k)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.labels_seed < 0:
            raise ValueError(f"labels_seed must be at least 0, got {self.labels_seed}")


@dataclass(frozen=True)
class PredictRecipe:
    """Classify images with a fine-tuned model."""

    init: str = ""
    """A fine-tuned run, or any weights with a head: timm or Hugging Face folder, JAX .npz, timm name."""
    images: tuple[str, ...] = ()
    """Image files and folders of images; on the command line they need no --images."""
    top: int = 3
    """Classes named for each image."""
    out: str = ""
    """CSV file to write to instead of printing."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    max_image_mb: int = MAX_IMAGE_MB
    """Most megabytes (10**6 bytes) of an image, as data.max_image_mb; larger ones are left out."""

    def __post_init__(self) -> None:
        check_max_image_mb(self.max_image_mb, "max_image_mb")
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")


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
        _check_size(self.img_size, "img_size")


@dataclass(frozen=True)
class VisualizeRecipe:
    """See what a model learnt, as one page (report.html) and single pictures; or compare several runs."""

    init: str = ""
    """What to look at: a run folder (ended or not), a checkpoint in one, or any other weights, as for fine-tuning."""
    runs: tuple[str, ...] = ()
    """Instead of init: run folders, whose curves and tables are put side by side."""
    data: str = ""
    """Images to look at it with, labelled or not, as data.source of the training. Empty: the run's own."""
    download: bool = False
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    out: str = ""
    """Folder for report.html and figures/. Empty: the run folder."""
    report: bool = False
    """Write report.html alone, without the single pictures in figures/."""
    results: tuple[str, ...] = ()
    """More folders of fine-tuning runs, few-shot tables and studies to tell of; those beside the run are found."""
    images: int = 512
    """Images that features and colours are measured on; attention on a quarter of them, or 128 if that is more."""
    shown: int = 8
    """Images that are drawn."""
    patch: tuple[int, ...] = ()
    """Row and column, from 0, of the patch whose attention is drawn, head by head. Empty: the one in the middle."""
    img_size: tuple[int, ...] = ()
    """Input size in pixels, one number or height and width. Empty: that of the weights."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    workers: int = -1
    """Loader processes; -1 takes the cores there are."""
    max_image_mb: int = MAX_IMAGE_MB
    """Most megabytes (10**6 bytes) of an image, as data.max_image_mb; larger ones are left out. Of a run, its own
    data.max_image_mb counts where that is more."""
    seed: int = 0
    """Of the choice of images and of the untrained twin."""

    def __post_init__(self) -> None:
        _check_different(self.runs, "runs", "run folders")
        if self.images < 128:
            raise ValueError(f"images must be at least 128, or its means say little, got {self.images}")
        if self.shown < 1:
            raise ValueError(f"shown must be at least 1, got {self.shown}")
        if self.patch and (len(self.patch) != 2 or min(self.patch) < 0):
            raise ValueError(f"patch takes a row and a column from 0, got {list(self.patch)}")
        _check_size(self.img_size, "img_size")
        if self.workers < -1:
            raise ValueError(f"workers must be -1 (auto) or at least 0, got {self.workers}")
        check_max_image_mb(self.max_image_mb, "max_image_mb")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


__all__ = [
    "ConvertRecipe",
    "FewshotRecipe",
    "FinetuneConfig",
    "FrozenConfig",
    "PredictRecipe",
    "PretrainConfig",
    "ProbeRecipe",
    "VisualizeRecipe",
]
