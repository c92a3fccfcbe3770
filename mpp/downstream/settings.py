"""Settings of fine-tuning and of the tools that evaluate frozen features. Free of torch, for `--help`."""

from dataclasses import dataclass, field
from typing import Literal

from mpp.config import CHOSEN, Auto
from mpp.data.settings import MAX_IMAGE_MB, DataConfig, check_group, check_max_image_mb
from mpp.training.duration import parse_duration
from mpp.training.settings import (
    CheckpointConfig,
    OptimConfig,
    RowsConfig,
    ScheduleConfig,
    TrainConfig,
    check_different,
)

Pool = Literal["mean", "token", "mean+token", "quarters"]
"""Mean of the patch tokens, the class token, both side by side, or the means of the image's quarters side by side."""


def parse_share(text: str, name: str = "a share") -> float:
    """Reads `1%` or `0.01` as 0.01; raises ValueError unless it is above 0 and up to 1 (100%)."""
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise ValueError(f"{name} is above 0% and up to 100%, such as 1% or 0.01; got {text!r}")
    return share


def check_size(size: tuple[int, ...], setting: str) -> None:
    """Raises ValueError unless it is empty, or one or two positive numbers."""
    if len(size) > 2 or any(v < 1 for v in size):
        raise ValueError(f"{setting} takes one or two positive numbers, got {list(size)}")


def check_at_least(least: int, config: object, *keys: str, prefix: str = "") -> None:
    """Raises ValueError where one of these settings is set and lower."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < least:
            raise ValueError(f"{prefix}{key} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier: the encoder that `init` names, or a new one, with a head on top."""

    name: str = ""
    """With --init none: any timm name. With a single file of weights: theirs, where their shapes do not say it."""
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
    head: Literal["linear", "probe", "tanh", "keep"] | Auto = field(default="linear", metadata=CHOSEN)
    """linear: a new layer, zero-initialised; probe: one fitted to the frozen encoder first; tanh: the paper's for
    pre-training, with a hidden layer; keep: the init's. auto: probe if pretrained, up to 50,000 images, else linear."""
    representation: int = 0
    """Width of the tanh head's hidden layer; 0: the encoder's."""
    drop_path: float = 0.0
    """Stochastic depth rate at the last block, rising linearly from 0."""
    attention: Literal["auto", "xformers", "sdpa", "explicit"] = "auto"
    """Attention kernel of ViTs: auto takes the fastest that runs here; explicit needs more memory than the others."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a second forward pass."""

    def __post_init__(self) -> None:
        check_size(self.img_size, "model.img_size")
        check_size(self.patch_size, "model.patch_size")
        check_at_least(1, self, "embed_dim", "depth", "num_heads", "in_chans", prefix="model.")
        check_at_least(0, self, "representation", prefix="model.")
        if self.representation and self.head != "tanh":
            raise ValueError(f"model.representation is for model.head tanh, not {self.head}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path must be in [0, 1), got {self.drop_path}")


@dataclass(frozen=True)
class LabelledConfig(DataConfig):
    """Labelled images, how many of the labels are used, and how the images are augmented."""

    test: str = ""
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    group: str = ""
    """Keeps images of a group together: a pattern on their names, '(patient[0-9]+)'. Empty: a CSV's column group."""
    labels: str = "100%"
    """Share of the labelled training images that is used, the same share of each class."""
    labels_seed: int = 0
    """Which images those are; a smaller share is part of a larger one."""
    holdout: str = "10%"
    """Share of the training images on which a sweep over several optim.lr chooses, without a validation split."""
    randaugment: str = field(default="", metadata=CHOSEN)
    """timm's RandAugment. Empty: none; auto: rand-m9-mstd0.5-inc1 for many passes over images that are not many."""
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
        check_group(self.group, "data.group")
        if parse_share(self.holdout, "data.holdout") == 1:
            raise ValueError(f"data.holdout must leave images to train on, such as 10%, got {self.holdout!r}")
        check_at_least(0, self, "labels_seed", prefix="data.")


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy, and what softens its targets (timm's parts)."""

    smoothing: float = 0.0
    """Label smoothing."""
    mixup: float | Auto = field(default=0.0, metadata=CHOSEN)
    """Mixup's alpha; 0: none; auto: 0.8 from 100 passes over the images on. With cutmix, a batch has one of the two."""
    cutmix: float | Auto = field(default=0.0, metadata=CHOSEN)
    """CutMix's alpha; 0: none; auto: 1 where mixup auto is 0.8."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"loss.smoothing must be in [0, 1), got {self.smoothing}")
        for key in ("mixup", "cutmix"):
            if getattr(self, key) != "auto" and not getattr(self, key) >= 0:
                raise ValueError(f"loss.{key} must not be negative, got {getattr(self, key)}")


@dataclass(frozen=True)
class FinetuneOptimConfig:
    """Optimiser and its averages. Weight decay spares biases, norms, position embeddings and class token."""

    name: Literal["sgd", "adamw", "adam"] = "sgd"
    """sgd with momentum is the paper's."""
    lr: tuple[float | Auto, ...] = field(default=("auto",), metadata=CHOSEN)
    """Base learning rate; auto: by batch and width. Of several, the best on held-out training images is taken."""
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
    ema_decay: float | Auto = field(default=0.0, metadata=CHOSEN)
    """Decay of the moving average of the weights, which is tested and exported; 0: none; auto: 1 - 10 / steps."""

    def __post_init__(self) -> None:
        wrong = any(lr == "auto" or not 0 < lr < float("inf") for lr in self.lr) and self.lr != ("auto",)
        if not self.lr or wrong or len(set(self.lr)) < len(self.lr):
            raise ValueError(f"optim.lr takes different positive numbers, or auto alone, got {list(self.lr)}")
        common = ("betas", "eps", "momentum", "weight_decay", "clip_norm", "ema_decay")
        OptimConfig(**{key: getattr(self, key) for key in common})  # checks them
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be above 0 and at most 1, got {self.layer_decay}")


@dataclass(frozen=True)
class FinetuneLogConfig(RowsConfig):
    """Which figures are written, and how often."""

    evaluate: str = field(default="", metadata={"free": True})
    """Distance between evaluations on the test images. Empty: at the end alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    train: TrainConfig = TrainConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: FinetuneLogConfig = FinetuneLogConfig()


@dataclass(frozen=True)
class EncoderConfig:
    """How an encoder runs that is not trained."""

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
    seed: int = 0
    """Of the weights of random: encoders."""

    def __post_init__(self) -> None:
        check_size(self.img_size, "encoder.img_size")
        if self.workers < -1:
            raise ValueError(f"encoder.workers must be -1 (auto) or at least 0, got {self.workers}")
        check_max_image_mb(self.max_image_mb, "encoder.max_image_mb")
        check_at_least(0, self, "seed", prefix="encoder.")


@dataclass(frozen=True)
class FrozenConfig(EncoderConfig):
    """How a frozen encoder runs whose features are kept."""

    cache: bool = True
    """Keep features in $MPP_CACHE or ~/.cache/mpp, by a hash of weights, data and transform."""


@dataclass(frozen=True)
class _FrozenRecipe:
    """The encoders and labelled images of the tools that evaluate frozen features."""

    init: tuple[str, ...] = ()
    """Encoders, one or several side by side: run folders, timm or Hugging Face folders, JAX .npz, timm names, or
    random: and one of these."""
    data: str = ""
    """Labelled source, as data.source of the training: folder:DIR with class folders, csv:FILE, ..."""
    test: str = ""
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    group: str = ""
    """As data.group of fine-tuning: images of one group are never parted."""
    download: bool = False
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    pool: tuple[Pool, ...] = ("mean", "token")
    """Mean of the patch tokens, class token of encoders that have one, both side by side, or of ViTs the means of the
    four quarters of the image side by side (they tell where in the image something is, and are four times as many),
    each in turn. Linear fits standardise every feature, so neither half of mean+token outweighs the other, but one l2
    regularises twice the features half as much; in the cosine of knn the half with the longer vectors counts more."""
    encoder: FrozenConfig = FrozenConfig()

    def __post_init__(self) -> None:
        check_different(self.init, "init", "encoders")
        check_group(self.group, "group")
        check_different(self.pool, "pool", "ones of mean, token, mean+token and quarters", valid=bool(self.pool))


@dataclass(frozen=True)
class FewshotRecipe(_FrozenRecipe):
    """Few-shot linear regression on frozen features: accuracy by shots for each encoder, layer and pooling."""

    out: str = ""
    """Folder for fewshot.csv, fewshot.png and, with several layers, layers.png. Empty: nothing is written."""
    layers: tuple[int | Literal["all"], ...] = (-1,)
    """Layers to read in turn, or all: blocks of ViTs, stages of others; 0 is the first, -1 the last, after its norm. Of
    several layers or poolings each draw also chooses one, by cross-validation on its shots."""
    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Labelled images per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Draws of the shots, one result each."""
    l2: str = "1024"
    """Strength of the L2 regularisation, or cv: chosen for each draw by cross-validation on its shots."""
    max_test: int = 0
    """Most test images, drawn once by a fixed seed; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = "all" not in self.layers or len(self.layers) == 1
        check_different(self.layers, "layers", "numbers or the word all", valid=bool(self.layers) and alone)
        check_different(self.shots, "shots", "numbers of at least 1", valid=min(self.shots, default=0) >= 1)
        check_different(self.seeds, "seeds", "numbers of at least 0", valid=min(self.seeds, default=-1) >= 0)
        check_at_least(0, self, "max_test")
        try:
            valid = self.l2 == "cv" or 0 < float(self.l2) < float("inf")
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"l2 takes a positive number or cv, got {self.l2!r}")


@dataclass(frozen=True)
class ProbeRecipe(_FrozenRecipe):
    """Probes on frozen features: a linear classifier, nearest neighbours or attention to patches, from all labels."""

    kind: Literal["linear", "knn", "attentive"] = "linear"
    """linear: logistic regression by L-BFGS; knn: k nearest neighbours by cosine; attentive: learnt queries over the
    patch tokens of a ViT and a linear classifier, trained by AdamW; class token and registers are left out."""
    labels: str = "100%"
    """Share of the labelled training images that is used, the same share of each class."""
    labels_seed: int = 0
    """Which images those are."""
    layer: int = -1
    """Layer to read: a block of ViTs, a stage of others; 0 is the first, -1 the last, after its norm."""
    l2: tuple[float, ...] = ()
    """linear: strengths to choose from on a held-out part of the training images. Empty: a grid."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """knn: numbers of neighbours to choose from."""
    temperature: float = 0.07
    """knn: neighbours count by exp(cosine / temperature)."""
    queries: int = 8
    """attentive: most queries; the largest number up to it that divides the width of a token is taken."""
    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """attentive: learning rates to choose from, as l2."""
    weight_decay: tuple[float, ...] = (1e-2, 1e-1)
    """attentive: weight decays to choose from, each with each rate."""
    epochs: int = 0
    """attentive: passes over the training images. 0: 20, or as many as make 1,000 steps."""
    seed: int = 0
    """attentive: of the first weights and the order of images."""
    out: str = ""
    """Folder for probe.csv. Empty: nothing is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_share(self.labels, "labels")
        for name, least in (("l2", "positive, "), ("lr", "positive, "), ("weight_decay", "")):
            values = getattr(self, name)
            if any(not 0 <= value < float("inf") or (least and not value) for value in values):
                raise ValueError(f"{name} takes {least}finite numbers, got {list(values)}")
        for name in ("lr", "weight_decay"):
            check_different(getattr(self, name), name, "numbers", valid=bool(getattr(self, name)))
        if min(self.k, default=0) < 1:
            raise ValueError(f"k takes numbers of at least 1, got {list(self.k)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        check_at_least(0, self, "labels_seed", "epochs", "seed")
        check_at_least(1, self, "queries")
