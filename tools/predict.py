"""Classifies images with a fine-tuned model: `python tools/predict.py --help`."""

import sys

from mpp.cli import predict

if __name__ == "__main__":
    sys.exit(predict())
