"""How a study was made: images, hardware, versions, commits, seeds, time, config, command, arms, learning rates."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mpp.report.provenance import code, machine, versions
from mpp.report.wording import NONE, percent
from mpp.training.duration import in_words
from results_page.data import Study
from results_page.figures import side_markdown
from results_page.tables import own_score, table

_PACKAGES = ("python", "torch", "cuda", "timm")


def config_path(study: Study) -> str:
    """From the root of the repository."""
    return f"configs/study/{study.name}.yaml"


def command(study: Study) -> str:
    """That makes the study."""
    test = " --test ..." if study.config["test"] else ""
    return f"python tools/study.py --config {config_path(study)} --data ...{test} --run-dir runs/{study.name}"


def data(study: Study) -> str:
    """Where the images come from, how many there are and of how many classes."""
    source, test, pretrain = study.config["data"], study.config["test"], study.config["pretrain"]["data"]["source"]
    of = study.content["data"]
    train, tested = f"{of['train_images']:,} for training", f"{of['test_images']:,} for the test"
    images = f"{train} from `{source}`, {tested} from `{test}`" if test else f"{train} and {tested} from `{source}`"
    other = f"; pretrained on those of `{pretrain}`" if pretrain else ""
    return f"{images}, of {of['classes']} classes{other}"


def jpeg_copy(study: Study) -> bool:
    """Whether the images are CIFAR-10 in JPEG files: what shards of that name hold."""
    return bool(re.match(r"shards:(?:.*/)?cifar10-", study.config["data"]))


def making(study: Study) -> str:
    """What the study ran on, with which code and seeds, and how long."""
    starts = _environments(study)
    packages = [versions(start) for start in starts]
    of = [_distinct(starts, [each.get(name, "") for each in packages], f"{name} ") for name in _PACKAGES]
    of.append(_distinct(starts, [start.get("precision", "") for start in starts]))
    of.append(_distinct(starts, [code(start)["commit"] for start in starts], "commit "))
    seeds = f"seeds of fine-tuning {_listed(study.config['seeds'])}"
    if study.content["pretraining"]:
        seeds += f", of pretraining {_listed(study.config['pretrain_seeds'])}"
    parts = [_distinct(starts, list(map(_device, starts))), ", ".join(filter(None, of)), seeds, time(study)]
    return "; ".join(filter(None, parts)) + "."


def _environments(study: Study) -> list[dict[str, Any]]:
    """What made the runs, each with the number of its "runs"; older data tell of the first run's alone."""
    return study.content.get("environments") or [study.content["environment"] or {}]


def _distinct(starts: Sequence[Mapping[str, Any]], texts: Sequence[str], before: str = "") -> str:
    """What environments say, once for all; where they differ, each with its runs: "commit a (12 runs), b (3 runs)"."""
    runs = Counter[str]()
    for start, each in zip(starts, texts, strict=True):
        runs[each] += start.get("runs", 1)
    if len(runs) == 1:
        text = texts[0]
    else:
        text = ", ".join(f"{each} ({n} run{'s' * (n > 1)})" for each, n in runs.items() if each)
    return before + text if text else ""


def _device(start: dict[str, Any]) -> str:
    made_on = machine(start)
    devices = made_on.get("devices", "")
    if devices != "cpu":
        return devices
    cores = made_on.get("cores")
    plural = "" if cores == "1" else "s"
    return f"{cores} core{plural} of {made_on.get('processor')}, {made_on.get('memory')} of memory"


def time(study: Study) -> str:
    """Of all trainings, those of the sweeps included; in device-hours where all had as many devices."""
    seconds = study.content["device_seconds"]
    devices = {len((start.get("hardware") or {}).get("devices") or ()) or 1 for start in _environments(study)}
    hours = f", {seconds * devices.pop() / 3600:,.3g} device-hours" if len(devices) == 1 else ""
    return f"{in_words(seconds)} of training, sweeps included{hours}"


def unfinished(study: Study) -> str:
    """A warning, or "" for a study that has all its runs."""
    if study.finished:
        return ""
    return f"**This study still runs:** {len(study.content['finetuning'])} fine-tunings of it are done."


def arms_table(study: Study) -> str:
    """Arms with their flags, what their pretraining took, and how it ended: score, gradient norm."""
    rows = []
    for arm in study.arms:
        runs = study.pretrainings(arm)
        if runs:
            one = runs[0]
            seconds = in_words(fmean(run["seconds"] for run in runs))
            cells = [
                side_markdown(arm),
                f"`{one['flags']}`" if one["flags"] else "none",
                f"{one['images']:,}",
                f"{one['steps']:,}",
            ]
            norms = [run["final"]["grad_norm"] for run in runs if "grad_norm" in run["final"]]
            score = [*own_score(study, arm), f"{fmean(norms):.2f}" if norms else NONE]
            rows.append([*cells, str(one["batch_size"]), f"{one['lr']:g}", seconds, *score])
    head = ["arm", "flags", "images", "steps", "batch", "learning rate", "training time of a seed"]
    return table([*head, "masked", "trivial", "gradient norm"], rows)


def rates_table(study: Study) -> str:
    """Learning rates of fine-tuning that were tried, with their accuracy on held-out training images; "" for none."""
    tried = {(run["side"], run["labels"]): run for run in study.content["finetuning"] if run["sweep"]}
    rows = []
    for side in study.sides:
        runs = [tried.get((side, labels)) for labels in study.labels]
        rows.append(
            [
                side_markdown(side),
                *(", ".join(_rate(run, *one) for one in _sweep(run)) if run else NONE for run in runs),
            ]
        )
    return table(["learning rate: held-out accuracy", *study.labels], rows) if tried else ""


def _sweep(run: Mapping[str, Any]) -> list[tuple[float, float | None]]:
    return sorted((float(rate), accuracy) for rate, accuracy in run["sweep"].items())


def _rate(run: Mapping[str, Any], rate: float, accuracy: float | None) -> str:
    text = f"{rate:g}: {'diverged' if accuracy is None else percent(accuracy)}"
    return f"**{text}**" if rate == run["lr"] else text


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
