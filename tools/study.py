"""Says what the pretraining is worth, in one command: `python tools/study.py --help`."""

import sys

from mpp.cli import study

if __name__ == "__main__":  # loader workers that are spawned import this file again
    sys.exit(study())
