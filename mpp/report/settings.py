"""Settings of the visualize tool, and the names of a study's sides. Free of torch: `--help` is instant."""

import re
from dataclasses import dataclass

from mpp.data.settings import MAX_IMAGE_MB, check_max_image_mb
from mpp.downstream.settings import check_size
from mpp.training.settings import check_different

SCRATCH, LONGER, RANDOM, PRETRAINED = "scratch", "scratch, longer", "random", "pretrained"
"""The sides without pretraining, the encoder of few-shot that has none, and the pretraining of a study of one."""


def folder_name(side: str) -> str:
    """A side's name as that of a folder: "4x4, L2" -> "4x4_l2"."""
    return re.sub(r"\W+", "_", side.lower()).strip("_")


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
        check_different(self.runs, "runs", "run folders")
        if self.images < 128:
            raise ValueError(f"images must be at least 128, or its means say little, got {self.images}")
        if self.shown < 1:
            raise ValueError(f"shown must be at least 1, got {self.shown}")
        if self.patch and (len(self.patch) != 2 or min(self.patch) < 0):
            raise ValueError(f"patch takes a row and a column from 0, got {list(self.patch)}")
        check_size(self.img_size, "img_size")
        if self.workers < -1:
            raise ValueError(f"workers must be -1 (auto) or at least 0, got {self.workers}")
        check_max_image_mb(self.max_image_mb, "max_image_mb")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
