"""Settings of the tools that read frozen features or classify. Free of torch: `--help` is instant."""

from dataclasses import dataclass
from typing import Literal

from mpp.data.settings import MAX_IMAGE_MB, check_max_image_mb
from mpp.downstream.settings import parse_share

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
        check_size(self.img_size, "encoder.img_size")
        if self.workers < -1:
            raise ValueError(f"encoder.workers must be -1 (auto) or at least 0, got {self.workers}")
        check_max_image_mb(self.max_image_mb, "encoder.max_image_mb")
        if self.seed < 0:
            raise ValueError(f"encoder.seed must be at least 0, got {self.seed}")


def check_different(names: tuple[str, ...], setting: str = "init", what: str = "encoders") -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{setting} takes different {what}, got {' '.join(names)}")


def _check_pool(pool: tuple[str, ...]) -> None:
    if not pool or len(set(pool)) < len(pool):
        raise ValueError(f"pool takes different ones of mean, token and mean+token, got {' '.join(pool) or 'none'}")


def check_size(img_size: tuple[int, ...], setting: str) -> None:
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
        check_different(self.init)
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
        check_different(self.init)
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
