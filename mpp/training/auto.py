"""What `auto` stands for in a run: length, batch, rate and periods that fit the data. Free of torch.

The rule is this file. It keeps what the measured settings of docs/results.md have in common, and extends it by the
number of images: many passes over few images, few passes over many; small batches for few images, and with them a
small rate, as the square root of the batch (linear for sgd); smaller rates for wider encoders.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mpp.config import by_name, overridden
from mpp.data.sources.base import count
from mpp.training.duration import parse_duration

C = TypeVar("C")
_AUTO = ("auto", ["auto"])
_MIXED_PASSES = 100  # over the images, from which on mixing them and RandAugment are worth it (docs/few_labels.md)
_AUGMENTED, _NARROW = 1_000, 192  # images up to which RandAugment pays for an encoder that is less wide than this
_PROBED = 50_000  # images up to which a head begins at the probe: of more, their features would fill the memory
_RANDAUGMENT = "rand-m9-mstd0.5-inc1"
_WORDS_WIDTH = 256  # the widest encoder at which words did better with twice the rate; wider ones were not tried
BEGAN = "as this run began"
"""Why a run that goes on has a value."""


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    images: int
    """That are trained on."""
    labelled: bool
    """A fine-tuning, else a pretraining."""
    cpu: bool
    """Whether a CPU trains."""
    ranks: int = 1
    width: int = 768
    """Of the encoder's tokens."""
    image_bytes: int = 0
    """Memory that the activations of one image take; 0: unknown."""
    memory: int = 0
    """Bytes of memory of the machine, for one rank."""
    continued: bool = False
    """Whether a pretraining goes on from weights."""
    readable: bool = False
    """Whether a fine-tuning starts from weights that one linear layer can read."""
    words: bool = False
    """Whether a pretraining predicts visual words."""
    colour: bool = True
    """Whether RandAugment can change the images: they have three channels, and the CPU decodes them."""


@dataclass(frozen=True)
class Choice:
    """What was put in the place of auto, and why."""

    name: str
    value: str
    because: str

    def __str__(self) -> str:
        return f"{self.name} {self.value or 'none'}: {self.because}"


_NAMES = (
    *("train.batch_size", "train.length", "train.micro_batch", "schedule.warmup", "optim.lr", "optim.ema_decay"),
    *("model.head", "loss.mixup", "loss.cutmix", "data.randaugment", "log.every", "checkpoint.every"),
)


def needs_choice(config: Any) -> bool:
    """Whether any setting is left to `settle`."""
    given = by_name(config)
    return any(given.get(name) in _AUTO for name in _NAMES)


def activation_bytes(vit: Any, tokens: int) -> int:
    """Memory that the fp32 activations of one image take in a training step of a timm ViT; 0 for other models.

    A block keeps about 34 numbers a token and channel, and three attention matrices where no fused kernel spares them.
    """
    if not hasattr(vit, "blocks") or not hasattr(vit.blocks[0], "attn"):
        return 0
    heads, width = vit.blocks[0].attn.num_heads, vit.embed_dim
    return 4 * len(vit.blocks) * tokens * (34 * width + 3 * heads * tokens)


def settle(config: C, facts: Facts, before: Any = None) -> tuple[C, tuple[Choice, ...]]:
    """Replaces each auto that fits the data by a value, and says which and why.

    `before` is the config of the run that goes on, if one does; it keeps its values, whatever the machine is now.
    """
    given, began = by_name(config), by_name(before) if before is not None else {}
    choices: list[Choice] = []

    def value(name: str, rule: Callable[[], tuple[Any, str]]) -> Any:
        """The setting, chosen where it is auto; None where the recipe has none of this name."""
        current = given.get(name)
        if current not in _AUTO:
            return current
        earlier = began.get(name, "auto")
        chosen, because = rule() if earlier in _AUTO else (earlier, BEGAN)
        choices.append(Choice(name, " ".join(map(str, chosen)) if isinstance(chosen, list) else str(chosen), because))
        return chosen

    batch = value("train.batch_size", lambda: _batch(facts))
    length = value("train.length", lambda: _length(facts))
    steps = parse_duration(length).steps(batch, facts.images)
    micro = value("train.micro_batch", lambda: _micro_batch(facts, batch))
    warmup = 0.1 if facts.labelled else 0.05
    value(
        "schedule.warmup",
        lambda: (f"{min(max(round(warmup * steps), 20), steps // 4)} steps", f"{warmup:.0%} of the run, at least 20"),
    )
    value("optim.lr", lambda: _rate(facts, given["optim.name"], batch))
    average = max(0.0, min(0.9998, round(1 - 10 / steps, 5)))
    value("optim.ema_decay", lambda: (average, "the average of the last tenth of the run"))
    value("model.head", lambda: _head(facts))
    passes = round(steps * batch / facts.images)
    long, number = passes >= _MIXED_PASSES, f"{count(passes, 'pass')} over the images; from {_MIXED_PASSES} on it pays"
    share = max(batch // facts.ranks, 1)
    paired = max(n for n in range(1, min(micro, share) + 1) if share % n == 0) % 2 == 0
    because = number if paired else "the images of a pass make no pairs"
    value("loss.mixup", lambda: (0.8 if long and paired else 0.0, because))
    value("loss.cutmix", lambda: (1.0 if long and paired else 0.0, because))
    value("data.randaugment", lambda: _randaugment(facts, long, number))
    value("log.every", lambda: (f"{min(max(steps // 20, 1), 50)} steps", "at least 20 rows"))
    value("checkpoint.every", lambda: (f"{max(math.ceil(steps / 20), 100)} steps", "5% of the run, at least 100 steps"))
    flags = [word for choice in choices for word in (f"--{choice.name}", choice.value)]
    return overridden(config, flags), tuple(choices)


def _head(facts: Facts) -> tuple[str, str]:
    if not facts.readable:
        return "linear", "no weights that one linear layer could be fitted to"
    many = facts.images > _PROBED
    return "linear" if many else "probe", f"{'more than' if many else 'up to'} {_PROBED:,} images"


def _randaugment(facts: Facts, long: bool, number: str) -> tuple[str, str]:
    if not facts.colour:
        return "", "it needs images of three channels that the CPU decodes"
    if long and facts.width < _NARROW and facts.images > _AUGMENTED:
        return "", f"more than {_AUGMENTED:,} images are enough for an encoder of width {facts.width}"
    return (_RANDAUGMENT if long else ""), number


def _batch(facts: Facts) -> tuple[int, str]:
    """The largest power of two up to half of the labelled images, or a quarter of the unlabelled ones."""
    share, low = (2, 8) if facts.labelled else (4, 16)
    high = (64 if facts.labelled else 128) if facts.cpu else (512 if facts.labelled else 1024)
    size = 2 ** int(math.log2(min(max(facts.images / share, low), high, facts.images)))
    part = "half" if facts.labelled else "a quarter"
    because = f"the largest power of two up to {part} of {facts.images:,} images, from {low} to {high}"
    whole = facts.ranks * 2 if facts.labelled else facts.ranks  # mixup takes images in pairs
    if facts.ranks > 1 and size % whole:
        size = math.ceil(size / whole) * whole
        because += f"; a multiple of {'twice the ' if facts.labelled else ''}{facts.ranks} processes"
    return size, because


def _length(facts: Facts) -> tuple[str, str]:
    """Steps that grow as the number of images to the power of 0.4, so that passes over the images become fewer."""
    factor = 100 if facts.labelled else 180
    steps = factor * facts.images**0.4
    because = f"{factor} x images^0.4"
    if facts.cpu and not facts.labelled:
        steps, because = steps / 4, f"{because}, a quarter of it on a CPU"
    digits = 10 ** max(math.floor(math.log10(steps)) - 1, 0)
    return f"{max(500, round(steps / digits) * digits)} steps", f"{because}, at least 500"


def _rate(facts: Facts, optimiser: str, batch: int) -> tuple[str, str]:
    if optimiser == "sgd":
        rate, because = 0.03 * batch / 512, "0.03 x batch / 512"
    elif facts.labelled:
        rate = min(1e-3 * math.sqrt(batch / 512 * 768 / facts.width), 2e-3)
        because = "1e-3 x sqrt(batch / 512 x 768 / width), at most 2e-3"
    else:
        rate = min(5e-4 * 768 / facts.width * math.sqrt(batch / 256), 2e-3)
        because = "5e-4 x 768 / width x sqrt(batch / 256), at most 2e-3"
        if facts.words and facts.width <= _WORDS_WIDTH:
            rate, because = 2 * rate, f"{because}, twice that for words"
    if facts.continued:
        rate, because = rate / 10, f"{because}, a tenth of it for weights that are there already"
    return f"{rate:.2g}", because


def _micro_batch(facts: Facts, batch: int) -> tuple[int, str]:
    share = max(batch // facts.ranks, 1)
    most = min(share, 256)
    if facts.image_bytes and facts.memory:
        fits = max(int(facts.memory / 4 / facts.image_bytes), 2)
        most = min(most, 2 ** int(math.log2(fits)))
    return divisor(share, most), "what a quarter of the memory holds, at most 256" if facts.cpu else "at most 256"


def divisor(share: int, most: int) -> int:
    """The largest divisor of `share` up to `most`, an even one where there is one: mixup takes images in pairs."""
    return max((n for n in range(1, min(most, share) + 1) if share % n == 0), key=lambda n: (n % 2 == 0, n))
