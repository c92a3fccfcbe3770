"""Features of images, and images that are alike: `python tools/embed.py --help`."""

import sys

from mpp.cli import embed

if __name__ == "__main__":
    sys.exit(embed())
