"""Builds a pretraining run from its config: data, model, optimiser, schedule."""

from dataclasses import dataclass, field, replace

import torch

from mpp import dist
from mpp.data.device_jpeg import choose_decoder
from mpp.data.pixel_cache import open_images
from mpp.data.settings import DataConfig
from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.contents import Contents
from mpp.data.sources.opening import open_source
from mpp.data.transform import Normalise, TrainTransform
from mpp.dist import World
from mpp.downstream.feature_cache import weights_hash
from mpp.downstream.fewshot import Fewshot
from mpp.downstream.labelled import open_labelled
from mpp.errors import UserError, command
from mpp.model.encoder import Decoder, Encoder, build_encoder
from mpp.model.settings import ModelConfig
from mpp.objective.image_words import KnownComponents
from mpp.objective.masking import num_picked
from mpp.objective.objective import MaskedPatchPrediction
from mpp.objective.settings import ObjectiveConfig
from mpp.objective.target import build_target
from mpp.pretraining.encoder_choice import choose_encoder, usual_side
from mpp.pretraining.settings import FewshotConfig, PretrainConfig
from mpp.system.cores import memory
from mpp.system.meta_device import building_on
from mpp.system.process import global_draws
from mpp.training.auto import Choice, Facts, activation_bytes, needs_choice, settle
from mpp.training.earlier_run import earlier, same_init
from mpp.training.parallel import DTYPES, choose_precision
from mpp.training.run_folder import once_a_machine
from mpp.training.schedule import build_schedule
from mpp.training.settings import chosen
from mpp.training.training_run import TrainingRun, build_state, training_workers
from mpp.weights.base import Weights
from mpp.weights.continued import build_continued, complete_configs, complete_data, complete_model, load_encoder
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import encoder_weights

FIRST = "init"
"""Folder in a run's own for the weights that it went on from, as timm loads them."""


@dataclass
class PretrainingRun(TrainingRun):
    """The parts of a pretraining run."""

    config: PretrainConfig
    model: MaskedPatchPrediction
    source: Source
    """The images as opened; evaluations and pictures read these."""
    fewshot: Fewshot | None
    init_hash: str
    """Of the weights that a new run goes on from; empty for random ones, and where a run is resumed."""
    components: KnownComponents | None = field(default=None, kw_only=True)
    """What the words of its whole images are made of, once that is known (survey.py)."""


def build(config: PretrainConfig, world: World, device: torch.device) -> PretrainingRun:
    """Opens the source and builds model, optimiser and schedule; writes nothing.

    Raises:
        UserError: settings that do not fit each other, the machine or the source.
    """
    config, first = resolve_init(config, world)
    data = config.data
    precision = choose_precision(config.train.precision, device)
    workers = training_workers(data, world, device)
    reading = data.decode_options(config.model.in_chans)
    source = once_a_machine(world, lambda: open_images(data, reading, workers))
    fewshot = once_a_machine(world, lambda: _open_fewshot(config.fewshot, data)) if config.fewshot.data else None
    init_hash = weights_hash(first.state) if first is not None and first.state is not None else ""

    def facts() -> dict[str, str]:
        """What must be the same for all ranks."""
        found = {"images": source.listing(), "precision": precision, "weights to go on from": init_hash[:12]}
        if fewshot is not None:
            images = fewshot.labelled
            found |= {"few-shot images": images.train.listing(), "few-shot test images": images.test.listing()}
        return found

    dist.agree(facts)
    config, choices = settle_config(config, world, device, source)
    model = build_model(config, device, DTYPES[precision])
    rate, clip_norm = chosen(config.optim.lr), config.optim.clip_norm
    schedule = build_schedule(config.train, config.schedule, rate, clip_norm, len(source), world.size)
    if first is not None:
        load_encoder(model.encoder, first)
    transform = TrainTransform(data, model.encoder.image_hw, config.model.in_chans)
    wrapped, state = build_state(config, model, world, device, precision, Contents.of(source))
    return PretrainingRun(
        config=config,
        world=world,
        device=device,
        precision=precision,
        train_source=source,
        reading=reading,
        transform=transform,
        model=model,
        wrapped=wrapped,
        state=state,
        schedule=schedule,
        workers=workers,
        decode=choose_decoder(data.decode, device, transform),
        source=source,
        fewshot=fewshot,
        init_hash=init_hash,
        choices=choices,
    )


def settle_config(
    config: PretrainConfig, world: World, device: torch.device, source: Source | None = None
) -> tuple[PretrainConfig, tuple[Choice, ...]]:
    """Puts values that fit the images and the device, or those of the run that goes on, in the place of auto.

    Without `source` that of the config is opened, where a value depends on it.
    """
    encoder_left = "auto" in (config.model.name, config.model.img_size)
    if not encoder_left and not needs_choice(config):
        return config, ()
    data, cpu, choices = config.data, device.type == "cpu", ()
    before = earlier(config)
    if source is None and before is None:
        source = open_source(data.source, download=data.download, keep=data.keep)
    images = len(source) if source is not None else 1
    if encoder_left:
        side = 0
        if source is not None and before is None and config.model.img_size == "auto":
            reading = data.decode_options(config.model.in_chans)
            side = dist.gather(usual_side(source, reading) if world.main else 0)[0]
        model, choices = choose_encoder(config.model, images, side, cpu, before and before.model)
        config = replace(config, model=model)
    encoder = build_model(config, "meta").encoder
    facts = Facts(
        images=images,
        labelled=False,
        cpu=cpu,
        ranks=world.size,
        width=encoder.embed_dim,
        image_bytes=activation_bytes(encoder.vit, encoder.grid[0] * encoder.grid[1]),
        memory=memory() // world.local_size if cpu else 0,
        continued=bool(config.init),
        words=config.objective.words > 0,
    )
    config, more = settle(config, facts, before)
    return config, (*choices, *more)


def _open_fewshot(config: FewshotConfig, data: DataConfig) -> Fewshot:
    try:
        labelled = open_labelled(config.data, config.test, data.download, data.keep, config.group)
    except SourceError as error:
        raise SourceError(f"fewshot.data: {error}") from error
    if labelled.sets is not None:
        several = f"fewshot.data: {labelled.train.name} has several labels an image, and accuracy takes one"
        raise SourceError(f"{several}; leave it out, and run {command('fewshot')} on the finished run")
    return Fewshot(labelled, config.shots, config.seeds, config.l2, config.max_test)


def resolve_init(config: PretrainConfig, world: World) -> tuple[PretrainConfig, Weights | None]:
    """Fills the config in from the weights of its `init` (see `complete_configs`), and opens these.

    A run that has begun holds both in its own config and checkpoints, so its weights are not read again; a dry run
    always reads them. Without `init` the config stays as it is.

    Raises:
        UserError: weights that cannot be opened or gone on from; a run folder that began with others.
    """
    if not config.init:
        return config, None
    before = earlier(config)
    if before is not None:
        if not same_init(before.init, before.run_dir, config.init, config.run_dir):
            raise UserError(
                f"{config.run_dir} began with {f'--init {before.init}' if before.init else 'new weights'}, "
                f"not --init {config.init}; choose another --run-dir"
            )
        init, init_args, weights = before.init, before.init_args, None
        model, data = complete_model(config.init, config.model, before.model), complete_data(config.data, before.data)
    else:
        name = config.model.name if config.model.name not in (ModelConfig().name, "auto") else ""
        init, weights = config.init, once_a_machine(world, lambda: open_weights(config.init, name))
        model, data, init_args = complete_configs(init, weights, config.model, config.data)
    if config.init_args not in ((), init_args):
        raise UserError(f"init_args is filled in from --init {config.init}; leave it out")
    return replace(config, init=init, model=model, data=data, init_args=init_args), weights


def build_model(
    config: PretrainConfig, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> MaskedPatchPrediction:
    """Builds encoder, [mask] embedding, heads and decoder, drawn from the seed; on "meta" allocates nothing.

    Args:
        config: where it has an `init`, as `resolve_init` gives it; the weights are not loaded.
        dtype: what attention will be computed in (see `build_encoder`).

    Raises:
        UserError: settings of model and objective that do not fit each other.
    """
    objective, channels = config.objective, config.model.in_chans
    config.data.decode_options(channels)
    with global_draws(config.train.seed):
        if config.init_args:
            encoder = build_continued(config.model, config.init_args, device, dtype)
        else:
            encoder = build_encoder(config.model, device, dtype)
        target = build_target(objective.target, encoder.patch, channels, objective.bits)
        _check_objective(objective, encoder, channels)
        decoder = Decoder(encoder, objective.decoder_depth) if objective.decoder_depth else None
        with building_on(device):
            built = MaskedPatchPrediction(
                encoder,
                target,
                Normalise(config.data.mean, config.data.std, channels),
                objective.mask_enters,
                objective.detail,
                decoder,
                objective.words,
                (config.data.vflip > 0, config.data.hflip > 0),
            )
    return built.to(device)


def _check_objective(objective: ObjectiveConfig, encoder: Encoder, channels: int) -> None:
    """Refuses settings of the objective that do not fit the encoder."""
    patches, blocks = encoder.grid[0] * encoder.grid[1], len(encoder.vit.blocks)
    if patches < 2 and objective.split[1] > 0:
        raise UserError("model.img_size holds one patch, which has no other to be replaced by; take smaller patches")
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
    if objective.words and num_picked(objective.ratio, patches) == patches:
        raise UserError(
            f"objective.ratio {objective.ratio:g} hides all {patches} patches, and objective.words needs others; take "
            "a smaller ratio"
        )
    if objective.detail and channels * encoder.patch[0] * encoder.patch[1] < 2:
        raise UserError("patches of one value have no details; leave out objective.detail or take larger patches")


def weights_of(config: PretrainConfig, encoder: Encoder, origin: str = "") -> Weights:
    """A run's encoder as weights, with what its config says of them (see `encoder_weights`)."""
    data, reading = config.data, config.data.decode_options(config.model.in_chans)
    return encoder_weights(encoder, config.model, data.mean, data.std, reading, origin, config.init_args)
