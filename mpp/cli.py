"""The commands. They read the command line; torch is loaded only once it is known to be sound."""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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

_ALIASES = {"data": "data.source", "download": "data.download"}
_FINETUNE = {**_ALIASES, "test": "data.test", "labels": "data.labels"}
_IMAGES = ("value_range", "background", "max_bad", "max_image_mb", "workers", "download")
_AS_A_RUN = {f"data.{name}": name for name in _IMAGES} | {
    "data.source": "data",
    "model.in_chans": "in_chans",
}
_ENCODER = {name: f"encoder.{name}" for name in ("img_size", "device", "precision", "workers", "cache", "max_image_mb")}


def pretrain(argv: Sequence[str] | None = None) -> int:
    """Pretrains as the command line says (`argv`, by default the process's own); returns the exit code."""
    return run_tool("pretrain", PretrainConfig, argv, _pretrain)


def _pretrain(config: PretrainConfig) -> int:
    if not config.data.source:
        raise ConfigError("no images to learn from: give --data, such as --data folder:/my/images or --data demo")
    if not config.run_dir and not config.dry_run:
        raise ConfigError("nowhere to write to: give --run-dir, such as --run-dir runs/first, or --dry-run")
    _check_apart(config.run_dir, config.init)
    _check_outside("--run-dir", config.run_dir, config.data.source, config.fewshot.data, config.fewshot.test)
    from mpp.pretraining.recipe import run

    return _reported(run, _at_home(config))


def _check_apart(run_dir: str, init: str) -> None:
    """Refuses to write where the weights are that a run starts from."""
    if not (run_dir and init):
        return
    folder, weights = (Path(name).expanduser().resolve() for name in (run_dir, init))
    if folder == weights or (weights.name == "model" and folder == weights.parent):
        raise ConfigError(f"--run-dir {run_dir} is what --init names; choose another folder to write to")


def _check_outside(setting: str, folder: str, *specs: str) -> None:
    from mpp.data.sources.specs import check_outside_images

    check_outside_images(setting, folder, specs)


def _reported(run: Callable[[Any], int], config: Any) -> int:
    """Runs a recipe, then writes run_dir/report.html where it finished and the report is not turned off."""
    status = run(config)
    if not status and config.log.report and not getattr(config, "dry_run", False):
        from mpp.report.visualize import write_report

        write_report(config.run_dir, config.train.device)
    return status


def _at_home(config: T) -> T:
    """The config with a `~` of its run folder written out."""
    told: Any = config
    return replace(told, run_dir=str(Path(told.run_dir).expanduser())) if told.run_dir else config


def finetune(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, or trains from scratch, as the command line says; returns the exit code."""
    return run_tool("finetune", FinetuneConfig, argv, _finetune, _FINETUNE)


def _finetune(config: FinetuneConfig) -> int:
    if not config.init:
        raise ConfigError("nothing to start from: give --init, such as --init runs/first, or none for a new model")
    if not config.data.source:
        raise ConfigError("no images to learn from: give --data, such as --data folder:/my/labelled or --data demo")
    if not config.run_dir:
        raise ConfigError("nowhere to write to: give --run-dir, such as --run-dir runs/ft")
    _check_apart(config.run_dir, config.init)
    _check_outside("--run-dir", config.run_dir, config.data.source, config.data.test)
    from mpp.downstream.finetune import run

    return _reported(run, _at_home(config))


def fewshot(argv: Sequence[str] | None = None) -> int:
    """Evaluates frozen features by few-shot least squares; returns the exit code."""
    return run_tool("fewshot", FewshotRecipe, argv, _fewshot, _ENCODER)


def _fewshot(config: FewshotRecipe) -> int:
    _check_frozen(config)
    _check_outside("--out", config.out, config.data, config.test)
    from mpp.downstream.evaluate import fewshot

    return fewshot(config)


def probe(argv: Sequence[str] | None = None) -> int:
    """Evaluates frozen features by a linear classifier or nearest neighbours; returns the exit code."""
    return run_tool("probe", ProbeRecipe, argv, _probe, _ENCODER)


def _probe(config: ProbeRecipe) -> int:
    _check_frozen(config)
    from mpp.downstream.evaluate import probe

    return probe(config)


def _check_frozen(config: FewshotRecipe | ProbeRecipe) -> None:
    if not config.init:
        raise ConfigError("no encoder: give --init, such as --init runs/first, or several, one after the other")
    if not config.data:
        raise ConfigError("no labelled images: give --data, such as --data folder:/my/labelled or --data demo")


def predict(argv: Sequence[str] | None = None) -> int:
    """Classifies images; returns the exit code."""
    return run_tool("predict", PredictRecipe, _with_images(sys.argv[1:] if argv is None else argv), _predict, {})


def _predict(config: PredictRecipe) -> int:
    if not config.init:
        raise ConfigError("no model: give --init, such as --init runs/ft")
    if not config.images:
        raise ConfigError("no images: name files or folders, such as predict --init runs/ft image.jpg")
    from mpp.downstream.predict import predict

    return predict(config)


def _with_images(argv: Sequence[str]) -> list[str]:
    """The command line with what belongs to no setting as the images; the settings take one value each."""
    words: list[str] = []
    images: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            images.append(word)
        elif word == "--images":
            continue
        elif word.startswith("--images="):
            images.append(word.removeprefix("--images="))
        else:
            words.append(word)
            if "=" not in word and word not in ("-h", "--help", "--version") and rest:
                words.append(rest.pop(0))
    return [*words, "--images", *images] if images else words


def convert(argv: Sequence[str] | None = None) -> int:
    """Converts weights from one form to another; returns the exit code."""
    return run_tool("convert", ConvertRecipe, argv, _convert, {})


def _convert(config: ConvertRecipe) -> int:
    if not config.init:
        raise ConfigError("nothing to convert: give --init, such as --init runs/first or --init vit.npz")
    if not config.out:
        raise ConfigError("nowhere to write to: give --out, a folder or a file that ends in .onnx")
    from mpp.pretraining.convert import convert

    return convert(config)


def visualize(argv: Sequence[str] | None = None) -> int:
    """Draws what a model learnt; returns the exit code."""
    return run_tool("visualize", VisualizeRecipe, argv, _visualize, {})


def _visualize(config: VisualizeRecipe) -> int:
    if bool(config.init) == bool(config.runs):
        told = "both --init and --runs" if config.init else "nothing to look at"
        raise ConfigError(f"{told}: give --init, such as --init runs/first, or --runs, such as --runs runs/a runs/b")
    if config.runs and not config.out:
        raise ConfigError("nowhere to write to: --runs needs --out, a folder for report.html")
    _check_outside("--out", config.out, config.data)
    from mpp.report.visualize import visualize

    return visualize(config)


def study(argv: Sequence[str] | None = None) -> int:
    """Runs a study: pretrain, fine-tune, few-shot, table; returns the exit code."""
    return run_tool("study", StudyConfig, argv, _study, {})


def _study(config: StudyConfig) -> int:
    if not config.data:
        raise ConfigError("no labelled images: give --data, such as --data cifar10:DIR or --data demo")
    if not config.run_dir:
        raise ConfigError("nowhere to write to: give --run-dir, such as --run-dir runs/study")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "the runs of a study take one device each; without torchrun, start the same command once for each device"
        )
    _check_outside("--run-dir", config.run_dir, config.data, config.test, config.pretrain.data.source)
    from mpp.study.run import run

    return run(_at_home(config))


def shard(argv: Sequence[str] | None = None) -> int:
    """Packs images into shards; returns the exit code."""
    return run_tool("shard", ShardRecipe, argv, _shard, _AS_A_RUN)


def _shard(config: ShardRecipe) -> int:
    if not config.data:
        raise ConfigError("nothing to pack: give --data, such as --data folder:/my/images")
    if not config.out:
        raise ConfigError("nowhere to write to: give --out, a folder for the shards")
    from mpp.curation.shard import shard

    return shard(config)


def check_data(argv: Sequence[str] | None = None) -> int:
    """Looks at images before a run; returns the exit code: 0 where a run would start, 1 where it would not."""
    return run_tool("check_data", CheckRecipe, argv, _check_data, _AS_A_RUN)


def _check_data(config: CheckRecipe) -> int:
    if not config.data:
        raise ConfigError("no images to look at: give --data, such as --data folder:/my/images")
    _check_outside("--out", config.out, config.data)
    from mpp.curation.check_data import check_data

    return check_data(config)


def cache(argv: Sequence[str] | None = None) -> int:
    """Says what lies in the cache, and clears it; returns the exit code."""
    return run_tool("cache", CacheRecipe, argv, _cache, {})


def _cache(config: CacheRecipe) -> int:
    from mpp.curation.cache_tool import cache

    return cache(config.clear, config.limit, config.files)


def run_tool(
    prog: str,
    cls: type[T],
    argv: Sequence[str] | None,
    run: Callable[[T], int],
    aliases: Mapping[str, str] = _ALIASES,
) -> int:
    """Parses `cls`, runs, and turns what the user can put right into one line on stderr and an exit code of 2 or 1.

    Of several ranks one speaks, the first to fail; those that only miss another say so in one line, if nobody else did.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr: the locale may lack ±, or a name's letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        limit_threads()
        config = parse(cls, sys.argv[1:] if argv is None else argv, prog, cls.__doc__ or "", aliases)
        if os.environ.get("MPP_CACHE_LIMIT"):  # wrong, it is said now rather than when something is kept
            limit_of(cache_folder())
        return run(config)
    except UserError as error:
        # All ranks read the same settings, so one speaks for all; anything else may have befallen this rank alone.
        _report(prog, error, alike=isinstance(error, ConfigError))
        return error.exit_code
    except Unreachable as error:
        _report(prog, f"{error}; once it answers, try again")
        return 1
    except KeyboardInterrupt:
        if rank == "0":
            print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        missed = failure.lost_another(error)
        if missed:
            failure.await_torchrun(1)  # whoever caused it will say why
            if _report(prog, f"another rank is gone, or silent for longer than MPP_TIMEOUT: {missed}"):
                failure.await_torchrun()
            return 1
        if failure.rank_name() and not _report(prog, f"{type(error).__name__}: {error}"):
            return 1
        raise


def _report(prog: str, what: object, alike: bool = False) -> bool:
    """Says it on stderr and to torchrun, unless another rank here has spoken for all; whether it did."""
    if not failure.is_first_to_report(alike):
        failure.await_torchrun()
        return False
    line = f"{prog}: error: {'' if alike else failure.rank_name()}{' '.join(str(what).splitlines())}"
    failure.report_to_torchrun(line)
    print(line, file=sys.stderr)
    return True
