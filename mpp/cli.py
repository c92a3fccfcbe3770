"""The commands: one table of tools. torch is loaded only once the command line is known to be sound."""

import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from mpp.config import parse
from mpp.curation.settings import CacheRecipe, CheckRecipe, ShardRecipe
from mpp.downstream.settings import FewshotRecipe, FinetuneConfig, PredictRecipe, ProbeRecipe
from mpp.errors import ConfigError, Unreachable, UserError
from mpp.pretraining.settings import ConvertRecipe, PretrainConfig
from mpp.report.settings import VisualizeRecipe
from mpp.study.settings import StudyConfig
from mpp.system import failure
from mpp.system.cache import limit_of
from mpp.system.cores import limit_threads
from mpp.system.files import cache_folder

T = TypeVar("T")


@dataclass(frozen=True)
class _Tool:
    """A command: settings -> checks -> recipe -> report."""

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


_ALIASES = {"data": "data.source", "download": "data.download"}
_FINETUNE = {**_ALIASES, "test": "data.test", "labels": "data.labels"}
_AS_A_RUN = {"data.source": "data", "model.in_chans": "in_chans"} | {
    f"data.{name}": name for name in ("value_range", "background", "max_bad", "max_image_mb", "workers", "download")
}
_ENCODER = {name: f"encoder.{name}" for name in ("img_size", "device", "precision", "workers", "cache", "max_image_mb")}
_FROZEN = {
    "init": "no encoder: give --init, such as --init runs/first, or several, one after the other",
    "data": "no labelled images: give --data, such as --data folder:/my/labelled or --data demo",
}
_TOOLS = {
    "pretrain": _Tool(
        PretrainConfig,
        "mpp.pretraining.recipe:run",
        {
            "data.source": "no images to learn from: give --data, such as --data folder:/my/images or --data demo",
            "run_dir": "nowhere to write to: give --run-dir, such as --run-dir runs/first, or --dry-run",
        },
        _ALIASES,
        ("run_dir", "data.source", "fewshot.data", "fewshot.test"),
        _check_apart,
        report=True,
    ),
    "finetune": _Tool(
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
    "fewshot": _Tool(FewshotRecipe, "mpp.downstream.evaluate:fewshot", _FROZEN, _ENCODER, ("out", "data", "test")),
    "probe": _Tool(ProbeRecipe, "mpp.downstream.evaluate:probe", _FROZEN, _ENCODER),
    "predict": _Tool(
        PredictRecipe,
        "mpp.downstream.predict:predict",
        {
            "init": "no model: give --init, such as --init runs/ft",
            "images": "no images: name files or folders, such as predict --init runs/ft image.jpg",
        },
        {},
    ),
    "convert": _Tool(
        ConvertRecipe,
        "mpp.pretraining.convert:convert",
        {
            "init": "nothing to convert: give --init, such as --init runs/first or --init vit.npz",
            "out": "nowhere to write to: give --out, a folder or a file that ends in .onnx",
        },
        {},
    ),
    "visualize": _Tool(VisualizeRecipe, "mpp.report.visualize:visualize", {}, {}, ("out", "data"), _check_visualize),
    "study": _Tool(
        StudyConfig,
        "mpp.study.run:run",
        {
            "data": "no labelled images: give --data, such as --data cifar10:DIR or --data demo",
            "run_dir": "nowhere to write to: give --run-dir, such as --run-dir runs/study",
        },
        {},
        ("run_dir", "data", "test", "pretrain.data.source"),
        _check_study,
    ),
    "shard": _Tool(
        ShardRecipe,
        "mpp.curation.shard:shard",
        {
            "data": "nothing to pack: give --data, such as --data folder:/my/images",
            "out": "nowhere to write to: give --out, a folder for the shards",
        },
        _AS_A_RUN,
    ),
    "check_data": _Tool(
        CheckRecipe,
        "mpp.curation.check_data:check_data",
        {"data": "no images to look at: give --data, such as --data folder:/my/images"},
        _AS_A_RUN,
        ("out", "data"),
    ),
    "cache": _Tool(CacheRecipe, "mpp.curation.cache_tool:cache", {}, {}),
}


def _main(name: str, argv: Sequence[str] | None = None) -> int:
    """Does what the command line (`argv`, by default the process's own) asks of a tool; returns the exit code."""
    tool = _TOOLS[name]
    words = sys.argv[1:] if argv is None else argv
    words = _with_images(words) if name == "predict" else words
    return run_tool(name, tool.settings, words, functools.partial(_run, tool), tool.aliases)


# The entry points that setup.cfg names: `pretrain(argv)` returns the exit code.
pretrain = functools.partial(_main, "pretrain")
finetune = functools.partial(_main, "finetune")
fewshot = functools.partial(_main, "fewshot")
probe = functools.partial(_main, "probe")
predict = functools.partial(_main, "predict")
convert = functools.partial(_main, "convert")
visualize = functools.partial(_main, "visualize")
study = functools.partial(_main, "study")
shard = functools.partial(_main, "shard")
check_data = functools.partial(_main, "check_data")
cache = functools.partial(_main, "cache")


def _run(tool: _Tool, config: Any) -> int:
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


def _with_images(argv: Sequence[str]) -> list[str]:
    """The command line of `predict`, words that belong to no setting as its images; settings take one value."""
    words: list[str] = []
    images: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            images.append(word)
        elif word.startswith("--images="):
            images.append(word.removeprefix("--images="))
        elif word != "--images":
            words.append(word)
            if "=" not in word and word not in ("-h", "--help", "--version") and rest:
                words.append(rest.pop(0))
    return [*words, "--images", *images] if images else words


def run_tool(prog: str, cls: type[T], argv: Sequence[str], run: Callable[[T], int], aliases: Mapping[str, str]) -> int:
    """Parses `cls`, runs, and turns what the user can put right into one line on stderr and an exit code of 2 or 1.

    Of several ranks the first to fail reports; those that only miss another do so where nobody else has.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr: the locale may lack ±, or a name's letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        limit_threads()
        config = parse(cls, argv, prog, cls.__doc__ or "", aliases)
        if os.environ.get("MPP_CACHE_LIMIT"):  # a wrong one is reported now rather than when something is cached
            limit_of(cache_folder())
        return run(config)
    except UserError as error:
        # All ranks read the same settings, so one reports for all; any other error may be this rank's alone.
        _report(prog, error, alike=isinstance(error, ConfigError))
        return error.exit_code
    except Unreachable as error:
        _report(prog, f"{error}; once it answers, try again")
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        lost = failure.lost_another(error)
        if lost:
            failure.await_torchrun(1)  # the rank that caused it will report why
            if _report(prog, f"another rank is gone, or silent for longer than MPP_TIMEOUT: {lost}"):
                failure.await_torchrun()
            return 1
        if failure.rank_name() and not _report(prog, f"{type(error).__name__}: {error}"):
            return 1
        raise


def _report(prog: str, what: object, alike: bool = False) -> bool:
    """Reports on stderr and to torchrun, unless another rank here has done so; returns whether it did."""
    if not failure.is_first_to_report(alike):
        failure.await_torchrun()
        return False
    line = f"{prog}: error: {'' if alike else failure.rank_name()}{' '.join(str(what).splitlines())}"
    failure.report_to_torchrun(line)
    print(line, file=sys.stderr)
    return True
