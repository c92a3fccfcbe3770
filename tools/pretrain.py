"""Pretrains a Vision Transformer without labels: `python tools/pretrain.py --help`."""

import sys

from mpp.cli import pretrain

sys.exit(pretrain())
