"""python tools/bench.py training: whole pretraining runs of this checkout beside another one of the project.

Each run is the checkout's own `tools/pretrain.py` in a process of its own, from the loader to the rows of the log;
pictures, evaluations, loggers and the report are off. Its speed is that of the log without the first quarter.
A side does not get the settings that it does not know. A first run of each, as long as the others, does not count: it
decodes what is cached, and measures what is measured once.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import TrainingBench
from mpp.config import by_name, from_file, overridden
from mpp.config.files import load_yaml
from mpp.dist import World
from mpp.errors import ConfigError, RunError, UserError
from mpp.pretraining.settings import FewshotConfig, PretrainConfig
from mpp.study.settings import StudyConfig
from mpp.training.parallel import choose_device, choose_precision
from mpp.training.provenance import read_starts
from mpp.training.rows import read_rows, training_spans
from mpp.training.settings import LogConfig
from mpp.training.timing import hardware, ratios, spread, timed

_TOOL = Path("tools", "pretrain.py")
_LOOK = """
import json, sys
import mpp
from mpp import PretrainConfig
from mpp.config import overridden
from mpp.errors import ConfigError

config, left, before = PretrainConfig(), json.load(sys.stdin), None
while left and left != before:  # a setting may only be right beside a later one
    before, left = left, []
    for flag in before:
        try:
            config = overridden(config, flag)
        except ConfigError:
            left.append(flag)
print(json.dumps([mpp.__file__, left]))
"""


@dataclass
class Side:
    """A checkout, what it trains, and what came of it."""

    name: str
    checkout: Path
    flags: Sequence[Sequence[str]]
    unknown: Sequence[Sequence[str]]
    commit: str = ""
    rounds: list[tuple[float, float, float]] = field(default_factory=list)
    """Images per second, share of that time spent waiting for data, seconds of the process outside of its training."""


def training(config: TrainingBench) -> int:
    """Measures and prints images per second and their ratios; returns the exit code.

    Raises:
        UserError: a checkout, recipe or device that cannot be used.
        RunError: a run that failed.
    """
    here = Path(__file__).resolve().parents[2]
    checkouts = {"this checkout": here} | ({"the other": Path(config.against).resolve()} if config.against else {})
    for path in checkouts.values():
        if not (path / _TOOL).is_file():
            raise UserError(f"a checkout of this project is needed, and {path} has no {_TOOL}")
    recipes = {text: recipe(text, here / "configs") for text in config.recipes}
    device = choose_device(config.device, World(), "device")
    precisions = config.precision or tuple(dict.fromkeys((choose_precision("auto", device, "precision"), "fp32")))
    print(hardware())
    print(f"{config.steps} steps a run, median (least to most) of {config.repeats}, in turns, on {device}")
    for text, of in recipes.items():
        for precision in precisions:
            train = replace(of.train, length=f"{config.steps} steps", device=config.device, precision=precision)
            flags = as_flags(replace(of, train=train))
            sides = [_side(name, path, flags) for name, path in checkouts.items()]
            measure(sides, config.repeats)
            print(f"\n{text}, {precision}")
            _print(sides)
    return 0


def recipe(text: str, configs: Path) -> PretrainConfig:
    """The pretraining that "FILE" or "FILE: FLAGS" names, without what looks at a run while it trains.

    Raises:
        ConfigError: a file or flag that cannot be used, or no images.
    """
    name, _, flags = text.partition(": ")
    path = Path(name) if Path(name).exists() else configs / name
    study = "pretrain" in load_yaml(path)
    config = from_file(StudyConfig, path).pretrain if study else from_file(PretrainConfig, path)
    try:
        config = overridden(config, shlex.split(flags))
    except ValueError as error:  # ConfigError too; and quotes that do not close
        raise ConfigError(f"recipes: {text}: {error}") from None
    if not config.data.source:
        raise ConfigError(f"recipes: {text}: names no images: give '{name}: --data.source demo', or others")
    log = LogConfig(every="5%", pictures="", report=False, to=(), effective_rank=False)
    checkpoint = replace(config.checkpoint, every="100%", keep_every="")
    return replace(config, log=log, checkpoint=checkpoint, fewshot=FewshotConfig(), run_dir="", dry_run=False)


def as_flags(config: PretrainConfig) -> list[list[str]]:
    """What a config sets, as on the command line; the defaults are each side's own."""
    usual = by_name(PretrainConfig())
    return [
        [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        for name, value in by_name(config).items()
        if value != usual[name]
    ]


def _side(name: str, checkout: Path, flags: Sequence[Sequence[str]]) -> Side:
    """A checkout and those of the flags that it knows.

    Raises:
        UserError: another mpp would be imported, or none.
    """
    words = [sys.executable, "-P", "-c", _LOOK]
    done = _run(words, checkout, {}, json.dumps(flags))
    if done.returncode:
        raise UserError(f"{checkout} cannot be measured: {_last_line(done)}")
    found, unknown = json.loads(done.stdout)
    if not Path(found).resolve().is_relative_to(checkout):
        raise UserError(f"{checkout} cannot be measured: mpp would be imported from {Path(found).parent}")
    return Side(name, checkout, [flag for flag in flags if flag not in unknown], unknown)


def measure(sides: Sequence[Side], repeats: int) -> None:
    """Runs all sides in turns, and writes down in each what came of it.

    Raises:
        RunError: a run that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, repeats):
            for side in sides[:: 1 if number % 2 else -1]:
                cache, run_dir = Path(folder, side.name, "cache"), Path(folder, side.name, f"run_{number}")
                words = [word for flag in side.flags for word in flag]
                tool = [sys.executable, str(side.checkout / _TOOL), *words, "--run-dir", str(run_dir)]
                done, seconds = timed(lambda: _run(tool, side.checkout, {"MPP_CACHE": str(cache)}))  # noqa: B023
                if done.returncode:
                    raise RunError(f"the run of {side.checkout} failed: {_last_line(done)}")
                side.commit = read_starts(run_dir)[-1].get("commit", "")
                rate, waited, trained = steady(read_rows(run_dir / "metrics.jsonl"))
                side.rounds += [(rate, waited, seconds - trained)] if number >= 0 else []


def steady(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Images per second without the first quarter, the share of that spent waiting, and seconds of all training."""
    spans = list(training_spans(rows))
    first = len(spans) // 4
    images = spans[-1][0]["images"] - (spans[first - 1][0]["images"] if first else 0)
    seconds = sum(span for _, span in spans[first:])
    waited = sum(row["time/data_wait"] * span for row, span in spans[first:])
    return images / seconds, waited / seconds, sum(span for _, span in spans)


def _run(
    words: Sequence[str], checkout: Path, env: Mapping[str, str], text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a command with the mpp of that checkout."""
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path, **env}, input=text, capture_output=True, text=True, check=False
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _print(sides: Sequence[Side]) -> None:
    for side in sides:
        rates, waits, besides = zip(*side.rounds, strict=True)
        speed = f"{spread(rates, ' images/s'):>32}   {np.median(waits):.0%} waiting for data"
        commit = side.commit[:12] + "-dirty" * side.commit.endswith("-dirty")
        print(f"  {side.name:24} {speed}, {np.median(besides):.1f} s besides   {commit}")
        if side.unknown:
            print(f"    does not know {', '.join(shlex.join(flag) for flag in side.unknown)}")
    if len(sides) > 1:
        ours, other = ([rate for rate, *_ in side.rounds] for side in sides)
        print(f"  {' / '.join(side.name for side in sides):24} {spread(ratios(ours, other), ' x'):>32}")
