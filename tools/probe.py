"""Linear and nearest-neighbour probes on frozen features: `python tools/probe.py --help`."""

import sys

from mpp.cli import probe

if __name__ == "__main__":
    sys.exit(probe())
