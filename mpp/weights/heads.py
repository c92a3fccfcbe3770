"""Heads that timm's models do not have."""

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
