"""Writes the tables of a study as CSV and Markdown, and its pictures, from the content of study.json."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpp.downstream.estimates import Estimate, estimate, over
from mpp.downstream.fewshot import Readout
from mpp.downstream.plots import plot_bars, plot_layers, plot_shots
from mpp.report.study_results import StudyResults
from mpp.report.wording import accuracy_text, gain_text
from mpp.study.settings import SCRATCH
from mpp.system.files import write_csv, write_whole

Document = Mapping[str, Any]


def write(folder: Path, document: Document) -> None:
    """Writes runs.csv, table.csv, fewshot.csv, study.md, finetune.png, fewshot.png; of several layers layers.png."""
    study = StudyResults(document)
    write_csv(folder / "runs.csv", _run_rows(document))
    write_csv(folder / "table.csv", _table_rows(study))
    write_csv(folder / "fewshot.csv", _fewshot_rows(document))
    groups: dict[str, dict[str, Estimate]] = {}
    for labels, side in _settings(study):
        if (tuned := study.tuned(side, labels)) is not None:
            groups.setdefault(f"{labels} of the labels", {})[_side(side)] = tuned
    plot_bars(folder / "finetune.png", groups, "test accuracy after fine-tuning (%)")
    readouts, chosen, (last, _) = fewshot(study), _chosen(study), study.reading
    shown = {of.name: by for of, by in readouts.items() if of.layer == last}
    plot_shots(folder / "fewshot.png", shown | {f"{side} (chosen)": by for side, by in chosen.items()})
    if any(of.layer != last for of in readouts):
        plot_layers(folder / "layers.png", readouts)
    write_whole(folder / "study.md", _markdown(study, readouts, chosen))


def fewshot(study: StudyResults) -> dict[Readout, dict[int, Estimate]]:
    """Accuracy by encoder, layer and pooling, and by the number of shots."""
    depth = {entry["side"]: entry["depth"] for entry in study.content["fewshot"]}
    found = {
        Readout(side, *reading, depth[side]): _by_shots(study, lambda k: study.fewshot(side, k, reading))  # noqa: B023
        for side in study.encoders
        for reading in study.readings
    }
    return {readout: by for readout, by in found.items() if by}


def _chosen(study: StudyResults) -> dict[str, dict[int, Estimate]]:
    """Accuracy by encoder and number of shots, of the layer and pooling that each draw chooses on its shots."""
    found = {
        side: _by_shots(study, lambda k: study.fewshot_chosen(side, k))  # noqa: B023
        for side in study.encoders
    }
    return {side: by for side, by in found.items() if by}


def _by_shots(study: StudyResults, measured: Callable[[int], Estimate | None]) -> dict[int, Estimate]:
    return {shots: of for shots in study.counts if (of := measured(shots)) is not None}


def _settings(study: StudyResults) -> list[tuple[str, str]]:
    """Every share of the labels, in the study's order, and every side at it."""
    return [(labels, side) for labels in study.content["config"]["labels"] for side in study.sides]


def _gain(study: StudyResults, labels: str, side: str) -> Estimate | None:
    return None if side == SCRATCH else study.gain(side, labels)


def _run_rows(document: Document) -> Iterable[Sequence[Any]]:
    names = "side", "labels", "seed", "pretrain_seed", "length", "lr", "train_images", "top1", "top5", "balanced"
    yield names
    for run in document["finetuning"]:
        yield ["" if run[name] is None else run[name] for name in names]


def _table_rows(study: StudyResults) -> Iterable[Sequence[Any]]:
    yield "labels", "side", "top1", "std", "gain", "interval95", "over"
    for labels, side in _settings(study):
        tuned, gain = study.tuned(side, labels), _gain(study, labels, side)
        if tuned is not None:
            known = tuned.mean, tuned.spread, gain and gain.mean, gain and gain.half
            yield labels, side, *("" if value is None else value for value in known), (gain or tuned).over


def _fewshot_rows(document: Document) -> Iterable[Sequence[Any]]:
    yield "encoder", "pretrain_seed", "layer", "pool", "shots", "accuracy", "std", "rank"
    for entry in document["fewshot"]:
        drawn = estimate(entry["accuracy"], "draws of the shots")
        names = ("side", "pretrain_seed", "layer", "pool", "shots")
        values = *(entry[name] for name in names), drawn.mean, drawn.spread, entry["rank"]
        yield ["" if value is None else value for value in values]


def _side(side: str) -> str:
    return f"from {side}" if side.startswith(SCRATCH) else side


def _markdown(
    study: StudyResults, readouts: Mapping[Readout, dict[int, Estimate]], chosen: Mapping[str, dict[int, Estimate]]
) -> str:
    spread, interval = ", mean ± standard deviation over {}", ", ± half the width of its 95 % interval over {}"

    def repeated(text: str, estimates: Iterable[Estimate | None]) -> str:
        return text.format(over_text) if (over_text := over(estimates)) else ""

    tuned = repeated(spread, (study.tuned(side, labels) for labels, side in _settings(study)))
    gains = repeated(interval, (_gain(study, labels, side) for labels, side in _settings(study)))
    lines = [f"Fine-tuning, test accuracy in %{tuned}; gain over scratch in points{gains}:", ""]
    lines += _two_sides(study) if len(study.sides) == 2 else _many_sides(study)
    named = {of.name: by for of, by in readouts.items()}
    named |= {f"{side} (chosen by cross-validation on the shots)": by for side, by in chosen.items()}
    measured = repeated(spread, (of for by in named.values() for of in by.values()))
    lines += ["", f"Few-shot accuracy on frozen features in %{measured}:", ""]
    lines += _markdown_table(
        ("encoder", *(f"{n} shot{'s' * (n > 1)}" for n in study.counts)),
        ((name, *(accuracy_text(by.get(n)) for n in study.counts)) for name, by in named.items()),
    )
    data = study.content.get("data") or {}
    lines += [f"\n{note}." for note in few_shots(data.get("short_classes", {}), data.get("classes", 0))]
    probes = {probe["side"]: study.probe(probe["side"]) for probe in study.content["probes"]}
    if probes:
        lines += ["", f"Linear probe on all labels, test accuracy in %{repeated(spread, probes.values())}:", ""]
        best = {side: study.probe_chosen(side) for side in probes}
        head = ("mean of the last layer", "layer and pooling chosen on held-out training images")
        columns = [probes, *([best] if all(best.values()) else [])]
        lines += _markdown_table(
            ("encoder", *head[: len(columns)]),
            ((side, *(accuracy_text(of[side]) for of in columns)) for side in probes),
        )
    pretraining = {run["arm"]: (run["images"], run["steps"]) for run in study.content["pretraining"]}
    for arm, (images, steps) in pretraining.items():
        of = f" of {arm}" if len(pretraining) > 1 else ""
        lines += ["", f"Pretraining{of}: {images:,} images, {steps:,} steps."]
        if seen := data.get("test_images_seen", {}).get(arm):
            which = f"{seen:,} of the {data['test_images']:,} test images"
            lines[-1] += f" Its images hold {which}, so that its figures may be too good."
    return "\n".join(lines) + "\n"


def few_shots(short: Mapping[Any, int], classes: int) -> list[str]:
    """A note where so many of the classes are `short` of images for some number of shots."""
    counts = ", ".join(f"{n} of {classes} for {k} shots" for k, n in short.items() if n)
    return [f"classes that have fewer training images, of which all are taken: {counts}"] if counts else []


def _two_sides(study: StudyResults) -> list[str]:
    """Scratch and one pretraining, side by side; a row a share."""
    rows = []
    for labels in study.content["config"]["labels"]:
        run = next((run for run in study.content["finetuning"] if run["labels"] == labels), None)
        if run is not None:
            accuracies = (accuracy_text(study.tuned(side, labels)) for side in study.sides)
            gain = gain_text(_gain(study, labels, study.sides[-1]))
            rows.append((labels, f"{run['train_images']:,}", f"{run['steps']:,}", *accuracies, gain))
    return _markdown_table(("labels", "images", "steps", *map(_side, study.sides), "gain"), rows)


def _many_sides(study: StudyResults) -> list[str]:
    """A row a share and side."""
    steps = {(run["labels"], run["side"]): run["steps"] for run in study.content["finetuning"]}
    rows = []
    for labels, side in _settings(study):
        if (labels, side) in steps:
            size = f"{study.labelled_images[labels]:,}", _side(side), f"{steps[labels, side]:,}"
            gain = gain_text(_gain(study, labels, side))
            rows.append((labels, *size, accuracy_text(study.tuned(side, labels)), gain))
    return _markdown_table(("labels", "images", "side", "steps", "top-1", "gain"), rows)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
