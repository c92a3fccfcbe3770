"""What a study leaves beside its data: tables as CSV and Markdown, and pictures, all from study.json's content."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpp.downstream.estimates import Estimate, estimate, over
from mpp.downstream.plots import plot_bars, plot_layers, plot_shots
from mpp.downstream.shots import Readout
from mpp.report.settings import SCRATCH
from mpp.report.study_results import StudyResults
from mpp.report.wording import accuracy_text, gain_text
from mpp.system.files import write_csv, write_whole

Document = Mapping[str, Any]
_CHOSEN = "chosen by cross-validation on the shots"


def write(folder: Path, document: Document) -> None:
    """Writes runs.csv, table.csv, fewshot.csv, study.md, finetune.png, fewshot.png; of several layers layers.png."""
    study = StudyResults(document)
    write_csv(folder / "runs.csv", _run_rows(document))
    write_csv(folder / "table.csv", _table_rows(study))
    write_csv(folder / "fewshot.csv", _fewshot_rows(document))
    groups: dict[str, dict[str, Estimate]] = {}
    for labels, side in _cells(study):
        if (tuned := study.tuned(side, labels)) is not None:
            groups.setdefault(f"{labels} of the labels", {})[_side(side)] = tuned
    plot_bars(folder / "finetune.png", groups, "test accuracy after fine-tuning (%)")
    shots = fewshot(study)
    last, _ = study.reading
    shown = {of.name: by for of, by in shots.items() if of.layer == last}
    plot_shots(folder / "fewshot.png", shown | {f"{side} (chosen)": by for side, by in _chosen(study).items()})
    if any(of.layer != last for of in shots):
        plot_layers(folder / "layers.png", shots)
    text = _markdown(study, shots).encode()
    write_whole(folder / "study.md", lambda file: file.write(text))


def fewshot(study: StudyResults) -> dict[Readout, dict[int, Estimate]]:
    """Accuracy by encoder, layer and pooling, and by the number of shots."""
    depth = {entry["side"]: entry["depth"] for entry in study.content["fewshot"]}
    found: dict[Readout, dict[int, Estimate]] = {}
    for side in study.encoders:
        for reading in study.readings:
            by = {k: of for k in study.counts if (of := study.fewshot(side, k, reading)) is not None}
            if by:
                found[Readout(side, *reading, depth[side])] = by
    return found


def _chosen(study: StudyResults) -> dict[str, dict[int, Estimate]]:
    """Accuracy by encoder and number of shots, of the layer and pooling that each draw chooses on its shots."""
    found = {
        side: {k: of for k in study.counts if (of := study.fewshot_chosen(side, k)) is not None}
        for side in study.encoders
    }
    return {side: by for side, by in found.items() if by}


def _cells(study: StudyResults) -> list[tuple[str, str]]:
    """Every share of the labels, in the study's order, and every side at it."""
    return [(labels, side) for labels in study.content["config"]["labels"] for side in study.sides]


def _gain(study: StudyResults, labels: str, side: str) -> Estimate | None:
    return None if side == SCRATCH else study.gain(side, labels)


def _run_rows(document: Document) -> Iterable[Sequence[Any]]:
    names = "side", "labels", "seed", "pretrain_seed", "length", "lr", "train_images", "top1", "top5", "balanced"
    yield names
    for run in document["finetuning"]:
        yield tuple("" if run[name] is None else run[name] for name in names)


def _table_rows(study: StudyResults) -> Iterable[Sequence[Any]]:
    yield "labels", "side", "top1", "std", "gain", "interval95", "over"
    for labels, side in _cells(study):
        tuned, gain = study.tuned(side, labels), _gain(study, labels, side)
        if tuned is not None:
            known = tuned.mean, tuned.spread, gain and gain.mean, gain and gain.half
            yield labels, side, *("" if value is None else value for value in known), (gain or tuned).over


def _fewshot_rows(document: Document) -> Iterable[Sequence[Any]]:
    yield "encoder", "pretrain_seed", "layer", "pool", "shots", "accuracy", "std", "rank"
    for entry in document["fewshot"]:
        seed = "" if entry["pretrain_seed"] is None else entry["pretrain_seed"]
        drawn = estimate(entry["accuracy"], "draws of the shots")
        of = entry["side"], seed, entry["layer"], entry["pool"], entry["shots"]
        yield *of, drawn.mean, "" if drawn.spread is None else drawn.spread, entry["rank"]


def _side(side: str) -> str:
    return f"from {side}" if side.startswith(SCRATCH) else side


def _markdown(study: StudyResults, shots: Mapping[Readout, Mapping[int, Estimate]]) -> str:
    tuned = [study.tuned(side, labels) for labels, side in _cells(study)]
    gains = [_gain(study, labels, side) for labels, side in _cells(study)]
    lines = [
        f"Fine-tuning, test accuracy in %{_deviation(tuned)}; gain over scratch in points{_interval(gains)}:",
        "",
        *(_two_sides(study) if len(study.sides) == 2 else _many_sides(study)),
    ]
    chosen = _chosen(study)
    named = {of.name: by for of, by in shots.items()} | {f"{side} ({_CHOSEN})": by for side, by in chosen.items()}
    measured = [of for by in named.values() for of in by.values()]
    lines += ["", f"Few-shot accuracy on frozen features in %{_deviation(measured)}:", ""]
    lines += _markdown_table(
        ("encoder", *(f"{n} shot{'s' * (n > 1)}" for n in study.counts)),
        ((name, *(accuracy_text(by.get(n)) for n in study.counts)) for name, by in named.items()),
    )
    probes = {probe["side"]: study.probe(probe["side"]) for probe in study.content["probes"]}
    if probes:
        lines += ["", f"Linear probe on all labels, test accuracy in %{_deviation(list(probes.values()))}:", ""]
        lines += _markdown_table(("encoder", "top-1"), ((side, accuracy_text(of)) for side, of in probes.items()))
    seen = {run["arm"]: (run["images"], run["steps"]) for run in study.content["pretraining"]}
    for arm, (images, steps) in seen.items():
        of = f" of {arm}" if len(seen) > 1 else ""
        lines += ["", f"Pretraining{of}: {images:,} images, {steps:,} steps."]
        data = study.content.get("data") or {}
        if among := data.get("test_images_seen", {}).get(arm):
            told = f"{among:,} of the {data['test_images']:,} test images"
            lines[-1] += f" Its images hold {told}, so that its figures may be too good."
    return "\n".join(lines) + "\n"


def _deviation(estimates: Sequence[Estimate | None]) -> str:
    told = over(estimates)
    return f", mean ± standard deviation over {told}" if told else ""


def _interval(estimates: Sequence[Estimate | None]) -> str:
    told = over(estimates)
    return f", ± half the width of its 95 % interval over {told}" if told else ""


def _two_sides(study: StudyResults) -> list[str]:
    """Scratch and one pretraining, side by side."""
    head = ("labels", "images", "steps", *map(_side, study.sides), "gain")
    cells = (
        (*size, *(accuracy_text(study.tuned(side, labels)) for side in study.sides),
         gain_text(_gain(study, labels, study.sides[-1])))
        for labels in study.content["config"]["labels"] if (size := _size(study, labels))
    )  # fmt: skip
    return _markdown_table(head, cells)


def _size(study: StudyResults, labels: str) -> tuple[str, str, str] | None:
    """Share, labelled images and steps; None of a share that no run has had."""
    run = next((run for run in study.content["finetuning"] if run["labels"] == labels), None)
    return None if run is None else (labels, f"{run['train_images']:,}", f"{run['steps']:,}")


def _many_sides(study: StudyResults) -> list[str]:
    steps = {(run["labels"], run["side"]): run["steps"] for run in study.content["finetuning"]}
    images = study.labelled_images
    cells = (
        (labels, f"{images[labels]:,}", _side(side), f"{steps[labels, side]:,}",
         accuracy_text(study.tuned(side, labels)), gain_text(_gain(study, labels, side)))
        for labels, side in _cells(study) if (labels, side) in steps
    )  # fmt: skip
    return _markdown_table(("labels", "images", "side", "steps", "top-1", "gain"), cells)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
