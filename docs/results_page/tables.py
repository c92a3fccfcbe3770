"""Tables of a study, as Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from mpp.run_page.wording import NONE, figure, points
from mpp.study_recipe import LONGER, RANDOM, SCRATCH
from results_page.data import Study, Values
from results_page.figures import (
    accuracy_text,
    best_reading,
    fewshot_gains,
    finetuning_gains,
    gain_text,
    gains,
    last_layer,
    mark,
)
from results_page.goals import against_default, chosen, step_time
from results_page.wording import shown

_MEAN = ("mean",)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; a stroke within a cell is escaped."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def finetuning_table(study: Study) -> str:
    """Accuracy of every side at every share, and what each pretraining gains."""
    over = [SCRATCH, LONGER] if LONGER in study.sides else [SCRATCH]
    one = len(study.arms) == 1
    compared = [(arm, other) for arm in study.arms for other in over]
    names = [f"gain over {other}" if one else f"{shown(arm)}: gain over {other}" for arm, other in compared]
    rows = []
    for labels in study.labels:
        sides = [accuracy_text(study.top1(side, labels)) for side in study.sides]
        differences = [gain_text(finetuning_gains(study, arm, labels, other)) for arm, other in compared]
        rows.append([labels, *sides, *differences])
    return table(["labels", *map(shown, study.sides), *names], rows)


def headline_table(study: Study) -> str:
    """The few figures that matter most: fine-tuning and few-shot of every side, and the largest gain."""
    arm, sides = chosen(study), study.sides
    if arm is None:
        return ""
    rows = []
    for labels in study.labels:
        cells = [accuracy_text(study.top1(side, labels)) for side in sides]
        rows.append([f"{labels} of the labels", *cells, gain_text(finetuning_gains(study, arm, labels))])
    shots, frozen = study.shots, {}
    for side in (RANDOM, *study.arms):
        at = best_reading(study, side, shots)
        frozen[side] = accuracy_text(study.fewshot(side, shots, *at)) if at else NONE
    cells = {SCRATCH: f"{frozen[RANDOM]} (random)", LONGER: NONE, **frozen}
    named = f"few-shot, {shots} per class, frozen"
    rows.append([named, *(cells[side] for side in sides), gain_text(fewshot_gains(study, arm, shots))])
    gained = "gain over scratch" if len(study.arms) == 1 else f"{shown(arm)}: gain over scratch"
    return table(["", *map(shown, sides), gained], rows)


def recipe_table(study: Study) -> str:
    """What each side was given: images, learning rate."""
    rows = []
    for labels in study.labels:
        for side in study.sides:
            runs = [run for run in study.content["finetuning"] if (run["side"], run["labels"]) == (side, labels)]
            if not runs:
                continue
            before = study.pretrainings(side)
            first = runs[0]
            rates = ", ".join(f"{rate:g}" for rate in sorted({run["lr"] for run in runs}))
            given = [f"{before[0]['images']:,}" if before else NONE, f"{first['images']:,}", f"{first['steps']:,}"]
            rows.append([labels, shown(side), f"{first['train_images']:,}", *given, rates])
    head = ["labels", "side", "labelled images", "images of pretraining", "of fine-tuning", "steps", "learning rate"]
    return table(head, rows)


def fewshot_table(study: Study) -> str:
    """Accuracy by shots: each pooling at the last layer, and the best of all layers and poolings."""
    counts = sorted({run["shots"] for run in study.content["fewshot"]})
    last = last_layer(study)
    pools = [pool for layer, pool in study.readings if layer == last]
    rows = [
        [f"{shown(side)}, {pool}", *(accuracy_text(study.fewshot(side, shots, last, pool)) for shots in counts)]
        for pool in pools
        for side in (RANDOM, *study.arms)
    ]
    if len(study.readings) > 1:
        for side in (RANDOM, *study.arms):
            best = [(shots, best_reading(study, side, shots)) for shots in counts]
            cells = [
                f"{accuracy_text(study.fewshot(side, n, *at))} ({at[0]}, {at[1]})" if at else NONE for n, at in best
            ]
            rows.append([f"{shown(side)}, best (layer, pooling)", *cells])
    for arm in study.arms:
        name = "gain, best over best" if len(study.arms) == 1 else f"{shown(arm)}: gain, best over best"
        rows.append([name, *(gain_text(fewshot_gains(study, arm, shots)) for shots in counts)])
    return table(["encoder", *(f"{n} shot{'s' * (n > 1)}" for n in counts)], rows)


def probe_table(study: Study) -> str:
    """The linear probe on all labels, and the effective rank of the features that it reads."""
    at = last_layer(study), "mean"
    rows = []
    for side in (RANDOM, *study.arms):
        gained = NONE if side == RANDOM else _unpaired(study.probe(side), study.probe(RANDOM))
        rows.append([shown(side), accuracy_text(study.probe(side)), gained, _ranks(study.rank(side, *at))])
    return table(["encoder", "linear probe", "gain", "effective rank"], rows)


def ablation_table(study: Study) -> str:
    """One row an arm, the default bold; an arrow where it differs from the default by more than two standard errors."""
    default, last, shots = study.arms[0], last_layer(study), study.shots
    probed = bool(study.content["probes"])
    rows = []
    for arm in study.arms:
        usual = None if arm == default else default
        flags = _flags_text(study, arm)
        cells = [f"**{shown(arm)}**" if arm == default else shown(arm), f"`{flags}`" if flags else ""]
        cells += own_score(study, arm)
        cells.append(_marked(study, arm, usual, last))
        best = best_reading(study, arm, shots, _MEAN)
        cells.append(f"{_marked(study, arm, usual, best[0])} ({best[0]})" if best else NONE)
        pairs = [(study.probe(arm), study.probe(usual) if usual else {})] if probed else []
        pairs += [(study.top1(arm, labels), study.top1(usual, labels) if usual else {}) for labels in study.labels]
        cells += [accuracy_text(here) + mark(gains(here, there)) for here, there in pairs]
        rows.append([*cells, _ranks(study.rank(arm, last, "mean"))])
    best = best_reading(study, RANDOM, shots, _MEAN)
    cells = [accuracy_text(study.fewshot_by_pretraining(RANDOM, shots, last, "mean"))]
    cells.append(f"{_marked(study, RANDOM, None, best[0])} ({best[0]})" if best else NONE)
    if probed:
        cells.append(accuracy_text(study.probe(RANDOM)))
    cells += [accuracy_text(study.top1(SCRATCH, labels)) for labels in study.labels]
    rows.append(["no pretraining", "", NONE, NONE, *cells, _ranks(study.rank(RANDOM, last, "mean"))])
    frozen = [f"{shots} shots, last layer", f"{shots} shots, best layer", *(["linear probe"] if probed else [])]
    shares = [f"{labels} of the labels" for labels in study.labels]
    return table(["arm", "differs by", "masked", "trivial", *frozen, *shares, "effective rank"], rows)


def effects_table(study: Study) -> str:
    """What one flag changes, on average over all pairs of arms that differ in it alone; "" where no flag has two pairs.

    For each seed the differences are averaged over the pairs; the interval is over these means.
    """
    flags = {arm: _flags(study, arm) for arm in study.arms}
    last, shots = last_layer(study), study.shots
    frozen = {arm: study.fewshot_by_pretraining(arm, shots, last, "mean") for arm in study.arms}
    tuned = [{arm: study.top1(arm, labels) for arm in study.arms} for labels in study.labels]
    rows = []
    for flag in dict.fromkeys(flag for arm in study.arms for flag in sorted(flags[arm])):
        pairs = [(a, b) for a in study.arms for b in study.arms if flags[a] == flags[b] | {flag} != flags[b]]
        if len(pairs) > 1:
            cells = [gain_text(_mean_gains(values, pairs)) for values in (frozen, *tuned)]
            rows.append([f"`{flag}`", str(len(pairs)), *cells])
    shares = [f"{labels} of the labels" for labels in study.labels]
    return table(["flag", "pairs", f"{shots} shots, last layer", *shares], rows) if rows else ""


def _flags(study: Study, arm: str) -> frozenset[str]:
    """By which its pretraining differs from the study's, "--name value" each."""
    told = _flags_text(study, arm)
    return frozenset(re.split(r"\s+(?=--)", told)) if told else frozenset()


def _flags_text(study: Study, arm: str) -> str:
    return "".join(run["flags"] for run in study.pretrainings(arm)[:1])


def _mean_gains(values: Mapping[str, Values], pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Of the first of a pair over the second, for every seed that all of them have, the mean over the pairs."""
    seeds = set.intersection(*(set(values[arm]) for pair in pairs for arm in pair))
    return [fmean(values[a][seed] - values[b][seed] for a, b in pairs) for seed in sorted(seeds)]


def _marked(study: Study, side: str, usual: str | None, layer: int) -> str:
    """Few-shot accuracy of the mean of the patches over the pretrainings, marked against the default's same layer."""
    here = study.fewshot_by_pretraining(side, study.shots, layer, "mean")
    there = study.fewshot_by_pretraining(usual, study.shots, layer, "mean") if usual else {}
    return accuracy_text(here) + mark(gains(here, there))


def own_score(study: Study, arm: str) -> list[str]:
    """The objective's score at masked patches at the end, and the better of what needs no model."""
    runs = {run["seed"]: run["final"] for run in study.pretrainings(arm)}
    for score, better in (("accuracy", max), ("mse", min)):
        masked = {seed: final[f"{score}_masked"] for seed, final in runs.items() if f"{score}_masked" in final}
        if masked:
            kinds = [f"{score}_baseline_{kind}" for kind in ("neighbours", "frequent")]
            trivial = {
                seed: better(runs[seed][kind] for kind in kinds if kind in runs[seed])
                for seed in masked
                if any(kind in runs[seed] for kind in kinds)
            }
            return [_score(score, masked), _score(score, trivial)]
    return [NONE, NONE]


def _score(score: str, values: Values) -> str:
    if score == "accuracy":
        return accuracy_text(values)
    return f"{figure(fmean(values.values()))} (mse)" if values else NONE


def _ranks(values: Values) -> str:
    return f"{fmean(values.values()):.1f}" if values else NONE


def _unpaired(values: Values, other: Values) -> str:
    """A gain over what was measured once."""
    return points(fmean(values.values()) - fmean(other.values())) if values and other else NONE


def length_table(study: Study) -> str:
    """What a pretraining is worth by its images, the shortest of an objective first."""
    rows = []
    for seen, arm in (each for of in series(study).values() for each in of):
        shares = [gain_text(finetuning_gains(study, arm, labels)) for labels in study.labels]
        frozen = gain_text(fewshot_gains(study, arm, study.shots))
        rows.append([f"{seen:,}", shown(arm), *own_score(study, arm), frozen, *shares])
    head = ["images of pretraining", "arm", "masked", "trivial", f"{study.shots} shots, frozen"]
    return table([*head, *(f"{labels} of the labels" for labels in study.labels)], rows)


def series(study: Study) -> dict[str, list[tuple[int, str]]]:
    """Arms by the images that their pretraining saw, of each objective: what a name has before its last comma."""
    found: dict[str, list[tuple[int, str]]] = {}
    for arm in study.arms:
        if study.pretrainings(arm):
            objective, _, _ = arm.rpartition(", ")
            found.setdefault(objective, []).append((study.pretrainings(arm)[0]["images"], arm))
    return {objective: sorted(arms) for objective, arms in found.items()}


def best_table(study: Study) -> str:
    """Arms against the default: images, time, linear probe, gains with their share of the default's gain."""
    default, probed = study.arms[0], bool(study.content["probes"])
    shares = {labels: {each.arm: each for each in against_default(study, labels)} for labels in study.labels}
    rows = []
    for arm in study.arms:
        runs = study.pretrainings(arm)
        cells = [f"**{shown(arm)}**" if arm == default else shown(arm), f"{runs[0]['images']:,}" if runs else NONE]
        cells += [f"{step_time(study, arm):.2f}" if runs else NONE]
        cells += [accuracy_text(study.probe(arm))] * probed
        cells.append(gain_text(fewshot_gains(study, arm, study.shots)))
        for labels, against in shares.items():
            times = against[arm].times if arm in against else None
            share = "" if times is None else f" ({times:.0%})"
            cells.append(gain_text(finetuning_gains(study, arm, labels)) + share)
        rows.append(cells)
    head = ["arm", "images of pretraining", "time per image", *["linear probe"] * probed]
    return table([*head, f"{study.shots} shots, frozen", *(f"{labels} of the labels" for labels in study.labels)], rows)


def layers_table(study: Study) -> str:
    """Few-shot accuracy by layer and pooling, random beside every arm, with the rank of the mean's features."""
    pools = list(dict.fromkeys(pool for _, pool in study.readings))
    rows = []
    for side in (RANDOM, *study.arms):
        for layer in dict.fromkeys(layer for layer, _ in study.readings):
            cells = [accuracy_text(study.fewshot(side, study.shots, layer, pool)) for pool in pools]
            rows.append([shown(side), str(layer), *cells, _ranks(study.rank(side, layer, "mean"))])
    return table(["encoder", "layer", *pools, "effective rank"], rows)
