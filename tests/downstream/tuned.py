"""Labelled images with all that goes wrong, fine-tuning in this process, and what it leaves as timm reads it."""

import csv
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mpp.cli import finetune
from mpp.data.decoding import decode
from mpp.data.settings import DecodeOptions, Framing
from mpp.data.transform import EvalTransform, normalise
from mpp.downstream.finetune_result import Result
from tests import runs

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)

HUES = {"blue": (60, 60, 200), "green": (60, 200, 60), "lonely": (180, 60, 180), "red": (200, 60, 60)}
TESTED = 45  # images of each class that is in both parts: with the others more than one batch, and a part of another


class Done(NamedTuple):
    """A fine-tuning run that has ended, and what it printed."""

    source: str
    run_dir: Path
    out: str
    err: str
    result: Result
    predictions: list[dict[str, str]]


def write_split(root: Path) -> str:
    """A split folder of images of many sizes; one class is in train/ alone, one in test/ alone; each has a bad one."""
    rng = np.random.default_rng(0)
    parts = {"train": dict.fromkeys(HUES, 8) | {"lonely": 3}, "test": {"blue": TESTED, "green": TESTED, "red": TESTED}}
    for part, classes in parts.items():
        for name, number in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(number):
                small = (HUES[name] + rng.normal(0, 40, (3, 4, 3))).clip(0, 255).astype(np.uint8)
                size = (20 + index, 50 - index) if index % 2 else (31, 17)
                Image.fromarray(small).resize(size).save(folder / f"{index}.png")
    (root / "test" / "unknown").mkdir()
    shutil.copy(root / "test" / "red" / "0.png", root / "test" / "unknown" / "0.png")
    (root / "train" / "red" / "text.png").write_text("this is no PNG")
    (root / "test" / "green" / "empty.png").touch()
    return f"folder:{root}"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def tune(source: str, run_dir: Path, *flags: str, **changed: str) -> int:
    """The command in this process."""
    return finetune(runs.finetune_command(source, run_dir, *flags, **changed)[1:])


def in_timm(run_dir: Path, channels: int = 3, **options: Any) -> Any:
    model: Any = timm.create_model(f"local-dir:{run_dir / 'model'}", pretrained=True, **options).eval()
    assert model.pretrained_cfg["input_size"][0] == channels
    return model


def pixels(paths: list[str], model: Any) -> torch.Tensor:
    """The images as timm's config.json says that they are to be read."""
    told = model.pretrained_cfg
    framing = Framing(*(told[key] for key in ("crop_pct", "interpolation", "crop_mode")))
    transform = EvalTransform(tuple(told["input_size"][1:]), framing)
    images = torch.stack([transform(decode(Path(path).read_bytes(), DecodeOptions(3))) for path in paths])
    return normalise(images, tuple(told["mean"]), tuple(told["std"]))


def assert_same_run(first: Path, second: Path) -> None:
    runs.assert_same_run(first, second)
    for name in ("result.json", "predictions.csv", "classes.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
