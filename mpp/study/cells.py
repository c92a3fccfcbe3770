"""The fine-tuning runs of a study: which there are, in which order, and the config of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpp.config import differences, from_file, to_dict
from mpp.downstream.labelled import Labelled, take_fraction
from mpp.downstream.settings import FinetuneConfig, parse_share
from mpp.report.settings import LONGER, PRETRAINED, SCRATCH, folder_name
from mpp.study.arms import Pretraining
from mpp.study.settings import StudyConfig
from mpp.training.duration import parse_duration

Place = tuple[str, int | None]
"""A side, and the seed of its pretraining; None where nothing was pretrained, or somewhere else."""


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the study."""

    side: str
    labels: str
    length: str
    seed: int
    pretrain_seed: int | None

    @property
    def place(self) -> Place:
        return self.side, self.pretrain_seed

    @property
    def scratch(self) -> bool:
        return self.side in (SCRATCH, LONGER)

    def __str__(self) -> str:
        return f"{self.side}, {self.labels} of the labels, seed {self.seed}"


def cells(config: StudyConfig, labelled: Labelled, pretrained: int) -> list[Cell]:
    """All sides of a setting next to each other, so that a study that is stopped early can compare them.

    What chooses the learning rates for all shares comes first. `pretrained`: images that the first arm sees.
    """
    lengths = config.lengths or (config.finetune.train.length,) * len(config.labels)
    arms = (PRETRAINED,) if config.init else tuple(arm.name for arm in config.told_arms())
    found: list[Cell] = []
    for labels, length in zip(config.labels, lengths, strict=True):
        for number, seed in enumerate(config.seeds):
            found.append(Cell(SCRATCH, labels, length, seed, None))
            if labels in config.longer:
                more = _images(config, labelled, labels, length) + pretrained
                found.append(Cell(LONGER, labels, f"{more} images", seed, None))
            start = None if config.init else config.pretrain_seeds[number % len(config.pretrain_seeds)]
            found += [Cell(arm, labels, length, seed, start) for arm in arms]
    return sorted(found, key=lambda cell: (cell.labels, cell.seed) != (config.tune_at, config.seeds[0]))


def _images(config: StudyConfig, labelled: Labelled, labels: str, length: str) -> int:
    """How many images fine-tuning of this length sees, in whole steps."""
    taken = take_fraction(labelled, labels, config.seeds[0])
    size = config.finetune.train.batch_size
    return size * parse_duration(length, "lengths").steps(size, len(taken.train_indices))


def tuned_for(config: StudyConfig, cell: Cell) -> tuple[str, str]:
    """Which cells share a learning rate; the first of them chooses it. Longer from scratch takes scratch's."""
    return SCRATCH if cell.scratch else cell.side, config.tune_at or cell.labels


def starting_points(config: StudyConfig, runs: Sequence[Pretraining]) -> dict[Place, str]:
    """What each side starts from, as the tools take it: by side and seed of the pretraining."""
    if config.init:
        found: dict[Place, str] = {(PRETRAINED, None): config.init}
    else:
        found = {(run.arm.name, run.seed): run.config.run_dir for run in runs}
    scratch = f"random:{next(iter(found.values()))}"
    return {(SCRATCH, None): scratch, (LONGER, None): scratch} | found


def cell_config(config: StudyConfig, cell: Cell, inits: Mapping[Place, str], lr: float | None = None) -> FinetuneConfig:
    """The config of one run; with `lr` it has no more to choose."""
    told = config.finetune
    # In percent, however it was told; rounded, for 100 * 0.07 is not quite 7.
    share, seed = f"labels_{100 * parse_share(cell.labels):.10g}", f"seed_{cell.seed}"
    data = replace(told.data, source=config.data, test=config.test, labels=cell.labels, labels_seed=cell.seed)
    data = replace(data, download=config.download or told.data.download)
    lrs = told.optim.lr if lr is None else (lr,)
    return replace(
        told,
        init=inits[cell.place],
        run_dir=str(Path(config.run_dir) / "finetune" / folder_name(cell.side) / share / seed),
        data=data,
        train=replace(told.train, length=cell.length, seed=cell.seed),
        # What lies below has learnt nothing yet that a lower rate would keep.
        optim=replace(told.optim, lr=lrs, layer_decay=1.0 if cell.scratch else told.optim.layer_decay),
    )


def told_otherwise(config: FinetuneConfig) -> list[str]:
    """What was another setting of the run in config's folder, if there is one: "train.length: ... -> ...".

    Where several learning rates are to be tried, it may have any of them.

    Raises:
        UserError: a config.yaml that cannot be read.
    """
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        return []
    before = from_file(FinetuneConfig, path)
    changed = differences(FinetuneConfig, to_dict(before), to_dict(config))
    chosen = set(before.optim.lr) <= set(config.optim.lr)
    return [line for line in changed if not (chosen and line.startswith("optim.lr:"))]
