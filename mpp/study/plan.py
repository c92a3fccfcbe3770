"""The runs of a study, before anything is trained: its pretrainings, its fine-tuning runs, and the config of each."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mpp.config import differences, from_file, to_dict
from mpp.data.sources.opening import open_source
from mpp.dist import World
from mpp.downstream.finetune_result import changed_settings, from_new_weights, read_result
from mpp.downstream.labelled import Labelled, take_fraction
from mpp.downstream.settings import FinetuneConfig, parse_share
from mpp.pretraining.build import resolve_init, settle_config
from mpp.pretraining.encoder_choice import choose_encoder
from mpp.pretraining.settings import PretrainConfig
from mpp.study.equal_time import EqualTime
from mpp.study.settings import LONGER, PRETRAINED, RANDOM, SCRATCH, Arm, StudyConfig, folder_name
from mpp.training.auto import Facts, settle
from mpp.training.duration import parse_duration
from mpp.training.parallel import choose_device
from mpp.training.settings import chosen

StartPoint = tuple[str, int | None]
"""A side, and the seed of its pretraining; None without a pretraining of this study."""


@dataclass(frozen=True)
class Pretraining:
    """One pretraining run: an arm with a seed."""

    arm: Arm
    seed: int
    config: PretrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def resolved(self) -> PretrainConfig:
        """The config, filled in from the weights of its init, the images and the device."""
        config, world = resolve_init(self.config, World())[0], World()
        return settle_config(config, world, choose_device(config.train.device, world, "pretrain.train.device"))[0]

    @property
    def finished(self) -> bool:
        """Whether the run has ended with this config; without opening its images or building its model."""
        path = self.folder / "config.yaml"
        if not path.is_file() or not (self.folder / "model" / "config.json").is_file():
            return False
        filled, before = resolve_init(self.config, World())[0], from_file(PretrainConfig, path)
        model, _ = choose_encoder(filled.model, 0, 0, False, before.model)  # its patches go by its size
        return not differences(PretrainConfig, to_dict(before), to_dict(replace(filled, model=model)))


def pretrainings(config: StudyConfig, timed: EqualTime | None = None) -> list[Pretraining]:
    """All pretrainings, every arm with the first seed, then with the next; none where weights are given instead.

    Args:
        timed: images of the arms in equal time, where it is known; an arm with a length of its own keeps that.
    """
    if config.init:
        return []
    found: list[Pretraining] = []
    arms, lengths = config.parsed_arms(), timed.arms if timed else {}
    for seed in config.pretrain_seeds:
        for number, arm in enumerate(arms):
            base = arm.pretrain
            equal = number and arm.name in lengths and base.train.length == config.pretrain.train.length
            length = f"{lengths[arm.name]['images']} images" if equal else base.train.length
            folder = Path(config.run_dir) / "pretrain" / arm.folder / f"seed_{seed}"
            download = config.download or base.data.download
            data = replace(base.data, source=base.data.source or config.data, download=download)
            train = replace(base.train, length=length, seed=seed)
            found.append(Pretraining(arm, seed, replace(base, run_dir=str(folder), data=data, train=train)))
    return found


def images_of(config: PretrainConfig) -> int:
    """How many images a pretraining sees, in whole steps; its config has no auto left."""
    length, size, data = (
        parse_duration(config.train.length, "train.length"),
        chosen(config.train.batch_size),
        config.data,
    )
    epoch = len(open_source(data.source, download=data.download, keep=data.keep)) if length.unit == "epochs" else size
    return size * length.steps(size, epoch)


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning run of the study."""

    side: str
    labels: str
    length: str
    seed: int
    pretrain_seed: int | None

    @property
    def start(self) -> StartPoint:
        return self.side, self.pretrain_seed

    @property
    def from_scratch(self) -> bool:
        return self.side in (SCRATCH, LONGER)

    def __str__(self) -> str:
        return f"{self.side}, {self.labels} of the labels, seed {self.seed}"


def finetune_runs(
    config: StudyConfig, labelled: Labelled, pretrained: int, timed: EqualTime | None = None
) -> list[FinetuneRun]:
    """All sides of a setting next to each other, so that a study that is stopped early can compare them.

    Runs that choose a learning rate for all shares come first.

    Args:
        pretrained: images that the first arm sees.
        timed: images that longer training from scratch sees in the same time, where it is known.
    """
    lengths = config.lengths or (config.finetune.train.length,) * len(config.labels)
    arms = (PRETRAINED,) if config.init else tuple(arm.name for arm in config.parsed_arms())
    found: list[FinetuneRun] = []
    for labels, length in zip(config.labels, lengths, strict=True):
        for number, seed in enumerate(config.seeds):
            found.append(FinetuneRun(SCRATCH, labels, length, seed, None))
            if labels in config.longer:
                tuned = _tuned_images(config.finetune, length, take_fraction(labelled, labels, config.seeds[0]))
                more = timed.longer[labels]["images"] if timed and labels in timed.longer else pretrained
                found.append(FinetuneRun(LONGER, labels, f"{tuned + more} images", seed, None))
            start = None if config.init else config.pretrain_seeds[number % len(config.pretrain_seeds)]
            found += [FinetuneRun(arm, labels, length, seed, start) for arm in arms]
    return sorted(found, key=lambda run: run.labels not in config.tune_at or run.seed != config.seeds[0])


def _tuned_images(config: FinetuneConfig, length: str, labelled: Labelled) -> int:
    """How many images a fine-tuning of that length sees, in whole steps."""
    images = len(labelled.train_indices)
    cpu = choose_device(config.train.device, World(), "finetune.train.device").type == "cpu"
    settled, _ = settle(replace(config, train=replace(config.train, length=length)), Facts(images, True, cpu))
    size = chosen(settled.train.batch_size)
    return size * parse_duration(settled.train.length, "lengths").steps(size, images)


@dataclass(frozen=True)
class Plan:
    """All runs of a study."""

    config: StudyConfig
    labelled: Labelled
    pretrainings: list[Pretraining]
    finetunings: list[FinetuneRun]

    @cached_property
    def inits(self) -> dict[StartPoint, str]:
        """The init of each side, as the tools take it; from scratch is the encoder of the first pretraining, new."""
        found: dict[StartPoint, str] = {(run.arm.name, run.seed): run.config.run_dir for run in self.pretrainings}
        if self.config.init:
            found = {(PRETRAINED, None): self.config.init}
        scratch = f"random:{next(iter(found.values()))}"
        return {(SCRATCH, None): scratch, (LONGER, None): scratch} | found

    @cached_property
    def encoders(self) -> dict[StartPoint, StartPoint]:
        """Start points whose encoders are read frozen, with their names there; longer scratch is scratch again."""
        sides = (start for start in self.inits if start[0] != LONGER)
        return {(side, seed): (RANDOM if side == SCRATCH else side, seed) for side, seed in sides}

    def rate_group(self, run: FinetuneRun) -> tuple[str, str]:
        """Runs of a group share a learning rate, which one of them chooses."""
        tune_at = sorted(filter(None, self.config.tune_at), key=parse_share)
        larger = (share for share in tune_at if parse_share(share) >= parse_share(run.labels))
        return run.side, next(larger, tune_at[-1]) if tune_at else run.labels

    @cached_property
    def choosers(self) -> dict[tuple[str, str], FinetuneRun]:
        """The run of each group that chooses its learning rate: the first one, or at the same share the first that is
        done; other seeds may have been put before it since."""
        found: dict[tuple[str, str], FinetuneRun] = {}
        for run in self.finetunings:
            found.setdefault(self.rate_group(run), run)
        for group, first in found.items():
            alike = (run for run in self.finetunings if (run.side, run.labels) == (first.side, first.labels))
            found[group] = next(filter(self.is_done, alike), first)
        return found

    def is_done(self, run: FinetuneRun) -> bool:
        """Whether it has a result in the study's folder, by these settings and any of the learning rates."""
        config = self.finetune_config(run)
        return read_result(Path(config.run_dir)) is not None and not changed_settings(config)

    def finetune_config(self, run: FinetuneRun, lr: float | None = None) -> FinetuneConfig:
        """The config of one run; without `lr` it has the learning rates to choose from."""
        config, base = self.config, self.config.finetune
        share = f"labels_{100 * parse_share(run.labels):.10g}"  # in percent; rounded, for 100 * 0.07 is not quite 7
        data = replace(base.data, source=config.data, test=config.test, group=config.group)
        data = replace(data, labels=run.labels, labels_seed=run.seed)
        # A single auto is each share's own: it goes by the batch, and so by the number of labels.
        rates = base.optim.lr if lr is None or base.optim.lr == ("auto",) else (lr,)
        of_side = from_new_weights(base) if run.from_scratch else base
        return replace(
            of_side,
            init=self.inits[run.start],
            run_dir=str(Path(config.run_dir) / "finetune" / folder_name(run.side) / share / f"seed_{run.seed}"),
            data=replace(data, download=config.download or base.data.download),
            train=replace(base.train, length=run.length, seed=run.seed),
            optim=replace(of_side.optim, lr=rates),
        )
