"""Converts weights between timm, Hugging Face, JAX and ONNX: `python tools/convert.py --help`."""

import sys

from mpp.cli import convert

if __name__ == "__main__":
    sys.exit(convert())
