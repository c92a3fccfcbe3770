"""Measures the library beside its references: `python tools/bench.py fewshot --help`."""

import sys

from mpp.cli import bench

if __name__ == "__main__":
    sys.exit(bench())
