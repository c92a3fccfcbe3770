"""study.json, the data of a study: every run with its settings, figures and time, and what made them.

Pages and tables of a study read this file alone. It is written anew after every run, and names no folder of the machine
that it was made on.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpp.config import from_file, to_dict
from mpp.downstream.fewshot import short_classes
from mpp.downstream.finetune_result import Result, changed_settings, read_result
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import without_credentials
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig
from mpp.study.equal_time import EqualTime
from mpp.study.frozen import Figures, saved_figures
from mpp.study.plan import FinetuneRun, Plan, Pretraining, StartPoint
from mpp.system.files import read_csv, write_whole
from mpp.training.provenance import read_starts
from mpp.training.rows import last_part, read_rows, training_spans
from mpp.training.settings import chosen

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


def test_images_seen(folder: Path) -> dict[str, int]:
    """Arm -> how many test images its pretraining saw, as study.json in the folder says; {} where it says nothing."""
    try:
        return dict(json.loads((folder / FILE).read_text("utf-8"))["data"]["test_images_seen"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


class Record:
    """The results of a study so far, by whichever process they were made.

    Args:
        plan: of the study.
        test_images_seen: by arm, how many test images its pretraining sees, where it sees any.
        timed: images of equal time, where it was measured.
    """

    def __init__(self, plan: Plan, test_images_seen: Mapping[str, int] | None = None, timed: EqualTime | None = None):
        self._plan = plan
        self._path = Path(plan.config.run_dir) / FILE
        self._seconds: dict[Path, float] = {}
        self._starts: dict[Path | FinetuneRun, list[dict[str, Any]]] = {}
        self._pretraining: dict[Path, dict[str, Any]] = {}
        self._finetuning: dict[FinetuneRun, dict[str, Any]] = {}
        self._frozen: dict[StartPoint, Figures] = {}
        labelled, seen = plan.labelled, {"test_images_seen": dict(test_images_seen)} if test_images_seen else {}
        short = {
            str(shots): classes for shots, classes in short_classes(labelled, plan.config.shots).items() if classes
        }
        self.document: dict[str, Any] = {
            "schema": _SCHEMA,
            "name": self._path.absolute().parent.name,
            "finished": False,
            "config": without_folders(without_credentials(to_dict(plan.config))),
            "environment": None,
            "environments": [],
            "data": {
                "train_images": len(labelled.train_indices),
                "test_images": len(labelled.test_indices),
                "classes": len(labelled.classes),
                **seen,
                **({"short_classes": short} if short else {}),
            },
            "equal_time": without_folders(vars(timed)) if timed and timed.arms else None,
            "pretraining": [],
            "finetuning": [],
            "fewshot": [],
            "probes": [],
            "device_seconds": 0.0,
        }

    def write(self, finished: bool = False) -> bool:
        """Reads what has ended since the last time, and writes study.json; returns whether that changes anything."""
        self._read()
        plan = self._plan
        # All in the plan's order, in whichever they were made.
        pretraining = [run.folder for run in plan.pretrainings if run.folder in self._pretraining]
        finetuning = [run for run in plan.finetunings if run in self._finetuning]
        frozen = [(name, self._frozen[name]) for name in plan.encoders.values() if name in self._frozen]
        starts = [self._starts[run] for run in (*pretraining, *finetuning) if self._starts[run]]
        self.document |= {
            "finished": finished,
            "environment": _made_by(starts[0][-1], "time") if starts else None,  # of the first run
            "environments": _environments(starts),
            "pretraining": [self._pretraining[run] for run in pretraining],
            "finetuning": [self._finetuning[run] for run in finetuning],
            "fewshot": [entry for _, figures in frozen for entry in figures["fewshot"]],
            "probes": [
                {"side": side, "pretrain_seed": seed, "top1": figures["probe"], "chosen": figures.get("probe_chosen")}
                for (side, seed), figures in frozen if figures["probe"] is not None
            ],
            "device_seconds": round(math.fsum(self._seconds.values()), 3),
        }  # fmt: skip
        text = json.dumps(self.document, indent=1) + "\n"
        if self._path.is_file() and self._path.read_text("utf-8") == text:
            return False
        write_whole(self._path, text)
        return True

    def _read(self) -> None:
        """Reads each run once, when it has ended."""
        for run in self._plan.pretrainings:
            if run.folder not in self._pretraining and run.finished:
                self._pretraining[run.folder] = self._pretraining_entry(run)
                self._starts[run.folder] = read_starts(run.folder)
        for run in self._plan.finetunings:
            config = self._plan.finetune_config(run)
            result = None if run in self._finetuning else read_result(Path(config.run_dir))
            if result is not None and not changed_settings(config):
                self._finetuning[run] = self._finetuning_entry(run, config, result)
                self._starts[run] = read_starts(Path(config.run_dir))
        for name in self._plan.encoders.values():
            figures = None if name in self._frozen else saved_figures(self._plan.config, *name, None)
            if figures is not None:
                self._frozen[name] = figures

    def _pretraining_entry(self, run: Pretraining) -> dict[str, Any]:
        config, rows = from_file(PretrainConfig, run.folder / "config.yaml"), read_rows(run.folder / "metrics.jsonl")
        trained = [row for row in rows if "loss" in row]
        masked = "mse_masked" if config.objective.target == "pixels" else "accuracy_masked"
        curve = [[row["images"], row[masked]] for row in trained if masked in row]
        some = np.unique(np.linspace(0, len(curve) - 1, min(_CURVE, len(curve))).round().astype(int))
        last = trained[-1] if trained else {}
        final, _ = last_part(trained, "")
        return {
            "arm": run.arm.name,
            "flags": without_folders(without_credentials(run.arm.flags)),
            "seed": run.seed,
            "images": last.get("images", 0),
            "steps": last.get("step", 0),
            "batch_size": config.train.batch_size,
            "parameters": sum(weight.numel() for weight in build_model(config, "meta").encoder.parameters()),
            "lr": config.optim.lr,
            "seconds": self._training_seconds(run.folder, rows),
            "final": {name: final[name] for name in final if "/" not in name and name not in _NOT_OF_OBJECTIVE},
            "curve": [curve[i] for i in some],
        }

    def _finetuning_entry(self, run: FinetuneRun, config: FinetuneConfig, result: Result) -> dict[str, Any]:
        """The run, and the sweep before it."""
        folder, batch = Path(config.run_dir), config.train.batch_size
        if batch == "auto":
            batch = from_file(FinetuneConfig, folder / "config.yaml").train.batch_size
        rates = {f"{float(row['lr']):g}": row["held_out_top1"] for row in read_csv(folder / "sweep.csv")}
        sweep = {rate: None if top1 == "diverged" else float(top1) for rate, top1 in rates.items()}
        for tried in folder.glob("sweep/*/"):
            self._training_seconds(tried, read_rows(tried / "metrics.jsonl"))
        return {
            **{name: getattr(run, name) for name in ("side", "labels", "seed", "pretrain_seed", "length")},
            "images": result.steps * chosen(batch),
            "steps": result.steps,
            "lr": result.lr,
            "sweep": sweep or None,
            **{name: getattr(result, name) for name in ("train_images", "top1", "top5", "balanced")},
            "seconds": self._training_seconds(folder, read_rows(folder / "metrics.jsonl")),
        }

    def _training_seconds(self, folder: Path, rows: list[dict[str, Any]]) -> float:
        """Seconds that a run trained, which the study's total includes from now on."""
        self._seconds[folder] = round(sum(taken for _, taken in training_spans(rows)), 3)
        return self._seconds[folder]


def _made_by(start: Mapping[str, Any], *more: str) -> dict[str, Any]:
    return {name: start[name] for name in (*more, *_MADE_BY) if name in start}


def _environments(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each environment once, with the number of runs it started; a run that was resumed elsewhere counts for both."""
    texts = [text for starts in runs for text in dict.fromkeys(json.dumps(_made_by(start)) for start in starts)]
    return [{**json.loads(text), "runs": number} for text, number in Counter(texts).items()]


def without_folders(value: Any) -> Any:
    """Plain values in which a path is its last name: "cifar10:/data/x" -> "cifar10:x".

    Of a path from the root or the home, or one that leads upward; braces that hold folders become a *.
    """
    if isinstance(value, str):
        value = _ALTERNATIVES.sub("*", _UPWARD.sub("/", _LOCAL.sub("", value)))
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {key: without_folders(inner) for key, inner in value.items()}
    return [without_folders(inner) for inner in value] if isinstance(value, list) else value
