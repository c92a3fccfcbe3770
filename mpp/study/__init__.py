"""What pretraining is worth, measured: several pretrainings, fine-tuning beside scratch, frozen features, tables."""

from mpp.study.run import run

__all__ = ["run"]
