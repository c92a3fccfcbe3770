"""The parts of one pretraining run, built from its config: data, model, optimiser, schedule, and the step between them.

Every random draw derives from the seed and from what is drawn for: (seed, epoch, index) for augmentation, (seed, images
seen) for the corruption of a global batch.
"""

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mpp import dist
from mpp.data.auto_cache import keep_decoded
from mpp.data.feed import Placed, feed
from mpp.data.late import DecodeJpegs, choose_decoder
from mpp.data.loader import derive_seed, stream, worker_count
from mpp.data.pixel_cache import open_images
from mpp.data.reader import Bad, Batch, Transform
from mpp.data.settings import Reading
from mpp.data.sources.base import Source
from mpp.data.sources.fingerprint import Contents, listing
from mpp.data.transform import Normalise, TrainTransform
from mpp.dist import World
from mpp.downstream.cache import weights_hash
from mpp.downstream.fewshot import Fewshot
from mpp.errors import UserError
from mpp.model.choice import settle_kernel, task_of
from mpp.model.decoder import Decoder
from mpp.model.encoder import Encoder, build_encoder
from mpp.objective.masking import Corruption, draw_corruption, num_picked, pick_patches
from mpp.objective.objective import Figures, MaskedPatchPrediction, Survey, survey_targets
from mpp.objective.settings import ObjectiveConfig
from mpp.objective.target import build_target
from mpp.pretraining.settings import PretrainConfig
from mpp.system.process import global_draws
from mpp.training.loop import Schedule, State
from mpp.training.optim import build_ema, build_optimizer, parameter_groups
from mpp.training.parallel import DTYPES, autocast, choose_precision, prepare
from mpp.training.run_folder import build_rate, earlier, micro_batches, once_a_machine, steps
from mpp.training.schedule import parse_duration
from mpp.weights.base import Weights
from mpp.weights.continued import adopted, adopted_input, build_continued, load_first, settled
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import encoder_weights

FIRST = "init"
"""Folder in a run's own for the weights that it went on from, as timm loads them."""
SURVEY_IMAGES, SURVEY_BATCH = 512, 64
_CORRUPTION, _DROPOUT, _SURVEY = 1, 2, 3  # so that no two kinds of draws share a seed


@dataclass
class Run:
    """All the parts of one pretraining run, built from its config."""

    config: PretrainConfig
    world: World
    device: torch.device
    precision: str
    source: Source
    trained_on: Source
    """The same images as the training reads them: after `read_decoded` perhaps decoded already."""
    transform: TrainTransform
    model: MaskedPatchPrediction[Encoder]
    wrapped: nn.Module
    state: State
    schedule: Schedule
    fewshot: Fewshot | None
    micro_batch: int
    workers: int
    decode: DecodeJpegs | None
    init_hash: str = ""
    """Of the weights that a fresh run goes on from; empty for new ones, and where a run is resumed."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def exported(self) -> MaskedPatchPrediction[Encoder]:
        """The model that is looked at and exported: the moving average, if there is one."""
        ema = self.state.ema
        return cast(MaskedPatchPrediction[Encoder], ema.module) if ema is not None else self.model

    @property
    def reading(self) -> Reading:
        """How files become pixels."""
        return self.config.data.reading(self.config.model.in_chans)

    def steps(self, duration: str, name: str) -> int:
        """A duration of the config in steps; 0 for an empty one."""
        return steps(duration, name, self.schedule, len(self.source))


def build(config: PretrainConfig, world: World, device: torch.device) -> Run:
    """Opens the source and builds model, optimiser and schedule; writes nothing.

    Raises:
        UserError: settings that do not fit each other, the machine or the source.
    """
    config, first = started(config, world)
    size = config.train.batch_size
    micro, accumulate = micro_batches(size, config.train.micro_batch, world)
    precision = choose_precision(config.train.precision, device)
    computing = device.type == "cpu" and "://" not in config.data.source  # whose images are waited for, not computed
    workers = worker_count(config.data.workers, world.local_size, computing)
    reading = config.data.reading(config.model.in_chans)
    source = once_a_machine(world, lambda: open_images(config.data, reading, workers))
    fewshot = None
    if config.fewshot.data:
        fewshot = once_a_machine(world, lambda: Fewshot.open(config.fewshot, config.data.download, config.data.keep))
    start = weights_hash(first.state) if first is not None and first.state is not None else ""
    dist.agree(lambda: _common(source, fewshot, precision, start))
    total = parse_duration(config.train.length, "train.length").steps(size, len(source))
    rate = build_rate(config.schedule, config.optim.lr, total, size, len(source))
    schedule = Schedule(total, size, accumulate, rate, config.optim.clip_norm)
    model = build_model(config, device, DTYPES[precision])
    if first is not None:
        load_first(model.encoder, first)
    transform = TrainTransform(config.data, model.encoder.image_hw, config.model.in_chans)
    train, ema = config.train, build_ema(model, config.optim.ema_decay)
    wrapped = prepare(model, device, world, train.compile, train.parallel, precision, ema)
    state = State(
        model,
        build_optimizer(parameter_groups(model, config.optim.weight_decay), config.optim),
        ema,
        GradScaler(device.type) if precision == "fp16" else None,
        contents=Contents.of(source),
    )
    decode = choose_decoder(config.data.decode, device, transform)
    return Run(
        config,
        world,
        device,
        precision,
        source,
        source,
        transform,
        model,
        wrapped,
        state,
        schedule,
        fewshot,
        micro,
        workers,
        decode,
        start,
    )


def _common(source: Source, fewshot: Fewshot | None, precision: str, start: str) -> dict[str, str]:
    """What must be the same for all ranks: they draw from it and wait for each other by it."""
    facts = {"images": listing(source), "precision": precision, "weights to go on from": start[:12]}
    if fewshot is not None:
        facts |= {"few-shot images": listing(fewshot.train), "few-shot test images": listing(fewshot.test)}
    return facts


def started(config: PretrainConfig, world: World) -> tuple[PretrainConfig, Weights | None]:
    """The config with what the weights of its `init` say (see `settled`), and these weights.

    A run that has begun has told them in its own config, and its checkpoints hold what became of them: then they are
    not read again. Without `init` the config is as it was. A dry run always reads them.

    Raises:
        UserError: weights that cannot be opened or gone on from; a run folder that began with others.
    """
    if not config.init:
        return config, None
    before = earlier(config) if config.run_dir and not config.dry_run else None
    if before is not None and _place(before.init) != _place(config.init):
        raise UserError(
            f"{config.run_dir} began with {f'--init {before.init}' if before.init else 'new weights'}, "
            f"not --init {config.init}; choose another --run-dir"
        )
    if before is not None:
        init, init_args, weights = before.init, before.init_args, None
        model, data = adopted(config.init, config.model, before.model), adopted_input(config.data, before.data)
    else:
        init, weights = config.init, once_a_machine(world, lambda: open_weights(config.init))
        model, data, init_args = settled(init, weights, config.model, config.data)
    if config.init_args not in ((), init_args):
        raise UserError(f"init_args is filled in from --init {config.init}; leave it out")
    return replace(config, init=init, model=model, data=data, init_args=init_args), weights


def _place(init: str) -> str:
    """The same text for the same folder or file, however it is spelt."""
    path = Path(init).expanduser()
    return os.path.normpath(path.absolute()) if "/" in init or path.exists() else init


def build_model(
    config: PretrainConfig, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> MaskedPatchPrediction[Encoder]:
    """Encoder, [mask] embedding, heads and decoder, drawn from the seed; on "meta" nothing is allocated.

    Where the config has an `init`, it is to be that of `started`; its weights are not loaded.

    `dtype` is what attention will be computed in (see `build_encoder`).
    """
    channels = config.model.in_chans
    config.data.reading(channels)
    with global_draws(config.train.seed):
        if config.init_args:
            encoder = build_continued(config.model, config.init_args, device, dtype)
        else:
            encoder = build_encoder(config.model, device, dtype)
        objective = config.objective
        target = build_target(objective.target, encoder.patch, channels, objective.bits)
        patches = encoder.grid[0] * encoder.grid[1]
        if patches < 2 and objective.split[1] > 0 and objective.random_from == "image":
            raise UserError(
                "model.img_size holds one patch, which has no other to be replaced by; take smaller patches"
            )
        _check_blocks(objective, patches, len(encoder.vit.blocks))
        if objective.detail and channels * encoder.patch[0] * encoder.patch[1] < 2:
            raise UserError("patches of one value have no details; leave out objective.detail or take larger patches")
        decoder = Decoder(encoder, objective.decoder_depth) if objective.decoder_depth else None
        with torch.device("meta" if str(device) == "meta" else "cpu"):
            normalise = Normalise(config.data.mean, config.data.std, channels)
            built = MaskedPatchPrediction(encoder, target, normalise, objective.mask_enters, objective.detail, decoder)
    return built.to(device)


def settle_attention(parts: Run) -> None:
    """Chooses the attention kernel of a run that begins; one that was resumed goes on with its own."""
    state = parts.state
    task = task_of(parts.model, parts.micro_batch, True, parts.device, DTYPES[parts.precision])
    state.attention = settle_kernel(parts.config.model.attention, state.attention, task, parts.model, state.ema)


def read_decoded(parts: Run, say: Callable[[str], None]) -> None:
    """Lets the rest of a training read decoded pixels where data.cache auto does (see `keep_decoded`)."""
    config, world = parts.config, parts.world
    parts.trained_on = once_a_machine(
        world,
        lambda: keep_decoded(
            config.data,
            parts.source,
            parts.transform,
            parts.reading,
            images=parts.schedule.total_steps * parts.schedule.batch_size - parts.state.images_seen,
            workers=parts.workers,
            late=parts.decode is not None,
            make=not (config.dry_run or world.local_rank),
            say=say,
        ),
    )


def _check_blocks(objective: ObjectiveConfig, patches: int, blocks: int) -> None:
    if objective.decoder_depth > blocks:
        raise UserError(
            f"objective.decoder_depth {objective.decoder_depth} is more than the encoder's {blocks} blocks, which is "
            "no light decoder; take fewer"
        )
    if objective.mask_enters > blocks or (objective.mask_enters == blocks and not objective.decoder_depth):
        raise UserError(
            f"objective.mask_enters {objective.mask_enters}: the encoder has the blocks 0 to {blocks - 1}, and "
            f"the last must see the [mask] embeddings, or a decoder behind it; take at most {blocks - 1}, or {blocks} "
            "with objective.decoder_depth 1 or more"
        )
    if objective.mask_enters and num_picked(objective.ratio, patches) == patches:
        raise UserError(
            f"objective.ratio {objective.ratio:g} hides all {patches} patches, so that with objective.mask_enters the "
            "first blocks see nothing; take a smaller ratio"
        )


def weights_of(config: PretrainConfig, encoder: Encoder, origin: str = "") -> Weights:
    """A run's encoder as weights, with what its config says of them (see `encoder_weights`)."""
    data = config.data
    reading = data.reading(config.model.in_chans)
    return encoder_weights(encoder, config.model, data.mean, data.std, reading, origin, config.init_args)


def survey_source(parts: Run) -> Survey:
    """The targets of the first augmented images of the run's source."""
    batches = survey_batches(parts.trained_on, parts.transform, parts.reading, parts.config.train.seed, parts.workers)
    images = torch.cat([next(batches)["images"] for _ in range(SURVEY_IMAGES // SURVEY_BATCH)])
    batches.close()
    return survey_targets(parts.model.target, images)


def survey_batches(source: Source, transform: Transform, reading: Reading, seed: int, workers: int) -> Generator[Batch]:
    """The batches of a source that a run of this seed would survey, and more of them without end."""
    return stream(
        source,
        transform,
        reading,
        seed=derive_seed(seed, _SURVEY) % 2**31,
        batch_size=SURVEY_IMAGES,
        micro_batch=SURVEY_BATCH,
        start=0,
        workers=workers,
    )


def training_batches(
    parts: Run, report_bad: Callable[[list[Bad], int], None] = lambda bad, images: None, start: int | None = None
) -> Generator[Placed]:
    """This rank's endless micro-batches from `start` images seen on, by default `state.images_seen` (see `feed`)."""
    config = parts.config
    return feed(
        parts.trained_on,
        parts.transform,
        parts.reading,
        parts.device,
        seed=config.train.seed,
        batch_size=parts.schedule.batch_size,
        micro_batch=parts.micro_batch,
        start=parts.state.images_seen if start is None else start,
        world=parts.world,
        workers=parts.workers,
        decode=parts.decode,
        report_bad=report_bad,
    )


def draw(parts: Run, position: int, batch: int) -> Corruption:
    """The corruption of the whole global batch that starts at `position` images seen."""
    group = parts.micro_batch if batch % parts.micro_batch == 0 else batch
    return corruption_at(parts.config, parts.model.encoder.grid, parts.device, position, batch, group)


def corruption_at(
    config: PretrainConfig, grid: tuple[int, int], device: torch.device, position: int, batch: int, group: int = 1
) -> Corruption:
    """What a run of this config corrupts in the `batch` images from `position` images seen on.

    Random replacements come from `group` consecutive images where the config takes them from the batch.
    """
    objective = config.objective
    generator = torch.Generator(device)
    generator.manual_seed(derive_seed(config.train.seed, _CORRUPTION, position))
    picked = pick_patches(batch, grid, objective.ratio, generator, objective.picking)
    within = group if objective.random_from == "batch" else 1
    return draw_corruption(picked, grid[0] * grid[1], generator, objective.split, within)


def training_step(parts: Run, precision: str | None = None) -> Callable[[nn.Module, Any], tuple[Tensor, Figures]]:
    """The step of `fit`: corrupts a micro-batch and gives its loss and figures."""
    config = parts.config
    precision = precision or parts.precision
    drawn: dict[int, Corruption] = {}

    def step(model: nn.Module, batch: Placed) -> tuple[Tensor, Figures]:
        position, slot, images = batch["position"], batch["slot"], batch["images"]
        if position not in drawn:
            drawn.clear()
            drawn[position] = draw(parts, position, config.train.batch_size)
        corruption = drawn[position].rows(slot, slot + len(images))
        if config.model.drop_path:
            torch.manual_seed(derive_seed(config.train.seed, _DROPOUT, position, slot))
        with autocast(precision, parts.device):
            return model(images, corruption)

    return step
