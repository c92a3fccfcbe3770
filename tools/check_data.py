"""Looks at images before a run: `python tools/check_data.py --help`."""

import sys

from mpp.cli import check_data

if __name__ == "__main__":
    sys.exit(check_data())
