"""Tables of a study, as Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence

from mpp.downstream.estimates import Estimate, estimate
from mpp.report.settings import LONGER, RANDOM, SCRATCH
from mpp.report.wording import NONE, accuracy_text, figure, gain_text
from results_page.data import Study
from results_page.figures import rank_text, side_markdown
from results_page.goals import against_default, headline_arms, step_time


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
    names = [f"gain over {other}" if one else f"{side_markdown(arm)}: gain over {other}" for arm, other in compared]
    rows = []
    for labels in study.labels:
        sides = [accuracy_text(study.tuned(side, labels)) for side in study.sides]
        differences = [gain_text(study.gain(arm, labels, other)) for arm, other in compared]
        rows.append([labels, *sides, *differences])
    return table(["labels", *map(side_markdown, study.sides), *names], rows)


def headline_table(study: Study) -> str:
    """The few figures that matter most: fine-tuning and few-shot of every side, and what the chosen arm gains over
    scratch, where that had the device time of the pretraining over this longer one."""
    arms, sides = headline_arms(study), study.sides
    over = LONGER if study.in_equal_time else SCRATCH
    rows = []
    for labels in study.labels:
        cells = [accuracy_text(study.tuned(side, labels)) for side in sides]
        rows.append([f"{labels} of the labels", *cells, *(gain_text(study.gain(arm, labels, over)) for arm in arms)])
    shots = study.shots
    frozen = {side: accuracy_text(study.fewshot(side, shots)) for side in (RANDOM, *study.arms)}
    cells = {SCRATCH: f"{frozen[RANDOM]} (random)", LONGER: NONE, **frozen}
    named = f"few-shot, {shots} per class, frozen"
    beside = " (over random)" if over == LONGER else ""
    gains = (gain_text(study.fewshot_gain(arm, shots)) + beside for arm in arms)
    rows.append([named, *(cells[side] for side in sides), *gains])
    one = len(study.arms) == 1
    return table(["", *map(side_markdown, sides), *_of_arms(arms, f"gain over {over}", one)], rows)


def _of_arms(arms: Iterable[str], what: str, one: bool) -> list[str]:
    """Heads of columns, or of rows, of a single arm without its name."""
    return [what if one else f"{side_markdown(arm)}: {what}" for arm in arms]


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
            rows.append([labels, side_markdown(side), f"{first['train_images']:,}", *given, rates])
    head = ["labels", "side", "labelled images", "images of pretraining", "of fine-tuning", "steps", "learning rate"]
    return table(head, rows)


def fewshot_table(study: Study) -> str:
    """Accuracy by shots: each pooling at the last layer, where the study noted it also what cross-validation on the
    shots chooses of all layers and poolings, and the gain at the last layer."""
    last, usual = study.reading
    pools = [pool for layer, pool in study.readings if layer == last]
    named = [
        (f"{side_markdown(side)}, {pool}", [study.fewshot(side, shots, (last, pool)) for shots in study.counts])
        for pool in pools
        for side in study.encoders
    ]
    named += [
        (f"{side_markdown(side)}, chosen on the shots", [study.fewshot_chosen(side, shots) for shots in study.counts])
        for side in study.encoders
    ]
    rows = [[name, *map(accuracy_text, by)] for name, by in named if any(by)]
    names = _of_arms(study.arms, f"gain, {usual}", len(study.arms) == 1)
    for name, arm in zip(names, study.arms, strict=True):
        rows.append([name, *(gain_text(study.fewshot_gain(arm, shots)) for shots in study.counts)])
    return table(["encoder", *(f"{n} shot{'s' * (n > 1)}" for n in study.counts)], rows)


def probe_table(study: Study) -> str:
    """The linear probe on all labels, and the effective rank of the features that it reads."""
    at = study.reading[0], "mean"
    rows = []
    several = study.probe_chosen(RANDOM) is not None
    for side in (RANDOM, *study.arms):
        gained = NONE if side == RANDOM else gain_text(study.probe_gain(side))
        chosen = [accuracy_text(study.probe_chosen(side))] * several
        cells = [accuracy_text(study.probe(side)), gained, *chosen, rank_text(study.rank(side, at))]
        rows.append([side_markdown(side), *cells])
    return table(["encoder", "linear probe", "gain", *["chosen on held-out images"] * several, "effective rank"], rows)


def ablation_table(study: Study) -> str:
    """One row an arm, the default bold; what it gains over the default, with its interval, beside each accuracy."""
    default, shots, probed = study.arms[0], study.shots, bool(study.content["probes"])
    rows = []
    for arm in study.arms:
        flags = _flags_text(study, arm)
        cells = [f"**{side_markdown(arm)}**" if arm == default else side_markdown(arm), f"`{flags}`" if flags else ""]
        pairs = [(study.fewshot(arm, shots), study.fewshot_gain(arm, shots, over=default))]
        pairs += [(study.probe(arm), study.probe_gain(arm, over=default))] if probed else []
        pairs += [(study.tuned(arm, labels), study.gain(arm, labels, over=default)) for labels in study.labels]
        rows.append([*cells, *own_score(study, arm), *_beside(pairs, arm == default), rank_text(study.rank(arm))])
    alone = [study.fewshot(RANDOM, shots), *([study.probe(RANDOM)] if probed else [])]
    alone += [study.tuned(SCRATCH, labels) for labels in study.labels]
    cells = _beside([(of, None) for of in alone], False)
    rows.append(["no pretraining", "", NONE, NONE, *cells, rank_text(study.rank(RANDOM))])
    measured = [f"{shots} shots", *(["linear probe"] if probed else [])]
    measured += [f"{labels} of the labels" for labels in study.labels]
    heads = [head for name in measured for head in (name, "over the default")]
    return table(["arm", "differs by", "masked", "trivial", *heads, "effective rank"], rows)


def _beside(pairs: Iterable[tuple[Estimate | None, Estimate | None]], default: bool) -> list[str]:
    """Accuracies, each with its gain over the default."""
    return [text for of, gain in pairs for text in (accuracy_text(of), NONE if default else gain_text(gain))]


def effects_table(study: Study) -> str:
    """What one flag changes, on average over all pairs of arms that differ in it alone; "" where no flag has two pairs.

    For each seed the differences are averaged over the pairs; the interval is over these means.
    """
    flags = {arm: _flags(study, arm) for arm in study.arms}
    rows = []
    for flag in dict.fromkeys(flag for arm in study.arms for flag in sorted(flags[arm])):
        pairs = [(a, b) for a in study.arms for b in study.arms if flags[a] == flags[b] | {flag} != flags[b]]
        if len(pairs) > 1:
            cells = [study.mean_fewshot_gain(pairs, study.shots)]
            cells += [study.mean_gain(pairs, labels) for labels in study.labels]
            rows.append([f"`{flag}`", str(len(pairs)), *map(gain_text, cells)])
    shares = [f"{labels} of the labels" for labels in study.labels]
    return table(["flag", "pairs", f"{study.shots} shots", *shares], rows) if rows else ""


def _flags(study: Study, arm: str) -> frozenset[str]:
    """By which its pretraining differs from the study's, "--name value" each."""
    text = _flags_text(study, arm)
    return frozenset(re.split(r"\s+(?=--)", text)) if text else frozenset()


def _flags_text(study: Study, arm: str) -> str:
    return "".join(run["flags"] for run in study.pretrainings(arm)[:1])


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


def _score(score: str, values: Mapping[int, float]) -> str:
    """Over the pretrainings."""
    if not values:
        return NONE
    of = estimate(list(values.values()), "pretrainings")
    return accuracy_text(of) if score == "accuracy" else f"{figure(of.mean)} (mse)"


def length_table(study: Study) -> str:
    """What a pretraining is worth by its images, the shortest of an objective first."""
    rows = []
    for seen, arm in (each for of in series(study).values() for each in of):
        shares = [gain_text(study.gain(arm, labels)) for labels in study.labels]
        frozen = gain_text(study.fewshot_gain(arm, study.shots))
        rows.append([f"{seen:,}", side_markdown(arm), *own_score(study, arm), frozen, *shares])
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
        cells = [
            f"**{side_markdown(arm)}**" if arm == default else side_markdown(arm),
            f"{runs[0]['images']:,}" if runs else NONE,
        ]
        cells += [f"{step_time(study, arm):.2f}" if runs else NONE]
        cells += [accuracy_text(study.probe(arm))] * probed
        cells.append(gain_text(study.fewshot_gain(arm, study.shots)))
        for labels, against in shares.items():
            times = against[arm].times if arm in against else None
            share = "" if times is None else f" ({times:.0%})"
            cells.append(gain_text(study.gain(arm, labels)) + share)
        rows.append(cells)
    head = ["arm", "images of pretraining", "time per image", *["linear probe"] * probed]
    return table([*head, f"{study.shots} shots, frozen", *(f"{labels} of the labels" for labels in study.labels)], rows)


def layers_table(study: Study) -> str:
    """Few-shot accuracy by layer and pooling, random beside every arm, with the rank of the mean's features."""
    pools = list(dict.fromkeys(pool for _, pool in study.readings))
    rows = []
    for side in (RANDOM, *study.arms):
        for layer in dict.fromkeys(layer for layer, _ in study.readings):
            cells = [accuracy_text(study.fewshot(side, study.shots, (layer, pool))) for pool in pools]
            rows.append([side_markdown(side), str(layer), *cells, rank_text(study.rank(side, (layer, "mean")))])
    return table(["encoder", "layer", *pools, "effective rank"], rows)
