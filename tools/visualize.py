"""What a model learnt, in pictures: `python tools/visualize.py --help`."""

import sys

from mpp.cli import visualize

if __name__ == "__main__":
    sys.exit(visualize())
