"""What others measured of a pretrained encoder: fine-tuning runs, few-shot tables and studies beside its run folder."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpp.downstream.estimates import Estimate, over
from mpp.downstream.shots import Readout
from mpp.errors import UserError
from mpp.report.page.parts import Block, Section, Table
from mpp.report.run_page.reading import read_csv
from mpp.report.run_page.tuned import RANDOM, read_tuned, tuned_tables
from mpp.report.run_page.wording import NONE, UNTRAINED, accuracy_text, around, gain_text
from mpp.report.settings import PRETRAINED, folder_name
from mpp.report.study_results import StudyResults
from mpp.yaml_text import load_yaml


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
    tuned = [run for place in places if (run := read_tuned(place)) is not None and names(run.result.init, folder)]
    blocks: list[Block] = [*tuned_tables(tuned)]
    for place in places:
        blocks += _study(place, folder) or _fewshot(place, folder)
    if not blocks:
        return None
    return Section(
        "downstream",
        "Downstream",
        "What the pretraining is worth: the same architecture, images, labels and recipe once from scratch and once "
        "from this encoder; the gain is the difference of their test accuracies in points.",
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
    path = Path(os.path.normpath(Path(text.removeprefix(RANDOM)).expanduser()))
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
        return (UNTRAINED if name.startswith(RANDOM) else "pretrained") + model[len(name) :]

    return _by_shots([(told(row["model"]), row) for row in rows], f"Few-shot accuracy on frozen features, {place.name}")


def _by_shots(rows: Iterable[tuple[str, Mapping[str, Any]]], caption: str) -> list[Table]:
    """Encoders in rows, shots in columns."""
    try:
        cells = {
            (name, int(row["shots"])): around(float(row["accuracy"]), float(row["std"] or "nan")) for name, row in rows
        }
    except (KeyError, ValueError):
        return []
    shots = sorted({k for _, k in cells})
    head = ("encoder", *(f"{k} shot{'s' * (k > 1)}" for k in shots))
    body = ((name, *(cells.get((name, k), NONE) for k in shots)) for name in dict.fromkeys(name for name, _ in rows))
    return [Table(head, tuple(body), caption)] if cells else []


def _study(place: Path, folder: Path) -> list[Table]:
    """The tables of a study that took this run or made it: its pretraining beside scratch."""
    try:
        told = json.loads((place / "study.json").read_text("utf-8"))
        found = _arm(told, place, folder)
        return [] if found is None else _study_tables(place.resolve().name, StudyResults(told), *found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # a file of something else
        return []


def _study_tables(name: str, study: StudyResults, arm: str, seed: int | None) -> list[Table]:
    """Of one pretraining alone, and with the same figures as the study's own tables have for it."""
    of = study.of_pretraining(arm, seed)
    shares = list(dict.fromkeys(run["labels"] for run in of.content["finetuning"]))
    gains = {labels: of.gain(arm, labels) for labels in shares}
    rows = [
        (labels, *(_accuracy(of.tuned(side, labels)) for side in of.sides), gain_text(gain))
        for labels, gain in gains.items()
    ]
    title = f"Study {name}"
    caption = f"{title}: test accuracy after fine-tuning"
    if told := over([of.tuned(side, labels) for side in of.sides for labels in shares]):
        caption += f", mean ± standard deviation over {told}"
    if told := over(list(gains.values())):
        caption += f"; the gain of the same seeds, ± half the width of its 95 % interval over {told}"
    head = ("labels", *(f"from {side}" if side != arm else side for side in of.sides), "gain in points")
    tables = [Table(head, tuple(rows), caption)] if rows else []
    if not of.encoders:
        return tables
    shots = {
        Readout(side, *reading).name: [of.fewshot(side, k, reading) for k in of.counts]
        for side in of.encoders
        for reading in of.readings
    }
    caption = f"{title}: few-shot accuracy on frozen features"
    if told := over([each for by in shots.values() for each in by]):
        caption += f", mean ± standard deviation over {told}"
    cells = ((name, *map(_accuracy, by)) for name, by in shots.items() if any(by))
    return [*tables, Table(("encoder", *(f"{k} shot{'s' * (k > 1)}" for k in of.counts)), tuple(cells), caption)]


def _accuracy(of: Estimate | None) -> str:
    return NONE if of is None else f"{accuracy_text(of)} %"


def _arm(told: dict[str, Any], place: Path, folder: Path) -> tuple[str, int | None] | None:
    """What the study in `place` calls the pretraining of this run, and its seed there; None where it is of others."""
    init = _config(place).get("init")
    if init:
        return (PRETRAINED, None) if names(str(init), folder) else None
    runs = [(run["arm"], run["seed"]) for run in told["pretraining"]]
    places = {place / "pretrain" / folder_name(arm) / f"seed_{seed}": (arm, seed) for arm, seed in runs}
    return {at.resolve(): of for at, of in places.items()}.get(folder.resolve())
