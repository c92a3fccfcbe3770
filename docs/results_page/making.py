"""How a study was made: hardware, versions, commit, seeds, time, config, command, arms and learning rates tried."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mpp.run_page.provenance import code, machine, versions
from mpp.run_page.wording import NONE, duration, percent
from results_page.data import Study
from results_page.tables import table, told

_PACKAGES = ("python", "torch", "cuda", "timm")


def config_path(study: Study) -> str:
    """From the root of the repository."""
    return f"configs/study/{study.name}.yaml"


def command(study: Study) -> str:
    """That makes the study."""
    return f"python tools/study.py --config {config_path(study)} --data ... --run-dir runs/{study.name}"


def making(study: Study) -> str:
    """What the study ran on, with which code and seeds, and how long."""
    start = study.content["environment"] or {}
    told, packages = machine(start), versions(start)
    on = told.get("devices", "")
    if on == "cpu":
        on = f"{told.get('cores')} cores of {told.get('processor')}, {told.get('memory')} of memory"
    of = [f"{name} {packages[name]}" for name in _PACKAGES if name in packages]
    of += [start["precision"]] * ("precision" in start)
    of.append(f"commit {code(start)['commit']}")
    seeds = f"seeds of fine-tuning {_listed(study.config['seeds'])}"
    if study.content["pretraining"]:
        seeds += f", of pretraining {_listed(study.config['pretrain_seeds'])}"
    return f"{on}; {', '.join(of)}; {seeds}; {time(study)}."


def time(study: Study) -> str:
    """Of all trainings, those of the sweeps included."""
    seconds = study.content["device_seconds"]
    devices = len(((study.content["environment"] or {}).get("hardware") or {}).get("devices") or ()) or 1
    return f"{duration(seconds)} of training, sweeps included, {seconds * devices / 3600:,.3g} device-hours"


def unfinished(study: Study) -> str:
    """A warning, or "" for a study that has all its runs."""
    if study.content["finished"]:
        return ""
    return f"**This study still runs:** {len(study.content['finetuning'])} fine-tunings of it are done."


def arms_table(study: Study) -> str:
    """Arms with their flags and what their pretraining took."""
    rows = []
    for arm in study.arms:
        runs = study.pretrainings(arm)
        if runs:
            one = runs[0]
            seconds = duration(fmean(run["seconds"] for run in runs))
            cells = [arm, f"`{one['flags']}`" if one["flags"] else "none", f"{one['images']:,}", f"{one['steps']:,}"]
            rows.append([*cells, str(one["batch_size"]), f"{one['lr']:g}", seconds])
    return table(["arm", "flags", "images", "steps", "batch", "learning rate", "training time of a seed"], rows)


def rates_table(study: Study) -> str:
    """Learning rates of fine-tuning that were tried, with their accuracy on held-out training images; "" for none."""
    tried = {(run["side"], run["labels"]): run for run in study.content["finetuning"] if run["sweep"]}
    rows = []
    for side in study.sides:
        runs = [tried.get((side, labels)) for labels in study.labels]
        rows.append(
            [told(side), *(", ".join(_rate(run, *one) for one in _sweep(run)) if run else NONE for run in runs)]
        )
    return table(["learning rate: held-out accuracy", *study.labels], rows) if tried else ""


def _sweep(run: Mapping[str, Any]) -> list[tuple[float, float | None]]:
    return sorted((float(rate), accuracy) for rate, accuracy in run["sweep"].items())


def _rate(run: Mapping[str, Any], rate: float, accuracy: float | None) -> str:
    text = f"{rate:g}: {'diverged' if accuracy is None else percent(accuracy)}"
    return f"**{text}**" if rate == run["lr"] else text


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
