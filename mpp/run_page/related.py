"""What others measured of a pretrained encoder: fine-tuning runs, few-shot tables and studies beside its run folder."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpp.downstream.account import Result, read_result
from mpp.errors import UserError
from mpp.page.parts import Block, Section, Table
from mpp.run_page.reading import read_csv
from mpp.run_page.wording import NONE, UNTRAINED, around, percent, points
from mpp.study_recipe import LONGER, PRETRAINED, RANDOM, SCRATCH, folder_name
from mpp.yaml_text import load_yaml

_RANDOM = "random:"


@dataclass(frozen=True)
class _Tuned:
    """A finished fine-tuning run."""

    folder: Path
    config: dict[str, Any]
    """As its config.yaml has it: all texts."""
    result: Result

    @property
    def scratch(self) -> bool:
        return self.result.init.startswith(_RANDOM)

    @property
    def setting(self) -> tuple[str, str, str]:
        """What two runs must share to be compared: images, share of the labels, length."""
        data = self.config.get("data") or {}
        source, test = str(data.get("source", "")), str(data.get("test") or "")
        length = str((self.config.get("train") or {}).get("length", ""))
        return f"{source}, tested on {test}" if test else source, str(data.get("labels", "")), length


def related(folder: Path, results: Sequence[Path] = ()) -> Section | None:
    """What was measured of the encoder of a pretraining run; None where nothing is found.

    Args:
        folder: of the run. Folders beside it, the one around it and its study's are looked through; what cannot be
            read is passed over.
        results: more folders to look through.
    """
    around_it = folder.absolute().parent
    try:
        beside = sorted(around_it.iterdir())
    except OSError:  # of a folder that may be entered but not listed
        beside = []
    of_study = folder.absolute().parents[2:3]  # STUDY/pretrain/ARM/SEED
    places = _different([*beside, around_it, *of_study, *results], folder)
    blocks: list[Block] = [*_tuned_tables([run for place in places for run in _tuned(place, folder)])]
    for place in places:
        blocks += _study(place, folder) or _fewshot(place, folder)
    if not blocks:
        return None
    return Section(
        "downstream",
        "Downstream",
        "What the pretraining is worth: the same architecture, images and labels once from scratch and once from this "
        "encoder; the gain is the difference of their test accuracies in points.",
        tuple(blocks),
        "section 4.6 and appendix B.1.2",
    )


def _different(places: Iterable[Path], but: Path) -> list[Path]:
    """Folders, each once, other than `but`."""
    found = {place.resolve(): place for place in places if place.is_dir()}
    found.pop(but.resolve(), None)
    return list(found.values())


def names(text: str, folder: Path) -> bool:
    """Whether an `init` names this run: its folder, its model or a checkpoint in it.

    A relative path was written down in a working folder that nobody knows any more, so it names every folder that ends
    with it.
    """
    path = Path(os.path.normpath(Path(text.removeprefix(_RANDOM)).expanduser()))
    if path.parent.name == "checkpoints":
        path = path.parent.parent
    elif path.name == "model":
        path = path.parent
    if path.is_absolute():
        return path.resolve() == folder.resolve()
    parts = tuple(part for part in path.parts if part != "..")
    return bool(parts) and any(at.parts[-len(parts) :] == parts for at in (folder.absolute(), folder.resolve()))


def _config(place: Path) -> dict[str, Any]:
    try:
        return load_yaml(place / "config.yaml")
    except UserError:
        return {}


def _tuned(place: Path, folder: Path) -> Iterator[_Tuned]:
    try:
        result = read_result(place)
    except UserError:
        return
    if result is not None and names(result.init, folder):
        yield _Tuned(place, _config(place), result)


def _tuned_tables(runs: list[_Tuned]) -> list[Table]:
    """Both sides of each setting beside each other, where a setting has both, and every run."""
    tables = []
    settings = dict.fromkeys(run.setting for run in runs)
    sides = {
        setting: [
            [run.result for run in runs if run.setting == setting and run.scratch is side] for side in (True, False)
        ]
        for setting in settings
    }
    rows = [
        (f"{setting[0]}, {setting[1]} of the labels, {setting[2]}", _side(scratch), _side(tuned), _gain(scratch, tuned))
        for setting, (scratch, tuned) in sides.items()
        if scratch and tuned
    ]
    if rows:
        head = ("images and length", "from scratch", "pretrained", "gain in points")
        caption = "Fine-tuning: test accuracy; of several runs the mean ± standard deviation, of one its 95 % interval"
        tables.append(Table(head, tuple(rows), caption))
    if runs:
        head = ("run", "start", "images", "labels", "length", "learning rate", "top-1")
        cells = (
            (
                run.folder.name,
                "random" if run.scratch else "pretrained",
                *run.setting,
                f"{run.result.lr:g}",
                percent(run.result.top1),
            )
            for run in runs
        )
        tables.append(Table(head, tuple(cells), "Fine-tuning runs of this encoder", folded=bool(rows)))
    return tables


def _side(results: list[Result]) -> str:
    if len(results) == 1:
        low, high = results[0].interval
        return f"{percent(results[0].top1)} ({100 * low:.1f} to {100 * high:.1f})"
    values = [result.top1 for result in results]
    return f"{around(float(np.mean(values)), float(np.std(values, ddof=1)))} ({len(values)} runs)"


def _gain(scratch: list[Result], tuned: list[Result]) -> str:
    return points(float(np.mean([r.top1 for r in tuned]) - np.mean([r.top1 for r in scratch])))


def _fewshot(place: Path, folder: Path) -> list[Table]:
    """The table of the few-shot tool, where one of its encoders is this run's."""
    rows = [row for row in read_csv(place / "fewshot.csv") if {"model", "shots", "accuracy", "std"} <= row.keys()]
    # "runs/first (mean)" or "random:runs/first (token, layer 3)"
    names_of = {row["model"]: row["model"].rpartition(" (")[0] for row in rows}
    if not any(names(name, folder) for name in names_of.values()):
        return []

    def told(model: str) -> str:
        name = names_of[model]
        if not names(name, folder):
            return model
        return (UNTRAINED if name.startswith(_RANDOM) else "pretrained") + model[len(name) :]

    return _by_shots([(told(row["model"]), row) for row in rows], f"Few-shot accuracy on frozen features, {place.name}")


def _by_shots(rows: Iterable[tuple[str, Mapping[str, Any]]], caption: str) -> list[Table]:
    """Encoders in rows, shots in columns."""
    try:
        cells = {(name, int(row["shots"])): around(float(row["accuracy"]), float(row["std"])) for name, row in rows}
    except (KeyError, ValueError):
        return []
    shots = sorted({k for _, k in cells})
    head = ("encoder", *(f"{k} shot{'s' * (k > 1)}" for k in shots))
    body = ((name, *(cells.get((name, k), NONE) for k in shots)) for name in dict.fromkeys(name for name, _ in rows))
    return [Table(head, tuple(body), caption)] if cells else []


def _study(place: Path, folder: Path) -> list[Table]:
    """The tables of a study that took this run or made it: its pretraining beside scratch."""
    try:
        told = json.loads((place / "study.json").read_text())
        found = _arm(told, place, folder)
        if found is None:
            return []
        arm, seed = found
        top1: dict[tuple[str, str], dict[int, float]] = {}
        for run in told["finetuning"]:
            if run["pretrain_seed"] in (None, seed):
                top1.setdefault((run["labels"], run["side"]), {})[run["seed"]] = float(run["top1"])
        draws: dict[tuple[str, int], list[float]] = {}
        for run in told["fewshot"]:
            if run["side"] in (RANDOM, arm) and run["pretrain_seed"] in (None, seed):
                layer = "" if run["layer"] == -1 else f", layer {run['layer']}"
                draws.setdefault((f"{run['side']} ({run['pool']}{layer})", int(run["shots"])), []).extend(
                    run["accuracy"]
                )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # a file of something else
        return []
    sides = [side for side in (SCRATCH, LONGER, arm) if any(of == side for _, of in top1)]
    rows = []
    for labels in dict.fromkeys(labels for labels, _ in top1):
        values = [top1.get((labels, side), {}) for side in sides]
        paired = [gained - values[0][seed] for seed, gained in values[-1].items() if seed in values[0]]
        gain = points(float(np.mean(paired))) if paired and sides[-1] == arm else NONE
        rows.append((labels, *(_spread(list(of.values())) for of in values), gain))
    title = f"Study {place.resolve().name}"
    spread = "of several seeds mean ± standard deviation, the gain from the same seeds"
    caption = f"{title}: test accuracy after fine-tuning; {spread}"
    head = ("labels", *(f"from {side}" if side != arm else side for side in sides), "gain in points")
    shots = [(name, {"shots": k, "accuracy": np.mean(of), "std": _std(of)}) for (name, k), of in draws.items()]
    tables = [Table(head, tuple(rows), caption)] if rows else []
    return [*tables, *_by_shots(shots, f"{title}: few-shot accuracy on frozen features")]


def _arm(told: dict[str, Any], place: Path, folder: Path) -> tuple[str, int | None] | None:
    """What the study in `place` calls the pretraining of this run, and its seed there; None where it is of others."""
    init = _config(place).get("init")
    if init:
        return (PRETRAINED, None) if names(str(init), folder) else None
    runs = [(run["arm"], run["seed"]) for run in told["pretraining"]]
    places = {place / "pretrain" / folder_name(arm) / f"seed_{seed}": (arm, seed) for arm, seed in runs}
    return {at.resolve(): of for at, of in places.items()}.get(folder.resolve())


def _spread(values: list[float]) -> str:
    return around(float(np.mean(values)), _std(values)) if values else NONE


def _std(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
