"""The parts of a study, and how each is done: a pretraining, a fine-tuning run, an encoder read frozen."""

import contextlib
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mpp.downstream.finetune import run as finetune
from mpp.downstream.finetune_result import Inputs, finished, read_result
from mpp.downstream.labelled import Labelled
from mpp.errors import RunError
from mpp.pretraining.recipe import run as pretrain
from mpp.report.settings import LONGER, RANDOM, SCRATCH
from mpp.study.arms import Pretraining
from mpp.study.cells import Cell, Place, cell_config, told_otherwise, tuned_for
from mpp.study.frozen import Reading, earlier, encoder, reading_path
from mpp.study.record import Record
from mpp.study.settings import StudyConfig
from mpp.study.turns import Part, lock_of


class Work:
    """All that a study has to do, told to its record as it is done, or found to be done."""

    def __init__(
        self,
        config: StudyConfig,
        labelled: Labelled,
        runs: Sequence[Pretraining],
        todo: Sequence[Cell],
        inits: Mapping[Place, str],
        record: Record,
    ) -> None:
        """`inits`: what each side starts from."""
        self._config, self._labelled, self._inits, self._record = config, labelled, inits, record
        self._runs, self._todo = runs, todo
        self._choosers = {tuned_for(config, cell): cell for cell in reversed(todo)}
        self._rates: dict[tuple[str, str], float] = {}
        self._pretrained: set[Place] = set()
        self._inputs: dict[Place, Inputs] = {}
        self._told: set[Path | Cell | Place] = set()

    def parts(self) -> list[Part]:
        """In the order in which one process does them."""
        root = self._config.run_dir
        found = [
            Part(lock_of(root, run.folder), lambda number=number, run=run: self._pretrain(number, run))
            for number, run in enumerate(self._runs, 1)
        ]
        for number, cell in enumerate(self._todo, 1):
            folder = cell_config(self._config, cell, self._inits).run_dir
            found.append(
                Part(
                    lock_of(root, folder),
                    lambda number=number, cell=cell: self._finetune(number, cell),
                    lambda cell=cell: self._can_start(cell.place) and self._rate_is_known(cell),
                )
            )
        for place, (name, seed) in encoders(self._inits).items():
            found.append(
                Part(
                    lock_of(root, reading_path(self._config, name, seed)),
                    lambda place=place, name=name, seed=seed: self._read_frozen(place, name, seed),
                    lambda place=place: self._can_start(place),
                )
            )
        return found

    def tell_what_is_done(self) -> None:
        """Tells the record of all that has ended, whichever process did it."""
        for run in self._runs:
            if run.folder not in self._told and run.finished:
                self._record.add_pretraining(run)
                self._told.add(run.folder)
        for cell in self._todo:
            one = cell_config(self._config, cell, self._inits)
            result = None if cell in self._told else read_result(Path(one.run_dir))
            if result is not None and not told_otherwise(one):
                self._record.add_cell(cell, one, result)
                self._told.add(cell)
        for place in encoders(self._inits).values():
            kept = None if place in self._told else earlier(self._config, *place)
            if kept is not None:
                self._record.add_frozen(*place, kept)
                self._told.add(place)

    def _write(self) -> None:
        self.tell_what_is_done()
        self._record.write()

    def _can_start(self, place: Place) -> bool:
        """Whether its pretraining is done; from scratch means the encoder of the first one."""
        if not self._runs:
            return True
        first = self._runs[0]
        return ((first.arm.name, first.seed) if place[0] in (SCRATCH, LONGER) else place) in self._pretrained

    def _rate_is_known(self, cell: Cell) -> bool:
        """Whether its learning rate is chosen, or it is what chooses."""
        group = tuned_for(self._config, cell)
        return group in self._rates or self._choosers[group] == cell

    def _inputs_of(self, place: Place) -> Inputs:
        if place not in self._inputs:
            self._inputs[place] = Inputs.of(encoder(self._inits[place], self._config), self._labelled)
        return self._inputs[place]

    def _pretrain(self, number: int, run: Pretraining) -> int:
        name = f"pretraining [{number}/{len(self._runs)}] {run.arm.name}, seed {run.seed}"
        done, began, how = run.finished, time.perf_counter(), "was done before"
        if not done:
            print(f"{name}: {run.config.train.length}; see {run.folder / 'log.txt'}", flush=True)
            torch.compiler.reset()  # or the last of many arms would run uncompiled
            with _logged(run.folder):  # its page will tell what it was worth, and is made when that is known
                status = pretrain(replace(run.config, log=replace(run.config.log, report=False)))
            torch.compiler.reset()
            how = f"{'stopped after ' * (status != 0)}{time.perf_counter() - began:.0f} s"
            if status:
                print(f"{name}: {how}", flush=True)
                return status
            self._write()
        print(f"{name}: {how}", flush=True)
        self._pretrained.add((run.arm.name, run.seed))
        return 0

    def _finetune(self, number: int, cell: Cell) -> int:
        group, inputs = tuned_for(self._config, cell), self._inputs_of(cell.place)
        one = cell_config(self._config, cell, self._inits, self._rates.get(group))
        name, began, how = f"[{number}/{len(self._todo)}] {cell}", time.perf_counter(), "was done before"
        result = finished(one, inputs)
        done = result is not None
        if result is None:
            try:
                with _logged(Path(one.run_dir)):
                    status = finetune(one, compare=False)
            except RunError as error:
                raise RunError(f"{name}: {error}") from error
            if status:
                return status
            result, how = finished(one, inputs), f"{time.perf_counter() - began:.0f} s"
            if result is None:
                raise RunError(f"{name}: left no result in {one.run_dir}")
        print(f"{name}: top-1 {result.top1:.2%} (optim.lr {result.lr:g}; {how})", flush=True)
        self._rates.setdefault(group, result.lr)
        # Three times the weights, in hundreds of runs, which a result makes worthless.
        shutil.rmtree(Path(one.run_dir) / "checkpoints", ignore_errors=True)
        if not done:
            self._write()
        return 0

    def _read_frozen(self, place: Place, name: str, seed: int | None) -> int:
        began = time.perf_counter()
        reading = Reading(self._config, name, seed, self._inits[place], self._inputs_of(place), self._labelled)
        if not reading.kept():
            reading.figures()
            self._write()
            of = "" if seed is None else f", seed {seed}"
            print(f"frozen features of {name}{of}: {time.perf_counter() - began:.0f} s", flush=True)
        return 0


def encoders(inits: Mapping[Place, str]) -> dict[Place, Place]:
    """What is read frozen: each starting point, and how few-shot calls it."""
    sides = (place for place in inits if place[0] != LONGER)  # which is scratch again
    return {(side, seed): (RANDOM if side == SCRATCH else side, seed) for side, seed in sides}


@contextlib.contextmanager
def _logged(folder: Path) -> Generator[None]:
    """What a part of the study says goes to log.txt in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
