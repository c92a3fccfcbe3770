"""study.json, the data of a study: every run with its settings, figures and time, and what made them.

What pages and tables tell of a study they take from this file alone. It is written anew after every run, and names no
folder of the machine that it was made on.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpp.config import to_dict
from mpp.downstream.finetune_result import Result
from mpp.downstream.labelled import Labelled
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import without_credentials
from mpp.pretraining.build import build_model
from mpp.report.run_record import read_csv
from mpp.study.arms import Lengths, Pretraining
from mpp.study.cells import Cell, Place
from mpp.study.frozen import Figures
from mpp.study.settings import StudyConfig
from mpp.system.files import write_whole
from mpp.training.provenance import read_starts
from mpp.training.rows import last_part, read_rows, training_spans

FILE = "study.json"
_SCHEMA = 1
_CURVE = 50  # points
_MADE_BY = ("commit", "versions", "hardware", "precision")  # of environment.json; the rest names folders
_NOT_OF_OBJECTIVE = ("step", "images", "epoch", "lr")
# Names of folders may hold spaces, but neither the next source nor the next flag.
_FOLDERS = re.compile(r"(?<![\w./\\~-])(?:~[\w.-]*)?/(?!/)(?:(?:(?!\s-)[^/:])+/)*(?=[^\s/:])")
_LOCAL = re.compile(r"file://[^\s/]*(?=/)")
_UPWARD = re.compile(r"(?<![\w./\\~-])(?:[^\s/:]+/)*\.\./")  # "../", "a/../"
_ALTERNATIVES = re.compile(r"\{[^{}]*/[^{}]*\}")  # braces with folders in them


class Record:
    """What a study came to so far."""

    def __init__(
        self,
        config: StudyConfig,
        labelled: Labelled,
        runs: Sequence[Pretraining],
        cells: Sequence[Cell],
        encoders: Sequence[Place],
        seen: Mapping[str, int] | None = None,
    ) -> None:
        """Of what the study will have, in this order, in whichever order it is added.

        `seen`: by arm, how many test images its pretraining saw, where it saw any.
        """
        self._path = Path(config.run_dir) / FILE
        self._seconds: dict[Path, float] = {}
        self._starts: dict[Path | Cell, list[dict[str, Any]]] = {}
        self._pretraining: dict[Path, dict[str, Any]] = {run.folder: {} for run in runs}
        self._finetuning: dict[Cell, dict[str, Any]] = {cell: {} for cell in cells}
        self._frozen: dict[Place, Figures] = {place: {} for place in encoders}
        self.document: dict[str, Any] = {
            "schema": _SCHEMA,
            "name": self._path.absolute().parent.name,
            "finished": False,
            "config": without_folders(without_credentials(to_dict(config))),
            "environment": None,
            "environments": [],
            "data": {
                "train_images": len(labelled.train_indices),
                "test_images": len(labelled.test_indices),
                "classes": len(labelled.classes),
            }
            | ({"test_images_seen": dict(seen)} if seen else {}),
            "equal_time": None,
            "pretraining": [],
            "finetuning": [],
            "fewshot": [],
            "probes": [],
            "device_seconds": 0.0,
        }

    def set_equal_time(self, lengths: Lengths) -> None:
        self.document["equal_time"] = {"arms": without_folders(lengths)} if lengths else None

    def add_pretraining(self, run: Pretraining) -> None:
        """Adds a run that has ended."""
        told, rows = run.settled, read_rows(run.folder / "metrics.jsonl")
        trained = [row for row in rows if "loss" in row]
        score = "mse" if told.objective.target == "pixels" else "accuracy"
        curve = [[row["images"], row[f"{score}_masked"]] for row in trained if f"{score}_masked" in row]
        some = np.unique(np.linspace(0, len(curve) - 1, min(_CURVE, len(curve))).round().astype(int))
        last = trained[-1] if trained else {}
        final, _ = last_part(trained, "")
        entry = {
            "arm": run.arm.name,
            "flags": without_folders(without_credentials(run.arm.flags)),
            "seed": run.seed,
            "images": last.get("images", 0),
            "steps": last.get("step", 0),
            "batch_size": told.train.batch_size,
            "parameters": sum(weight.numel() for weight in build_model(told, "meta").encoder.parameters()),
            "lr": told.optim.lr,
            "seconds": self._time(run.folder),
            "final": {name: final[name] for name in final if "/" not in name and name not in _NOT_OF_OBJECTIVE},
            "curve": [curve[i] for i in some],
        }
        self._pretraining[run.folder] = entry
        self._starts[run.folder] = read_starts(run.folder)

    def add_cell(self, cell: Cell, config: FinetuneConfig, result: Result) -> None:
        """Adds a fine-tuning run that has ended, and the sweep before it."""
        folder = Path(config.run_dir)
        rates = {f"{float(row['lr']):g}": row["held_out_top1"] for row in read_csv(folder / "sweep.csv")}
        sweep = {rate: None if told == "diverged" else float(told) for rate, told in rates.items()}
        for tried in folder.glob("sweep/*/"):
            self._time(tried)
        entry = {
            "side": cell.side,
            "labels": cell.labels,
            "seed": cell.seed,
            "pretrain_seed": cell.pretrain_seed,
            "length": cell.length,
            "images": result.steps * config.train.batch_size,
            "steps": result.steps,
            "lr": result.lr,
            "sweep": sweep or None,
            "train_images": result.train_images,
            "top1": result.top1,
            "top5": result.top5,
            "balanced": result.balanced,
            "seconds": self._time(folder),
        }
        self._finetuning[cell] = entry
        self._starts[cell] = read_starts(folder)

    def add_frozen(self, side: str, pretrain_seed: int | None, figures: Figures) -> None:
        """Adds what an encoder came to frozen."""
        self._frozen[side, pretrain_seed] = figures

    def write(self, finished: bool = False) -> bool:
        """Writes study.json, whole or not at all; whether that changes anything."""
        frozen = [(place, figures) for place, figures in self._frozen.items() if figures]
        starts = [self._starts[run] for run in (*self._pretraining, *self._finetuning) if self._starts.get(run)]
        self.document |= {
            "finished": finished,
            # The study is made by what made its first run.
            "environment": _made_by(starts[0][-1], "time") if starts else None,
            "environments": _environments(starts),
            "pretraining": [entry for entry in self._pretraining.values() if entry],
            "finetuning": [entry for entry in self._finetuning.values() if entry],
            "fewshot": [entry for _, figures in frozen for entry in figures["fewshot"]],
            "probes": [
                {"side": side, "pretrain_seed": seed, "top1": figures["probe"]}
                for (side, seed), figures in frozen if figures["probe"] is not None
            ],
            "device_seconds": round(math.fsum(self._seconds.values()), 3),
        }  # fmt: skip
        text = json.dumps(self.document, indent=1) + "\n"
        if self._path.is_file() and self._path.read_text("utf-8") == text:
            return False
        write_whole(self._path, lambda file: file.write(text.encode()))
        return True

    def _time(self, folder: Path) -> float:
        """Seconds that a run trained, which the total has from now on."""
        seconds = round(sum(taken for _, taken in training_spans(read_rows(folder / "metrics.jsonl"))), 3)
        self._seconds[folder] = seconds
        return seconds


def _made_by(start: Mapping[str, Any], *more: str) -> dict[str, Any]:
    return {name: start[name] for name in (*more, *_MADE_BY) if name in start}


def _environments(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What made the runs, each once, and how many it started; one that was resumed elsewhere counts for both."""
    texts = [text for starts in runs for text in dict.fromkeys(json.dumps(_made_by(start)) for start in starts)]
    return [{**json.loads(text), "runs": number} for text, number in Counter(texts).items()]


def without_folders(value: Any) -> Any:
    """Plain values in which a path is its last name: "cifar10:/data/x" -> "cifar10:x".

    One from the root or the home, or that leads up from where it was told; of braces that hold folders a * is left.
    """
    if isinstance(value, str):
        value = _ALTERNATIVES.sub("*", _UPWARD.sub("/", _LOCAL.sub("", value)))
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {key: without_folders(held) for key, held in value.items()}
    return [without_folders(held) for held in value] if isinstance(value, list) else value
