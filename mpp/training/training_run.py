"""The parts of a training run, whatever it trains, and what pretraining and fine-tuning do with them alike."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from mpp.data.auto_cache import keep_decoded
from mpp.data.device_jpeg import DecodeJpegs
from mpp.data.feed import DeviceBatch, feed
from mpp.data.reader import Bad
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.sources.contents import Contents
from mpp.data.transform import Transform
from mpp.data.workers import cores_for, worker_count
from mpp.dist import World
from mpp.model.kernel_choice import settle_kernel, task_of
from mpp.training.auto import Choice
from mpp.training.checkpoint import Checkpoints
from mpp.training.data_stalls import data_notes
from mpp.training.doubts import doubts
from mpp.training.loop import FiniteGuard, State, Step, update
from mpp.training.optim import build_ema, build_optimizer, constant_rate, parameter_groups
from mpp.training.parallel import DTYPES, prepare
from mpp.training.provenance import record_start
from mpp.training.run_folder import once_a_machine
from mpp.training.schedule import Schedule


@dataclass
class TrainingRun:
    """The parts of a training run, built from its config."""

    config: Any
    world: World
    device: torch.device
    precision: str
    """bf16, fp16 or fp32."""
    train_source: Source
    """The images it trains on; after `decoded` perhaps from a cache of decoded pixels."""
    reading: DecodeOptions
    transform: Transform
    model: Any
    wrapped: nn.Module
    """What the training step calls: the model compiled, and wrapped for data parallelism."""
    state: State
    schedule: Schedule
    workers: int
    """Loader processes."""
    decode: DecodeJpegs | None
    """Decodes JPEGs on the device; None: the workers do."""
    choices: tuple[Choice, ...] = field(default=(), kw_only=True)
    """What was put in the place of auto."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def micro_batch(self) -> int:
        """Images per device in one forward pass."""
        return self.schedule.micro_batch

    @property
    def exported(self) -> Any:
        """The model that is evaluated and exported: the moving average, if there is one."""
        return self.model if self.state.ema is None else self.state.ema.module

    def steps(self, setting: str) -> int:
        """Convert a duration of the config, such as "log.every", to steps; an empty one to 0."""
        return self.schedule.steps(attrgetter(setting)(self.config), setting)

    def checkpoints(self) -> Checkpoints:
        """Return the checkpoints of the run, kept as its config says."""
        keep_last = self.config.checkpoint.keep_last
        return Checkpoints(self.folder / "checkpoints", keep_last, self.steps("checkpoint.keep_every"))

    def doubts(self, tested: int = 0, classes: int = 0) -> list[str]:
        """Say why the run cannot learn, if it cannot (see `doubts`); of `tested` images in so many classes, if any."""
        return doubts(self.schedule, self.steps("schedule.warmup"), self.config.optim.ema_decay, tested, classes)

    def record(self, step: int, data: Mapping[str, Any], **facts: Any) -> None:
        """Add a start from `step` to environment.json, with facts about its images; for all ranks together."""
        own = {"precision": self.precision, "attention": self.state.attention, "seed": self.config.train.seed}
        record_start(self.folder, step, self.device, {**own, "data": data, **facts})

    def data_notes(self) -> list[str]:
        """Return what its images did to the run, if anything (see data_stalls.py)."""
        return data_notes(self.folder, self.config.data, self.workers, cores_for(self.world.local_size))

    def settle_attention(self) -> None:
        """Choose the attention kernel of a new run; a resumed one keeps its own."""
        state, dtype = self.state, DTYPES[self.precision]
        task = task_of(self.model, self.micro_batch, True, self.device, dtype)
        state.attention = settle_kernel(self.config.model.attention, state.attention, task, self.model, state.ema)

    def decoded(self, source: Source, say: Callable[[str], None], make: bool = True) -> Source:
        """Return `source` for the rest of the training, with decoded pixels where data.cache auto keeps them.

        `say` prints a line; `make` decodes what is not cached yet.
        """
        left = self.schedule.total_steps * self.schedule.batch_size - self.state.images_seen
        return once_a_machine(
            self.world,
            lambda: keep_decoded(
                self.config.data,
                source,
                self.transform,
                self.reading,
                images=left,
                workers=self.workers,
                device_jpegs=self.decode is not None,
                make=make and not self.world.local_rank,
                say=say,
            ),
        )

    def batches(
        self, report_bad: Callable[[list[Bad], int], None] = lambda bad, images: None, start: int | None = None
    ) -> Generator[DeviceBatch]:
        """Yield this rank's endless micro-batches from `start` images seen on, by default `state.images_seen`."""
        return feed(
            self.train_source,
            self.transform,
            self.reading,
            self.device,
            seed=self.config.train.seed,
            batch_size=self.schedule.batch_size,
            micro_batch=self.micro_batch,
            start=self.state.images_seen if start is None else start,
            world=self.world,
            workers=self.workers,
            decode=self.decode,
            report_bad=report_bad,
        )

    def endless_updates(self, step: Step, shape: tuple[int, int, int]) -> Callable[[], None]:
        """Return a function that makes the next update, for timing.

        Its images of that shape (channels, height, width; random ones, on the device), their labels (class 0) and the
        learning rate are always the same.
        """
        generator, size = torch.Generator().manual_seed(0), self.micro_batch
        images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator).to(self.device)
        labels, index = torch.zeros(size, dtype=torch.int64, device=self.device), torch.zeros(size, dtype=torch.int64)

        def batches() -> Iterator[DeviceBatch]:
            while True:
                for slot in range(0, self.schedule.batch_size, size):
                    position = self.state.images_seen
                    yield {"images": images, "labels": labels, "index": index, "position": position, "slot": slot}

        constant_rate(self.state.optimizer)
        endless, guard, numbers = batches(), FiniteGuard(self.state), count(1)

        def make_update() -> None:
            update(self.state, self.wrapped, endless, step, self.schedule, guard, next(numbers))
            self.state.images_seen += self.schedule.batch_size

        return make_update


def training_workers(data: DataConfig, world: World, device: torch.device) -> int:
    """Count the loader processes of a training; a CPU that trains computes, too, unless it waits for remote images."""
    computing = device.type == "cpu" and "://" not in data.source
    return worker_count(data.workers, world.local_size, computing)


def build_state(
    config: Any,
    model: nn.Module,
    world: World,
    device: torch.device,
    precision: str,
    contents: Contents,
    around: nn.Module | None = None,
) -> tuple[nn.Module, State]:
    """Build the module that the step calls (see `prepare`), and the state of a new run on images of these `contents`.

    `around` is a module that holds `model` and computes more of the step.
    """
    train, optim = config.train, config.optim
    ema = build_ema(model, optim.ema_decay)
    wrapped = prepare(model, device, world, train.compile, train.parallel, precision, ema, around)
    groups = parameter_groups(model, optim.weight_decay, getattr(optim, "layer_decay", 1.0))
    scaler = GradScaler(device.type) if precision == "fp16" else None
    return wrapped, State(model, build_optimizer(groups, optim), ema, scaler, contents=contents)
