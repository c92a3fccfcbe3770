"""A training step small enough to be measured in a test."""

import torch
from benchmarks.step_sides import Setting

from mpp.model.settings import ModelConfig

CPU = torch.device("cpu")
TINY = ModelConfig("vit_tiny_patch16_224", (32,), (8,), embed_dim=48, depth=2, num_heads=3)
SETTING = Setting(TINY, 2, CPU, "fp32", "off")
