"""Packs images into tar shards: `python tools/shard.py --help`."""

import sys

from mpp.cli import shard

if __name__ == "__main__":
    sys.exit(shard())
