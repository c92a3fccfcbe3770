"""The tools: one table of their settings, checks and recipes, for the command line (cli.py) and Python (api.py).

Free of torch: a recipe's module is imported when it runs.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from mpp.curation.settings import CacheRecipe, CheckRecipe, ShardRecipe
from mpp.downstream.inference_settings import EmbedRecipe, PredictRecipe, check_embed, check_predict
from mpp.downstream.settings import FewshotRecipe, FinetuneConfig, ProbeRecipe
from mpp.errors import ConfigError
from mpp.pretraining.settings import ConvertRecipe, PretrainConfig
from mpp.report.settings import VisualizeRecipe
from mpp.study.settings import StudyConfig


@dataclass(frozen=True)
class Tool:
    """A tool: settings -> checks -> recipe -> report."""

    about: str
    """What it is for, in one line of `mpp --help`."""
    settings: type[Any]
    recipe: str
    """MODULE:FUNCTION, which takes the settings and returns the exit code."""
    needs: Mapping[str, str]
    """Settings that may not be empty, and the error where one is."""
    aliases: Mapping[str, str]
    outside: tuple[str, ...] = ()
    """The setting of a folder that may not lie among the images, and those of the images."""
    check: Callable[[Any], None] = lambda config: None
    report: bool = False
    """Whether run_dir/report.html is written after a run that finished."""


def _check_apart(config: PretrainConfig | FinetuneConfig) -> None:
    """Refuses to write where the weights are that a run starts from."""
    if not (config.run_dir and config.init):
        return
    folder, weights = (Path(name).expanduser().resolve() for name in (config.run_dir, config.init))
    if folder == weights or (weights.name == "model" and folder == weights.parent):
        raise ConfigError(f"--run-dir {config.run_dir} is what --init names; choose another folder to write to")


def _check_visualize(config: VisualizeRecipe) -> None:
    if bool(config.init) == bool(config.runs):
        what = "both --init and --runs" if config.init else "nothing to look at"
        raise ConfigError(f"{what}: give --init, such as --init runs/first, or --runs, such as --runs runs/a runs/b")
    if config.runs and not config.out:
        raise ConfigError("nowhere to write to: --runs needs --out, a folder for report.html")


def _check_study(config: StudyConfig) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "the runs of a study take one device each; without torchrun, start the same command once for each device"
        )


ALIASES = {"data": "data.source", "download": "data.download"}
_FINETUNE = {**ALIASES, "test": "data.test", "labels": "data.labels", "group": "data.group"}
_AS_A_RUN = {"data.source": "data", "model.in_chans": "in_chans"} | {
    f"data.{name}": name for name in ("value_range", "background", "max_bad", "max_image_mb", "workers", "download")
}
_GROUP = {"data.group": "group"}
_ENCODER = _GROUP | {
    name: f"encoder.{name}" for name in ("img_size", "device", "precision", "workers", "cache", "max_image_mb")
}
_FROZEN = {
    "init": "no encoder: give --init, such as --init runs/first, or several, one after the other",
    "data": "no labelled images: give --data, such as --data folder:/my/labelled or --data demo",
}
TOOLS = {
    "pretrain": Tool(
        "Pretrain an encoder on images without labels.",
        PretrainConfig,
        "mpp.pretraining.recipe:run",
        {
            "data.source": "no images to learn from: give --data, such as --data folder:/my/images or --data demo",
            "run_dir": "nowhere to write to: give --run-dir, such as --run-dir runs/first, or --dry-run",
        },
        ALIASES,
        ("run_dir", "data.source", "fewshot.data", "fewshot.test"),
        _check_apart,
        report=True,
    ),
    "finetune": Tool(
        "Train a classifier from labelled images, from an encoder or from scratch.",
        FinetuneConfig,
        "mpp.downstream.finetune:run",
        {
            "init": "nothing to start from: give --init, such as --init runs/first, or none for a new model",
            "data.source": "no images to learn from: give --data, such as --data folder:/my/labelled or --data demo",
            "run_dir": "nowhere to write to: give --run-dir, such as --run-dir runs/ft",
        },
        _FINETUNE,
        ("run_dir", "data.source", "data.test"),
        _check_apart,
        report=True,
    ),
    "fewshot": Tool(
        "Test encoders with a few labelled images a class, on frozen features.",
        FewshotRecipe,
        "mpp.downstream.evaluate:fewshot",
        _FROZEN,
        _ENCODER,
        ("out", "data", "test"),
    ),
    "probe": Tool(
        "Test encoders with all labels: linear, k-NN and attentive probes.",
        ProbeRecipe,
        "mpp.downstream.evaluate:probe",
        _FROZEN,
        _ENCODER,
    ),
    "predict": Tool(
        "Classify images with a fine-tuned model.",
        PredictRecipe,
        "mpp.downstream.predict:predict",
        {},
        {},
        check=check_predict,
    ),
    "embed": Tool(
        "Write features of images to a file, or find images that are alike in one.",
        EmbedRecipe,
        "mpp.downstream.embed:embed",
        {},
        {name: setting for name, setting in _ENCODER.items() if name != "cache"},
        check=check_embed,
    ),
    "convert": Tool(
        "Write weights as a timm or Hugging Face folder, or as ONNX.",
        ConvertRecipe,
        "mpp.pretraining.convert:convert",
        {
            "init": "nothing to convert: give --init, such as --init runs/first or --init vit.npz",
            "out": "nowhere to write to: give --out, a folder or a file that ends in .onnx",
        },
        {},
    ),
    "visualize": Tool(
        "Show what a model learnt on one page, or compare runs.",
        VisualizeRecipe,
        "mpp.report.visualize:visualize",
        {},
        {},
        ("out", "data"),
        _check_visualize,
    ),
    "study": Tool(
        "Measure what pretraining is worth: shares of the labels, seeds, one table.",
        StudyConfig,
        "mpp.study.run:run",
        {
            "data": "no labelled images: give --data, such as --data cifar10:DIR or --data demo",
            "run_dir": "nowhere to write to: give --run-dir, such as --run-dir runs/study",
        },
        _GROUP,
        ("run_dir", "data", "test", "pretrain.data.source"),
        _check_study,
    ),
    "shard": Tool(
        "Pack images into tar shards.",
        ShardRecipe,
        "mpp.curation.shard:shard",
        {
            "data": "nothing to pack: give --data, such as --data folder:/my/images",
            "out": "nowhere to write to: give --out, a folder for the shards",
        },
        _AS_A_RUN,
    ),
    "check_data": Tool(
        "Look at images before a run: what they are, and what is bad.",
        CheckRecipe,
        "mpp.curation.check_data:check_data",
        {"data": "no images to look at: give --data, such as --data folder:/my/images"},
        _AS_A_RUN,
        ("out", "data"),
    ),
    "cache": Tool("Say what lies in the cache, and clear it.", CacheRecipe, "mpp.curation.cache_tool:cache", {}, {}),
}


def run(tool: Tool, config: Any) -> int:
    """Checks the settings, runs the recipe, and then writes the report about it."""
    dry_run = getattr(config, "dry_run", False)
    for name, message in tool.needs.items():
        if not attrgetter(name)(config) and not (name == "run_dir" and dry_run):
            raise ConfigError(message)
    tool.check(config)
    if tool.outside:
        from mpp.data.sources.specs import check_outside_images

        folder, *specs = (attrgetter(name)(config) for name in tool.outside)
        check_outside_images(f"--{tool.outside[0].replace('_', '-')}", folder, specs)
    if getattr(config, "run_dir", ""):
        config = replace(config, run_dir=str(Path(config.run_dir).expanduser()))
    module, _, function = tool.recipe.partition(":")
    status = getattr(importlib.import_module(module), function)(config)
    if tool.report and not status and config.log.report and not dry_run:
        from mpp.report.visualize import write_report

        write_report(config.run_dir, config.train.device)
    return status
