"""What the few-shot evaluation can be told. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass, field

from mpp.train.schedule import parse_duration


@dataclass(frozen=True)
class FewshotConfig:
    """Few-shot linear regression on frozen features while pretraining runs (section 4.1 and table 5 of the paper)."""

    data: str = field(default="", metadata={"free": True})
    """Labelled source. Empty: none, and no few-shot evaluation. Its own test split is used where it has one."""
    test: str = field(default="", metadata={"free": True})
    """Labelled source of the test images. Empty: the data's test split, else a fifth of the data, held out."""
    every: str = field(default="auto", metadata={"free": True})
    """Distance between evaluations. auto: as many as cost less than 2% of the run, at most 20; one always ends it."""
    shots: tuple[int, ...] = field(default=(1, 5, 10, 25), metadata={"free": True})
    """Labelled images per class."""
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"free": True})
    """Draws of the shots, one result each."""
    l2: float = field(default=2.0**10, metadata={"free": True})
    """Strength of the L2 regularisation."""
    max_test: int = field(default=2000, metadata={"free": True})
    """Most test images, drawn once by a fixed seed."""

    def __post_init__(self) -> None:
        if self.every != "auto":
            parse_duration(self.every, "fewshot.every")
        if not self.shots or any(k < 1 for k in self.shots):
            raise ValueError(f"fewshot.shots takes numbers of at least 1, got {list(self.shots)}")
        if not self.seeds or any(s < 0 for s in self.seeds):
            raise ValueError(f"fewshot.seeds takes numbers of at least 0, got {list(self.seeds)}")
        if not self.l2 > 0:
            raise ValueError(f"fewshot.l2 must be positive, got {self.l2}")
        if self.max_test < 1:
            raise ValueError(f"fewshot.max_test must be at least 1, got {self.max_test}")
        if self.test and not self.data:
            raise ValueError("fewshot.test needs fewshot.data, the labelled images to learn from")
