"""Fine-tunes an encoder, or trains one from scratch, on labelled images: `python tools/finetune.py --help`."""

import sys

from mpp.cli import finetune

if __name__ == "__main__":  # loader workers that are spawned import this file again
    sys.exit(finetune())
