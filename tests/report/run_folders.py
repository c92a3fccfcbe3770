"""Run folders written by hand, with figures that are known."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpp.config import overridden, to_yaml
from mpp.data.settings import DataConfig
from mpp.downstream.settings import FinetuneConfig, FinetuneOptimConfig, LabelledConfig
from mpp.objective.settings import ObjectiveConfig
from mpp.pretraining.settings import PretrainConfig
from mpp.report.html import all_pictures
from mpp.report.page import Picture, Section, Table, Text
from mpp.report.run_record import read_run
from mpp.report.visualize import run_sections
from mpp.system.files import write_csv
from mpp.training.settings import OptimConfig

START = {
    "time": "2026-03-01T10:00:00+00:00",
    "step": 0,
    "command": "tools/pretrain.py --data 'folder:/my images'",
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "hardware": {"processor": "Some CPU", "cores": 4, "memory_gib": 23.5, "hosts": 1, "devices": ["cpu"]},
    "precision": "fp32",
    "seed": 0,
    "data": {"source": "1,234 images in 7 classes", "images": 1234, "classes": 7},
    "targets": "targets: 77 of 512 classes occur",
    "warning": "",
}


def trained(step: int, masked: float, score: str = "accuracy", **figures: Any) -> dict[str, Any]:
    """A row of a pretraining whose batches have 100 images and take a second."""
    kinds = {f"{score}_{kind}": masked for kind in ("masked", "random", "unchanged")}
    losses = {"loss": 6 - 10 * masked, "loss_masked": 6.5 - 10 * masked, score: masked}
    trivial = {f"{score}_baseline_neighbours": 0.296, f"{score}_baseline_frequent": 0.2}
    times = {"lr": 1e-3, "time/images_per_second": 100.0, "time/data_wait": 0.25}
    return {"step": step, "images": 100 * step, **losses, **kinds, **trivial, **times, **figures}


def fewshot(step: int, one: float, five: float) -> dict[str, Any]:
    figures = {"fewshot/1shot": one, "fewshot/1shot_std": 0.01, "fewshot/5shot": five, "fewshot/5shot_std": 0.02}
    return {"step": step, "images": 100 * step, **figures, "time/fewshot_seconds": 30.0}


ROWS = [fewshot(0, 0.1, 0.2), trained(10, 0.031), trained(200, 0.3), fewshot(200, 0.15, 0.25), trained(400, 0.412)]
ROWS.append(fewshot(400, 0.25, 0.4567))


def pretrained(
    folder: Path,
    rows: Iterable[dict[str, Any]] = ROWS,
    starts: Sequence[dict[str, Any]] = (START,),
    ended: bool = True,
    target: Any = "mean_colour",
    lr: float = 2e-4,
) -> Path:
    """The folder of a pretraining run."""
    config = PretrainConfig(str(folder), data=DataConfig("folder:/my images"), objective=ObjectiveConfig(target=target))
    config = replace(config, optim=OptimConfig(lr=lr))
    _write(folder, config, rows, starts)
    if ended:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    return folder


def tuned(
    folder: Path,
    init: str,
    top1: float = 0.6,
    labels: str = "100%",
    ended: bool = True,
    classes: int = 3,
    lr: float = 0.01,
    seed: int = 0,
    steps: int = 20,
    mean_ap: float | None = None,
    **settings: str,
) -> Path:
    """The folder of a fine-tuning run; `settings` are more of its config, such as train__batch_size="64"."""
    config = FinetuneConfig(init, str(folder), data=LabelledConfig("folder:/labelled", labels=labels))
    config = replace(config, optim=FinetuneOptimConfig(lr=(lr,)), train=replace(config.train, seed=seed))
    config = overridden(config, [word for key, of in settings.items() for word in (f"--{key.replace('__', '.')}", of)])
    name, final = ("test/top1", top1) if mean_ap is None else ("test/mean_ap", mean_ap)
    rows = [
        {"step": 10, "images": 80, "loss": 2.0, "accuracy": 0.3, "lr": 0.01, "time/images_per_second": 8.0},
        {"step": 10, "images": 80, name: 0.35},
        {"step": 20, "images": 160, "loss": 1.0, "accuracy": 0.7, "lr": 0.005, "time/images_per_second": 8.0},
        {"step": 20, "images": 160, name: final},
    ]
    _write(folder, config, rows, ())
    if not ended:
        return folder
    result = {"top1": top1, "top5": None, "balanced": 0.55, "interval": [top1 - 0.05, top1 + 0.05], "test_images": 100}
    result |= {"train_images": 400, "num_classes": classes, "lr": lr, "steps": steps, "init": init}
    result |= {} if mean_ap is None else {"mean_ap": mean_ap, "mean_ap_interval": [mean_ap - 0.05, mean_ap + 0.05]}
    (folder / "result.json").write_text(json.dumps(result))
    head = ("class", "train_images", "test_images", "correct", "accuracy", "precision", "most_confused_with")
    each = [(f"c{i}", 10 * i, 20 + i, i, f"{i / (20 + i):.6f}", "", f"c{i + 1}") for i in range(classes)]
    write_csv(folder / "classes.csv", [head, *each])
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(folder / "confusion.png")
    return folder


def _write(folder: Path, config: Any, rows: Iterable[dict[str, Any]], starts: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if starts:
        (folder / "environment.json").write_text(json.dumps(starts))


def sections(folder: Path, results: Sequence[Path] = ()) -> list[Section]:
    """All sections about the run but those about its model."""
    first, last = run_sections(read_run(folder), results)
    return [*first, *last]


def _blocks(sections: Iterable[Section], name: str, kind: type) -> list[Any]:
    return [
        block for section in sections if section.name == name for block in section.blocks if isinstance(block, kind)
    ]


def tables(sections: Iterable[Section], name: str) -> list[Table]:
    """The tables of the section of that name."""
    return _blocks(sections, name, Table)


def texts(sections: Iterable[Section], name: str) -> list[str]:
    return [block.text for block in _blocks(sections, name, Text)]


def pictures(sections: Iterable[Section]) -> dict[str, Picture]:
    """All pictures by name."""
    blocks = [block for section in sections for block in section.blocks]
    return {picture.name: picture for block in blocks for picture in all_pictures(block)}
