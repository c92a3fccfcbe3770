"""Says what lies in the cache, and clears it: `python tools/cache.py --help`."""

import sys

from mpp.cli import cache

if __name__ == "__main__":
    sys.exit(cache())
