"""Pretrains a Vision Transformer without labels: `python tools/pretrain.py --help`."""

import sys

from mpp.cli import pretrain

if __name__ == "__main__":  # loader workers that are spawned import this file again
    sys.exit(pretrain())
