"""Settings of a study. Free of torch: `--help` is instant."""

import re
import shlex
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal

from mpp.config import overridden
from mpp.downstream.settings import FewshotRecipe, FinetuneConfig, Pool, parse_share
from mpp.errors import ConfigError
from mpp.pretraining.settings import PretrainConfig
from mpp.report.settings import LONGER, PRETRAINED, RANDOM, SCRATCH, folder_name


@dataclass(frozen=True)
class Arm:
    """One of the pretrainings that a study compares."""

    name: str
    flags: str
    """Its settings on top of the study's `pretrain`, as on the command line."""
    pretrain: PretrainConfig
    """The study's, with these flags."""

    @property
    def folder(self) -> str:
        return folder_name(self.name)


@dataclass(frozen=True)
class StudyConfig:
    """What the pretraining is worth: fine-tune the pretrained encoder and the same one from scratch, with the same
    recipe and budget, at several shares of the labels and with several seeds; few-shot on both; one table. Several
    pretrainings are compared in the same way."""

    run_dir: str = field(default="", metadata={"free": True})
    """Folder of the study: its runs, table and pictures. The same command again goes on where it stopped."""
    data: str = ""
    """Labelled source, as data.source of the training. It is pretrained on, too, without its labels, where
    pretrain.data.source is empty."""
    test: str = ""
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    group: str = ""
    """As data.group of fine-tuning: images of one group are never parted."""
    download: bool = field(default=False, metadata={"free": True})
    """Fetch cifar10 or cifar100 from its authors' site when DIR lacks it (needs to be online)."""
    init: str = ""
    """Weights to take instead of pretraining: a run folder or whatever else the fine-tuning tool takes."""
    arms: tuple[str, ...] = field(default=(), metadata={"free": True})
    """Pretrainings to compare, each "NAME" or "NAME: FLAGS", such as "75 %: --objective.ratio 0.75", its flags on top
    of pretrain. From scratch means the encoder of the first. Empty: one, of pretrain as it is."""
    pretrain_seeds: tuple[int, ...] = field(default=(0,), metadata={"free": True})
    """Each arm is pretrained with each of them; fine-tuning takes them in turn, one for each of seeds."""
    equal_time: bool = False
    """Each arm sees as many images as its step, timed here, manages in the time of the first arm's pretraining; one
    with another train.length than pretrain's keeps that. `longer` goes by that time, too."""
    labels: tuple[str, ...] = field(default=("1%", "10%", "100%"), metadata={"free": True})
    """Shares of the labels."""
    lengths: tuple[str, ...] = field(default=(), metadata={"free": True})
    """Length of the fine-tuning for each of these shares. Empty: finetune.train.length for all."""
    longer: tuple[str, ...] = field(default=(), metadata={"free": True})
    """Those of the shares at which scratch is trained a second time, with as many images more as the first arm's
    pretraining saw, or with equal_time as fit into its time: for equal total compute."""
    tune_at: tuple[str, ...] = field(default=(), metadata={"free": True})
    """Shares at which each side chooses its learning rate, where there are several (longer scratch at its first one,
    where it is not trained at these). Other shares take that of the next larger of these, else of the largest. Empty:
    at each share; so does '', which older studies have."""
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"free": True})
    """Each draws its own share of the labels, order, augmentation and new weights; the same ones for all sides."""
    shots: tuple[int, ...] = field(default=(1, 5, 10, 25), metadata={"free": True})
    """Few-shot: labelled images per class."""
    draws: int = field(default=3, metadata={"free": True})
    """Few-shot: draws of the shots."""
    layers: tuple[int | Literal["all"], ...] = field(default=(-1,), metadata={"free": True})
    """Few-shot: layers that are read, such as -1 -2 -3, or the word all."""
    pool: tuple[Pool, ...] = field(default=("mean", "token"), metadata={"free": True})
    """Few-shot: mean of the patch tokens, class token, both side by side, quarters; those that an encoder has."""
    l2: str = field(default="1024", metadata={"free": True})
    """Few-shot: strength of the L2 regularisation, or cv."""
    probe: bool = field(default=False, metadata={"free": True})
    """Also train linear classifiers on the frozen features of all labelled images: the mean of the last layer, and the
    one of layers and pool that held-out training images choose."""
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    def __post_init__(self) -> None:
        for key in ("labels", "seeds", "pretrain_seeds"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{key} takes different values, at least one, got {list(values)}")
            if key != "labels" and min(values) < 0:
                raise ValueError(f"{key} takes numbers of at least 0, got {list(values)}")
        shares = {parse_share(share, "labels") for share in self.labels}
        if len(shares) < len(self.labels):  # 1% and 0.01 say the same
            raise ValueError(f"labels takes different shares, got {list(self.labels)}")
        if self.lengths and len(self.lengths) != len(self.labels):
            raise ValueError(f"lengths takes one length for each of the {len(self.labels)} labels, or none")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        for key, some in (("longer", self.longer), ("tune_at", tuple(filter(None, self.tune_at)))):
            for share in some:
                if share not in self.labels or some.count(share) > 1:
                    raise ValueError(f"{key} takes shares that labels has, {', '.join(self.labels)}, got {share!r}")
        FewshotRecipe(shots=self.shots, l2=self.l2, layers=self.layers, pool=self.pool)  # checks them
        self._check_recipes()
        self._check_arms()

    def _check_recipes(self) -> None:
        """Refuses settings of the two recipes that the study sets itself."""
        default, set_by = StudyConfig.__dataclass_fields__, {
            "finetune.init": "init",
            "finetune.run_dir": "run_dir",
            "finetune.data.source": "data",
            "finetune.data.test": "test",
            "finetune.data.group": "group",
            "finetune.data.labels": "labels",
            "finetune.data.labels_seed": "seeds",
            "finetune.train.seed": "seeds",
            "pretrain.run_dir": "run_dir",
            "pretrain.dry_run": "the pretraining tool for it",
            "pretrain.train.seed": "pretrain_seeds",
        }  # fmt: skip
        for name, other in set_by.items():
            recipe, _, setting = name.partition(".")
            value = attrgetter(name)(self)
            if value != attrgetter(setting)(default[recipe].default):
                raise ValueError(f"{name} is set by the study; use {other}, got {value!r}")
        tuned = self.finetune
        replace(tuned.data, source=self.data, test=self.test, group=self.group)  # checks them together
        for length in self.lengths:
            try:
                replace(tuned.train, length=length)
            except ValueError as error:
                raise ValueError(f"lengths: {error}") from None
        if self.lengths and tuned.train.length != FinetuneConfig().train.length:
            raise ValueError("lengths and finetune.train.length say the same; give one of them")

    def _check_arms(self) -> None:
        """Refuses arms whose names or folders clash, or that set what is the same for all."""
        if self.init and (self.arms or self.longer or self.equal_time or len(self.pretrain_seeds) > 1):
            raise ValueError(
                "init names weights to take instead of pretraining; leave out arms, pretrain_seeds, longer, equal_time"
            )
        taken = {folder_name(name): name for name in (SCRATCH, LONGER, RANDOM)}
        for arm in self.parsed_arms():
            if not arm.folder or arm.folder in taken:
                other = f"; its folder would be that of {taken[arm.folder]!r}" if arm.folder else ""
                raise ValueError(f"arms: {arm.name!r} is no name for an arm{other}; choose another")
            taken[arm.folder] = arm.name
            replace(arm.pretrain.data, source=arm.pretrain.data.source or self.data)  # checks them together
            for name in ("run_dir", "resume", "dry_run", "train.seed"):
                value = attrgetter(name)(arm.pretrain)
                if value != attrgetter(name)(self.pretrain):
                    raise ValueError(f"arms: {arm.name}: {name} is the same for all arms, got {value!r}")

    def parsed_arms(self) -> tuple[Arm, ...]:
        """The pretrainings to compare; the first is the default.

        Raises:
            ConfigError: wrong flags.
        """
        arms: list[Arm] = []
        for text in self.arms or (PRETRAINED,):
            name, _, flags = (part.strip() for part in text.partition(":"))
            if re.search(r"(^|\s)--\w", name):
                raise ConfigError(f"arms: {name!r}: put a colon before the flags")
            try:
                arms.append(Arm(name, flags, overridden(self.pretrain, shlex.split(flags))))
            except ConfigError as error:
                raise ConfigError(f"arms: {name}: {error}") from None
            except ValueError as error:  # quotes that do not close
                raise ConfigError(f"arms: {name}: {error} in {flags!r}") from None
        return tuple(arms)
