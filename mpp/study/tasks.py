"""The tasks of a study: each pretraining, each fine-tuning run, each encoder read frozen."""

import contextlib
import shutil
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from mpp.downstream.finetune import run as finetune
from mpp.downstream.finetune_result import Inputs, finished
from mpp.errors import RunError
from mpp.pretraining.recipe import run as pretrain
from mpp.study.frozen import figures_path, open_encoder, read_frozen, saved_figures
from mpp.study.plan import FinetuneRun, Plan, Pretraining, StartPoint
from mpp.study.record import Record
from mpp.study.scheduler import Task, lock_of
from mpp.study.settings import LONGER, SCRATCH


class StudyTasks:
    """The tasks of one process; each writes the record of the study when it is done."""

    def __init__(self, plan: Plan, record: Record) -> None:
        self._plan, self._record = plan, record
        self._rates: dict[tuple[str, str], float] = {}
        self._pretrained: set[StartPoint] = set()
        self._inputs: dict[StartPoint, Inputs] = {}

    def tasks(self) -> list[Task]:
        """In the order in which one process does them."""
        plan, root = self._plan, self._plan.config.run_dir
        found = [
            Task(lock_of(root, run.folder), lambda number=number, run=run: self._pretrain(number, run))
            for number, run in enumerate(plan.pretrainings, 1)
        ]
        found += [
            Task(
                lock_of(root, plan.finetune_config(run).run_dir),
                lambda number=number, run=run: self._finetune(number, run),
                lambda run=run: self._can_tune(run),
            )
            for number, run in enumerate(plan.finetunings, 1)
        ]
        found += [
            Task(
                lock_of(root, figures_path(plan.config, *name)),
                lambda start=start: self._read_frozen(start),
                lambda start=start: self._can_start(start),
            )
            for start, name in plan.encoders.items()
        ]
        return found

    def _can_start(self, start: StartPoint) -> bool:
        """Whether its pretraining is done; from scratch is the encoder of the first one."""
        runs = self._plan.pretrainings
        if start[0] in (SCRATCH, LONGER) and runs:
            start = runs[0].arm.name, runs[0].seed
        return not runs or start in self._pretrained

    def _can_tune(self, run: FinetuneRun) -> bool:
        """Whether also its learning rate is chosen, or it chooses one."""
        group = self._plan.rate_group(run)
        return self._can_start(run.start) and (group in self._rates or self._plan.choosers[group] == run)

    def _inputs_of(self, start: StartPoint) -> Inputs:
        if start not in self._inputs:
            encoder = open_encoder(self._plan.inits[start], self._plan.config)
            self._inputs[start] = Inputs.of(encoder, self._plan.labelled)
        return self._inputs[start]

    def _pretrain(self, number: int, run: Pretraining) -> int:
        name = f"pretraining [{number}/{len(self._plan.pretrainings)}] {run.arm.name}, seed {run.seed}"
        if run.finished:
            print(f"{name}: was done before", flush=True)
        else:
            began = time.perf_counter()
            print(f"{name}: {run.config.train.length}; see {run.folder / 'log.txt'}", flush=True)
            torch.compiler.reset()  # or the last of many arms would run uncompiled
            with _logged(run.folder):  # its page says what it was worth, so that it is made when that is known
                status = pretrain(replace(run.config, log=replace(run.config.log, report=False)))
            torch.compiler.reset()
            seconds = f"{time.perf_counter() - began:.0f} s"
            if status:
                print(f"{name}: stopped after {seconds}", flush=True)
                return status
            self._record.write()
            print(f"{name}: {seconds}", flush=True)
        self._pretrained.add((run.arm.name, run.seed))
        return 0

    def _finetune(self, number: int, run: FinetuneRun) -> int:
        plan, began = self._plan, time.perf_counter()
        group, inputs = plan.rate_group(run), self._inputs_of(run.start)
        config = plan.finetune_config(run, self._rates.get(group))
        folder, name, took = Path(config.run_dir), f"[{number}/{len(plan.finetunings)}] {run}", "was done before"
        result = before = finished(config, inputs)
        if result is None:
            try:
                with _logged(folder):
                    status = finetune(config, compare=False)  # the study compares them once for all runs
            except RunError as error:
                raise RunError(f"{name}: {error}") from error
            if status:
                return status
            result, took = finished(config, inputs), f"{time.perf_counter() - began:.0f} s"
            if result is None:
                raise RunError(f"{name}: left no result in {folder}")
        print(f"{name}: top-1 {result.top1:.2%} (optim.lr {result.lr:g}; {took})", flush=True)
        self._rates.setdefault(group, result.lr)
        # Three times the weights, in hundreds of runs; with a result nobody needs them.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if before is None:
            self._record.write()
        return 0

    def _read_frozen(self, start: StartPoint) -> int:
        plan, began, inputs = self._plan, time.perf_counter(), self._inputs_of(start)
        side, seed = plan.encoders[start]
        if not saved_figures(plan.config, side, seed, inputs):
            read_frozen(plan, start, inputs)
            self._record.write()
            of = "" if seed is None else f", seed {seed}"
            print(f"frozen features of {side}{of}: {time.perf_counter() - began:.0f} s", flush=True)
        return 0


@contextlib.contextmanager
def _logged(folder: Path) -> Generator[None]:
    """What is printed goes to log.txt in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
