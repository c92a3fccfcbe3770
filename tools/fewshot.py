"""Few-shot linear regression on frozen features: `python tools/fewshot.py --help`."""

import sys

from mpp.cli import fewshot

if __name__ == "__main__":
    sys.exit(fewshot())
