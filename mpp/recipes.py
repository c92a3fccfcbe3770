"""What each recipe can be told: the parts' own dataclasses, put together. Free of torch: `--help` is instant."""

from dataclasses import dataclass, field
from typing import Literal

from mpp.data.config import DataConfig
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
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    fewshot: FewshotConfig = FewshotConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


@dataclass(frozen=True)
class FrozenConfig:
    """How a frozen encoder is read."""

    layer: int = -1
    """Whose output: of ViTs a block, of others a stage; 0 is the first, -1 the last, which is read after its norm."""
    img_size: tuple[int, ...] = ()
    """Input size in pixels, one number or height and width. Empty: that of the weights."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the encoder."""
    workers: int = -1
    """Loader processes; -1 takes the cores there are."""
    cache: bool = True
    """Keep features in $MPP_CACHE or ~/.cache/mpp, by a hash of weights, data and transform."""
    seed: int = 0
    """Of the weights of random: encoders."""

    def __post_init__(self) -> None:
        _check_size(self.img_size, "encoder.img_size")
        if self.workers < -1:
            raise ValueError(f"encoder.workers must be -1 (auto) or at least 0, got {self.workers}")
        if self.seed < 0:
            raise ValueError(f"encoder.seed must be at least 0, got {self.seed}")


def _check_different(names: tuple[str, ...], setting: str = "init", what: str = "encoders") -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{setting} takes different {what}, got {' '.join(names)}")


def _check_size(img_size: tuple[int, ...], setting: str) -> None:
    if len(img_size) > 2 or any(v < 1 for v in img_size):
        raise ValueError(f"{setting} takes one or two positive numbers, got {list(img_size)}")


@dataclass(frozen=True)
class FewshotRecipe:
    """Few-shot linear regression on frozen features: a table of accuracy by shots, one column a model and pooling."""

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
    """Folder for fewshot.csv and fewshot.png. Empty: the table is printed, nothing is written."""
    pool: Literal["both", "mean", "token"] = "both"
    """Mean of the patch tokens, class token, or each in turn. Encoders without a class token have the mean alone."""
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
    pool: Literal["both", "mean", "token"] = "both"
    """Mean of the patch tokens, class token, or each in turn."""
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

    def __post_init__(self) -> None:
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
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


@dataclass(frozen=True)
class StudyConfig:
    """What the pretraining is worth: fine-tune the pretrained encoder and the same one from scratch, with the same
    recipe and budget, at several shares of the labels and with several seeds; few-shot on both; one table."""

    run_dir: str = field(default="", metadata={"free": True})
    """Folder of the study: its runs, table and pictures. The same command again goes on where it stopped."""
    data: str = ""
    """Labelled source, as data.source of the training. It is pretrained on, too, without its labels, where
    pretrain.data.source is empty."""
    test: str = ""
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    init: str = ""
    """Weights to take instead of pretraining: a run folder or whatever else the fine-tuning tool takes."""
    labels: tuple[str, ...] = field(default=("1%", "10%", "100%"), metadata={"free": True})
    """Shares of the labels."""
    lengths: tuple[str, ...] = field(default=(), metadata={"free": True})
    """Length of the fine-tuning for each of these shares. Empty: finetune.train.length for all."""
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"free": True})
    """Each draws its own share of the labels, order, augmentation and new weights; the same ones for both encoders."""
    shots: tuple[int, ...] = field(default=(1, 5, 10, 25), metadata={"free": True})
    """Few-shot: labelled images per class."""
    layers: tuple[int, ...] = field(default=(-1,), metadata={"free": True})
    """Few-shot: layers that are read, such as -1 -2 -3."""
    l2: str = field(default="1024", metadata={"free": True})
    """Few-shot: strength of the L2 regularisation, or cv."""
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    def __post_init__(self) -> None:
        for key in ("labels", "seeds", "shots", "layers"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{key} takes different values, at least one, got {list(values)}")
        for share in self.labels:
            parse_share(share, "labels")
        if self.lengths and len(self.lengths) != len(self.labels):
            raise ValueError(f"lengths takes one length for each of the {len(self.labels)} labels, or none")
        FewshotRecipe(shots=self.shots, seeds=self.seeds, l2=self.l2)  # checks them
        self._check_what_it_sets()

    def _check_what_it_sets(self) -> None:
        """Refuses settings of the two recipes that the study sets itself."""
        tuned, default = self.finetune, FinetuneConfig()
        instead = {
            "finetune.init": (tuned.init, default.init, "init"),
            "finetune.run_dir": (tuned.run_dir, default.run_dir, "run_dir"),
            "finetune.data.source": (tuned.data.source, default.data.source, "data"),
            "finetune.data.test": (tuned.data.test, default.data.test, "test"),
            "finetune.data.labels": (tuned.data.labels, default.data.labels, "labels"),
            "finetune.data.labels_seed": (tuned.data.labels_seed, default.data.labels_seed, "seeds"),
            "finetune.train.seed": (tuned.train.seed, default.train.seed, "seeds"),
            "pretrain.run_dir": (self.pretrain.run_dir, "", "run_dir"),
            "pretrain.dry_run": (self.pretrain.dry_run, False, "the pretraining tool for it"),
        }
        for name, (value, usual, other) in instead.items():
            if value != usual:
                raise ValueError(f"{name} is set by the study; use {other}, got {value!r}")
        if self.lengths and tuned.train.length != default.train.length:
            raise ValueError("lengths and finetune.train.length say the same; give one of them")


__all__ = [
    "ConvertRecipe",
    "FewshotRecipe",
    "FinetuneConfig",
    "FrozenConfig",
    "PredictRecipe",
    "PretrainConfig",
    "ProbeRecipe",
    "StudyConfig",
    "VisualizeRecipe",
]
