"""The parts of one fine-tuning run: classifier, optimiser, schedule, the step between them, and predictions.

Every random draw derives from the seed and from what is drawn for, as in pretraining: (seed, epoch, index) for
augmentation, (seed, images seen, slot) for mixup and stochastic depth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import numpy as np
import torch
from jaxtyping import Float32, Int64
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from mpp import dist
from mpp.data.device_jpeg import choose_decoder
from mpp.data.feed import DeviceBatch
from mpp.data.pixel_cache import cache_pixels
from mpp.data.randaugment import RandAugment
from mpp.data.seeds import derive_seed
from mpp.data.sources.base import Source, Subset
from mpp.data.sources.contents import Contents
from mpp.data.transform import EvalTransform, Normalise, TrainTransform, normalise
from mpp.dist import World
from mpp.downstream.feature_cache import weights_hash
from mpp.downstream.features import extract_by_all
from mpp.downstream.labelled import Labelled
from mpp.downstream.settings import ClassifierConfig, FinetuneConfig, parse_share
from mpp.downstream.start import fit_head, linear_head, start_weights
from mpp.errors import UserError
from mpp.model.encoder import check_patches, is_vit
from mpp.system.cores import memory
from mpp.system.meta_device import on_meta
from mpp.system.process import global_draws
from mpp.training.auto import Choice, Facts, activation_bytes, needs_choice, settle
from mpp.training.earlier_run import earlier
from mpp.training.parallel import DTYPES, autocast, choose_precision
from mpp.training.run_folder import once_a_machine
from mpp.training.schedule import build_schedule
from mpp.training.settings import chosen
from mpp.training.sharded import whole
from mpp.training.training_run import TrainingRun, build_state, training_workers
from mpp.weights.base import TanhHead, Weights, build, create

_MIX, _DROPOUT = 11, 12  # so that no two kinds of draws share a seed


class ClassifierLoss(nn.Module):
    """Normalisation (by the mean and std of `weights`), model and loss of a step, compiled as a whole."""

    def __init__(self, model: nn.Module, weights: Weights, smoothing: float, multi_label: bool = False) -> None:
        super().__init__()
        self.model, self.smoothing, self.multi_label = model, smoothing, multi_label
        self.normalise = Normalise(weights.mean, weights.std, weights.in_chans)

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes loss and figures of uint8 images (B, C, H, W) and classes (B,), or of what was normalised and mixed.

        That is float32 images, and targets (B, K) that are smoothed, too. With several labels an image targets are sets
        (B, K), smoothed here.
        """
        mixed = images.is_floating_point()
        logits = self.model(images if mixed else self.normalise(images)).float()
        if self.multi_label:
            target = target.float() * (1 - self.smoothing) + self.smoothing / 2
            loss = F.binary_cross_entropy_with_logits(logits, target)
        else:
            loss = F.cross_entropy(logits, target, label_smoothing=0.0 if mixed else self.smoothing)
        count = torch.full((), float(len(images)), dtype=torch.float64, device=loss.device)
        figures = {"loss": torch.stack([loss.detach().double() * count, count])}
        if not mixed and not self.multi_label:
            right = (logits.detach().argmax(dim=1) == target).sum().double()
            figures["accuracy"] = torch.stack([right, count])
        return loss, figures


@dataclass
class FinetuningRun(TrainingRun):
    """The parts of a fine-tuning run."""

    config: FinetuneConfig
    labelled: Labelled
    weights: Weights
    """What the run started from, with the normalisation that it trains with."""
    image_hw: tuple[int, int]
    """Input size in pixels."""

    def describe_images(self) -> str:
        """Say how many images are trained on and tested, in how many classes."""
        labelled, share = self.labelled, self.config.data.labels
        part = "" if parse_share(share) == 1 else f" ({share} of each class, drawn by data.labels_seed)"
        trained, tested = len(labelled.train_indices), len(labelled.test_indices)
        return f"{trained:,} training images{part} and {tested:,} test images in {len(labelled.classes)} classes"

    def all_doubts(self) -> list[str]:
        """Say why the run cannot learn, or its figures cannot tell."""
        return self.doubts(len(self.labelled.test_indices), len(self.labelled.classes))

    def read_decoded(self, say: Callable[[str], None]) -> None:
        """Trains on decoded pixels from the cache where that pays; only images that are trained on are decoded."""
        labelled = self.labelled
        if len(self.train_source) == len(labelled.train):  # decoded for other trainings on all of them, too
            self.train_source = Subset(self.decoded(labelled.train, say), labelled.train_indices)
        else:
            self.train_source = self.decoded(self.train_source, say)


def build_tuning(
    config: FinetuneConfig,
    labelled: Labelled,
    lr: float,
    world: World,
    device: torch.device,
    weights: Weights | None = None,
    choices: tuple[Choice, ...] = (),
) -> FinetuningRun:
    """Builds classifier, optimiser and schedule for one learning rate; writes nothing.

    `weights` are those of config.init, or others to check beforehand whether all fits; `choices` as `settle_config`
    gives them beside the config.

    Raises:
        UserError: settings that do not fit each other, the machine, the weights or the labels.
    """
    weights = weights or once_a_machine(world, lambda: start_weights(config))
    config, more = settle_config(config, labelled, weights, world, device)
    indices = labelled.train_indices
    clip_norm = config.optim.clip_norm
    schedule = build_schedule(config.train, config.schedule, lr, clip_norm, len(indices), world.size)
    precision = choose_precision(config.train.precision, device)
    first = "new" if weights.state is None else weights_hash(weights.state)[:12]
    dist.agree(lambda: {"precision": precision, "weights": first})
    workers = training_workers(config.data, world, device)
    contents = Contents.of(Subset(labelled.train, indices), labelled.train_labels[indices], labelled.classes)
    if config.data.cache == "pixels":
        train_source = once_a_machine(world, lambda: cache_pixels(labelled.train, weights.reading, workers))
        test_source = train_source
        if labelled.test is not labelled.train:
            test_source = once_a_machine(world, lambda: cache_pixels(labelled.test, weights.reading, workers))
        labelled = replace(labelled, train=train_source, test=test_source)
    image_hw = _image_hw(config.model, weights)
    with global_draws(config.train.seed):
        model: Any = _classifier(config.model, weights, image_hw, labelled, device, DTYPES[precision])
    if config.model.img_size:
        check_patches(model, image_hw, "model.img_size")
    if config.model.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:  # as timm's models say that they cannot
            what = f"model.grad_checkpointing: timm's {type(model).__name__} cannot"
            raise UserError(f"{what}; take a smaller train.micro_batch") from error
    if config.loss.mixup or config.loss.cutmix:
        _check_pairs(schedule.micro_batch, schedule.batch_size // world.size)
    if config.model.head == "probe" and earlier(config) is None:  # else a checkpoint has the head
        fit_head(model.to(device), labelled, weights, image_hw, device, precision, workers)
    loss = ClassifierLoss(model, weights, config.loss.smoothing, labelled.sets is not None).to(device)
    wrapped, state = build_state(config, model, world, device, precision, contents, loss)
    transform = (
        RandAugment(config.data, config.data.randaugment, image_hw, weights.in_chans, weights.mean)
        if config.data.randaugment
        else TrainTransform(config.data, image_hw, weights.in_chans)
    )
    return FinetuningRun(
        config=config,
        world=world,
        device=device,
        precision=precision,
        train_source=Subset(labelled.train, indices),
        reading=weights.reading,
        transform=transform,
        model=model,
        wrapped=wrapped,
        state=state,
        schedule=schedule,
        workers=workers,
        decode=choose_decoder(config.data.decode, device, transform),
        labelled=labelled,
        weights=weights,
        image_hw=image_hw,
        choices=(*choices, *more),
    )


def settle_config(
    config: FinetuneConfig, labelled: Labelled, weights: Weights, world: World, device: torch.device
) -> tuple[FinetuneConfig, tuple[Choice, ...]]:
    """Puts values that fit the labels and the device, or those of the run that goes on, in the place of auto."""
    if not needs_choice(config):
        return config, ()
    image_hw, cpu = _image_hw(config.model, weights), device.type == "cpu"
    with on_meta():
        model = create(weights, num_classes=len(labelled.classes), image_hw=image_hw)
    tokens = model.patch_embed.num_patches if is_vit(weights.name) else 0
    facts = Facts(
        images=len(labelled.train_indices),
        labelled=True,
        cpu=cpu,
        ranks=world.size,
        width=model.num_features,
        image_bytes=activation_bytes(model, tokens) if tokens else 0,
        memory=memory() // world.local_size if cpu else 0,
        readable=weights.state is not None and linear_head(model) is not None,
        colour=weights.in_chans == 3 and config.data.decode != "cuda",
    )
    return settle(config, facts, earlier(config))


def _image_hw(model: ClassifierConfig, weights: Weights) -> tuple[int, int]:
    return (model.img_size[0], model.img_size[-1]) if model.img_size else weights.image_hw


def _check_pairs(micro: int, share: int) -> None:
    """Refuses micro-batches that cannot be mixed in pairs; `share` is what a rank takes of a batch."""
    if micro % 2:
        even = max((n for n in range(2, micro, 2) if share % n == 0), default=2)
        remedy = "change train.batch_size" if share % 2 else f"set train.micro_batch to {even}"
        raise UserError(f"loss.mixup and cutmix mix pairs of images, but {micro} go in a pass; {remedy}")


def _classifier(
    model: ClassifierConfig,
    weights: Weights,
    image_hw: tuple[int, int],
    labelled: Labelled,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    if model.head == "keep":
        if weights.classes is None:
            raise UserError(f"model.head keep: {weights.origin} has no head; take linear")
        if weights.multi_label != (labelled.sets is not None):
            several = "several labels" if weights.multi_label else "one label"
            raise UserError(f"model.head keep: the head of {weights.origin} gives {several} an image; take linear")
        if weights.classes != labelled.classes:
            missing = sorted(set(labelled.classes) ^ set(weights.classes))[:5]
            head = f"the head of {weights.origin} is for {len(weights.classes)} classes"
            labels = f"the labels of {labelled.train.name} for {len(labelled.classes)}"
            raise UserError(f"model.head keep: {head}, {labels}; they differ in {', '.join(missing) or 'order'}")
    return build(
        weights,
        classes=None if model.head == "keep" else labelled.classes,
        representation=model.representation if model.head == "tanh" else None,
        pool=None if model.pool == "auto" else model.pool,
        image_hw=image_hw,
        drop_path=model.drop_path,
        attention=model.attention,
        device=device,
        dtype=dtype,
    )


def training_step(run: FinetuningRun) -> Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]:
    """Makes the step of `fit`: cross-entropy of a micro-batch, mixed and smoothed as the config says.

    Of several labels an image it is the binary cross-entropy, mean over images and classes.
    """
    seed, loss, weights = run.config.train.seed, run.config.loss, run.weights
    mix = None
    if loss.mixup or loss.cutmix:
        classes = len(run.labelled.classes)
        mix = Mixup(chosen(loss.mixup), chosen(loss.cutmix), label_smoothing=loss.smoothing, num_classes=classes)
    labelled, sets = run.labelled, None
    if labelled.sets is not None:
        sets = torch.from_numpy(labelled.sets[labelled.train_labels[labelled.train_indices]]).to(run.device)
        if mix is not None:
            mix.label_smoothing = 0.0  # the loss smooths

    def step(model: nn.Module, batch: DeviceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        images, target = batch["images"], batch["labels"]
        if sets is not None:
            target = sets[batch["index"].to(run.device, non_blocking=True)]
        position = batch["position"], batch["slot"]
        if mix is not None:
            np.random.seed(derive_seed(seed, _MIX, *position) % 2**32)  # timm draws from the global one
            images = normalise(images, weights.mean, weights.std)
            if sets is None:
                images, target = mix(images, target)
            else:
                mix.num_classes = len(images)  # it mixes their numbers, and so says how much of each there is
                images, parts = mix(images, torch.arange(len(images), device=images.device))
                target = parts @ target.float()
        torch.manual_seed(derive_seed(seed, _DROPOUT, *position))
        with autocast(run.precision, run.device):
            return model(images, target)

    return step


def predict(
    run: FinetuningRun, source: Source, indices: Int64[np.ndarray, " n"]
) -> tuple[Float32[np.ndarray, "m k"], Int64[np.ndarray, " m"]]:
    """Gives logits of the tested model for these images, by all ranks, and the indices of those that decode."""
    weights, transform = run.weights, EvalTransform(run.image_hw, run.weights.framing)
    with whole(run.exported) as model:

        def encode(images: Tensor) -> Tensor:
            with autocast(run.precision, run.device):
                return model(normalise(images, weights.mean, weights.std)).float()

        model.eval()
        try:
            return extract_by_all(encode, source, indices, transform, weights.reading, run.device, workers=run.workers)
        finally:
            model.train()


def result_weights(run: FinetuningRun) -> Weights:
    """Gives the tested model as weights with head and class names, for export, to rank 0; all ranks must call it."""
    state, pool = None, run.config.model.pool
    with whole(run.exported) as model:
        if run.world.main:
            state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    head = getattr(run.exported, "head", None)
    representation = head.pre_logits.out_features if isinstance(head, TanhHead) else None
    return replace(
        run.weights,
        state=state,
        image_hw=run.image_hw,
        pool=run.weights.pool if pool == "auto" else pool,
        classes=run.labelled.classes,
        multi_label=run.labelled.sets is not None,
        representation=representation,
        origin=str(run.config.run_dir),
    )
