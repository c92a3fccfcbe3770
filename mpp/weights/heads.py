"""Classification heads: where models have theirs, new ones that say nothing, and one that timm does not have."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class TanhHead(nn.Module):
    """The paper's pre-training head, an MLP with one hidden tanh layer (section 3.1); JAX's `pre_logits` and `head`."""

    def __init__(self, in_features: int, representation: int, num_classes: int) -> None:
        super().__init__()
        self.pre_logits = nn.Linear(in_features, representation)
        self.fc = nn.Linear(representation, num_classes)

    def representation(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b r"]:
        """What the last layer reads."""
        return self.pre_logits(x).tanh()

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return self.fc(self.representation(x))


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of the classification head's parameters: `head.`, `fc.`, `head.fc.`."""
    known: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ((known,) if isinstance(known, str) else known))


def zero_head(model: Any) -> None:
    """Zeroes the last layer of the head, so that a new head says nothing before it has learnt (appendix B.1.1)."""
    parts = dict(model.named_modules())
    if isinstance(parts.get("head"), TanhHead):
        layers = [parts["head.fc"]]
    else:  # by name: a model may have several, and its `get_classifier` tells of one alone, or of a norm before it
        layers = [parts[name] for prefix in classifier_names(model) if (name := prefix.removesuffix(".")) in parts]
    for layer in layers or [model.get_classifier()]:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
