"""Accuracies, gains and intervals of a study, from its study.json, for its tables, pages and docs.

Free of torch. Accuracies are shares, 0 to 1. Gains are paired:

    fine-tuning   by the seed, which draws the labelled images, their order and new weights, the same for all sides. The
                  interval is over the pretrainings, or of one pretraining over the seeds.
    few-shot      by the draw of the shots and, of two arms, by the seed of the pretraining; the interval is over both.
                  The untrained encoder is one: how others would differ from it is in no interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from mpp.data.sources.base import count
from mpp.downstream.estimates import Estimate, of_groups, of_table
from mpp.report.settings import LONGER, RANDOM, SCRATCH

Reading = tuple[int, str]
"""Layer, counted from the end, and pooling."""

Pair = tuple[str, str]
"""A side and the one it is compared with."""


@dataclass(frozen=True)
class StudyResults:
    """The figures of one study, finished or not."""

    content: Mapping[str, Any]
    """Of study.json."""

    @property
    def labelled_images(self) -> Mapping[str, int]:
        """Number of images at each share of the labels that some run has had."""
        return {run["labels"]: run["train_images"] for run in self.content["finetuning"]}

    @property
    def arms(self) -> list[str]:
        """Pretrained sides in the study's order; the first is the default that others are compared with."""
        named = [run["arm"] for run in self.content["pretraining"]]
        named += [run["side"] for key in ("finetuning", "fewshot") for run in self.content[key]]
        return [name for name in dict.fromkeys(named) if name not in (SCRATCH, LONGER, RANDOM)]

    @property
    def sides(self) -> list[str]:
        """Sides that were fine-tuned, those without pretraining first."""
        tuned = {run["side"] for run in self.content["finetuning"]}
        return [side for side in (SCRATCH, LONGER, *self.arms) if side in tuned]

    @property
    def encoders(self) -> list[str]:
        """Encoders with few-shot results, the untrained one first."""
        read = {run["side"] for run in self.content["fewshot"]}
        return [side for side in (RANDOM, *self.arms) if side in read]

    @property
    def counts(self) -> list[int]:
        """The numbers of shots, ascending."""
        return sorted({run["shots"] for run in self.content["fewshot"]})

    @property
    def readings(self) -> list[Reading]:
        """Layers and poolings of the few-shot results, the last layer last."""
        found = dict.fromkeys((run["layer"], run["pool"]) for run in self.content["fewshot"])
        return sorted(found, key=lambda reading: reading[0])

    @property
    def reading(self) -> Reading:
        """The reading that stands for an encoder: the mean of the patches at the last layer, where that was measured.

        It is fixed beforehand. To choose the best by the test images would favour an encoder with more readings.
        """
        last = max((layer for layer, _ in self.readings), default=-1)
        pools = [pool for layer, pool in self.readings if layer == last]
        return last, "mean" if "mean" in pools or not pools else pools[0]

    def of_pretraining(self, arm: str, seed: int | None) -> "StudyResults":
        """The results of one pretraining, and of the sides without any."""

        def chosen(run: Mapping[str, Any]) -> bool:
            return run["side"] in (SCRATCH, LONGER, RANDOM) or (run["side"], run["pretrain_seed"]) == (arm, seed)

        parts = {key: list(filter(chosen, self.content[key])) for key in ("finetuning", "fewshot")}
        return StudyResults({**self.content, **parts, "pretraining": []})

    def tuned(self, side: str, labels: str) -> Estimate | None:
        """Test accuracy after fine-tuning; None where nothing was measured yet."""
        groups: dict[int | None, list[float]] = {}
        for run in self._tuned(side, labels).values():
            groups.setdefault(run["pretrain_seed"], []).append(run["top1"])
        return _of_runs(groups, [side])

    def gain(self, side: str, labels: str, over: str = SCRATCH) -> Estimate | None:
        """Of a side over another after fine-tuning; None where no seed has both."""
        return self.mean_gain([(side, over)], labels)

    def mean_gain(self, pairs: Sequence[Pair], labels: str) -> Estimate | None:
        """The mean gain over pairs of sides, of the first over the second, for each seed that all of them have."""
        runs = {side: self._tuned(side, labels) for pair in pairs for side in pair}
        groups: dict[tuple[int | None, ...], list[float]] = {}
        for seed in sorted(set.intersection(*map(set, runs.values()))):
            starts = tuple(of[seed]["pretrain_seed"] for of in runs.values())
            gained = fmean(runs[side][seed]["top1"] - runs[other][seed]["top1"] for side, other in pairs)
            groups.setdefault(starts, []).append(gained)
        return _of_runs(groups, list(runs))

    def gains(self, side: str, labels: str) -> dict[int, float]:
        """Gain of a side over scratch, by the seed of the fine-tuning."""
        here, there = self._tuned(side, labels), self._tuned(SCRATCH, labels)
        return {seed: run["top1"] - there[seed]["top1"] for seed, run in here.items() if seed in there}

    def fewshot(self, side: str, shots: int, reading: Reading | None = None) -> Estimate | None:
        """Few-shot accuracy of a frozen encoder; None where it was not measured."""
        rows = self._drawn(side, shots, reading)
        return of_table(np.array(list(rows.values()))) if rows else None

    def fewshot_gain(self, side: str, shots: int, over: str = RANDOM) -> Estimate | None:
        """Of an encoder over another, both read in the same way."""
        return self.mean_fewshot_gain([(side, over)], shots)

    def mean_fewshot_gain(self, pairs: Sequence[Pair], shots: int) -> Estimate | None:
        """The mean gain over pairs of encoders, for each pretraining that all of them have."""
        rows = {side: self._drawn(side, shots) for pair in pairs for side in pair}
        pretrained = [set(of) for of in rows.values() if None not in of]
        seeds = set.intersection(*pretrained) if pretrained else {None}
        if not seeds or not all(rows.values()):
            return None

        def of(side: str, seed: int | None) -> np.ndarray:
            return np.array(rows[side][seed if seed in rows[side] else None])

        gained = [np.mean([of(a, seed) - of(b, seed) for a, b in pairs], axis=0) for seed in sorted(seeds, key=str)]
        return of_table(np.stack(gained))

    def fewshot_chosen(self, side: str, shots: int) -> Estimate | None:
        """Few-shot accuracy where each draw chooses layer and pooling by cross-validation on its shots.

        None where an older study did not record the held-out accuracies, or has only one reading.
        """
        runs = [run for run in self.content["fewshot"] if (run["side"], run["shots"]) == (side, shots)]
        order = sorted(runs, key=lambda run: (-run["layer"], run["pool"] != self.reading[1]))
        rows: dict[int | None, list[Mapping[str, Any]]] = {}
        for run in order:
            rows.setdefault(run["pretrain_seed"], []).append(run)
        if len(self.readings) < 2 or not rows or not all(run.get("held_out") for run in runs):
            return None
        table = []
        for ways in rows.values():
            held_out = np.array([[-1.0 if of is None else of for of in run["held_out"]] for run in ways])
            accuracy = np.array([run["accuracy"] for run in ways])
            table.append(np.take_along_axis(accuracy, held_out.argmax(axis=0)[None], axis=0)[0])
        return of_table(np.array(table))

    def probe(self, side: str) -> Estimate | None:
        """Accuracy of the linear probe on all labels, over the pretrainings."""
        return _of_runs({seed: [top1] for seed, top1 in self._probed(side).items()}, [side])

    def probe_chosen(self, side: str) -> Estimate | None:
        """The same where held-out training images choose layer and pooling; None where an older study did not, or there
        is one reading only."""
        runs = [run for run in self.content["probes"] if run["side"] == side]
        if not all(run.get("chosen") for run in runs):
            return None
        return _of_runs({run["pretrain_seed"]: [run["chosen"]["top1"]] for run in runs}, [side])

    def probe_gain(self, side: str, over: str = RANDOM) -> Estimate | None:
        """Of the linear probe of an encoder over that of another."""
        here, there = self._probed(side), self._probed(over)
        pairs = {seed: seed if seed in there else None for seed in here}
        return _of_runs({seed: [here[seed] - there[at]] for seed, at in pairs.items() if at in there}, [side])

    def rank(self, side: str, reading: Reading | None = None) -> float | None:
        """Effective rank of the features, the mean over the pretrainings."""
        asked = side, *(reading or self.reading)
        runs = [run for run in self.content["fewshot"] if (run["side"], run["layer"], run["pool"]) == asked]
        return fmean({run["pretrain_seed"]: run["rank"] for run in runs}.values()) if runs else None

    def held_out(self, side: str) -> float | None:
        """Held-out accuracy of the learning rate that a side chose, the mean over the shares of the labels at which it
        chose one; None where it had one learning rate."""
        sweeps = [(run["sweep"] or {}).values() for run in self.content["finetuning"] if run["side"] == side]
        known = [[accuracy for accuracy in sweep if accuracy is not None] for sweep in sweeps]
        best = [max(accuracies) for accuracies in known if accuracies]
        return fmean(best) if best else None

    def _tuned(self, side: str, labels: str) -> dict[int, Mapping[str, Any]]:
        runs = self.content["finetuning"]
        return {run["seed"]: run for run in runs if (run["side"], run["labels"]) == (side, labels)}

    def _drawn(self, side: str, shots: int, reading: Reading | None = None) -> dict[int | None, list[float]]:
        """Accuracies by draw, by the seed of the pretraining; None of an encoder that has none."""
        asked = side, shots, *(reading or self.reading)
        return {
            run["pretrain_seed"]: run["accuracy"]
            for run in self.content["fewshot"]
            if (run["side"], run["shots"], run["layer"], run["pool"]) == asked
        }

    def _probed(self, side: str) -> dict[int | None, float]:
        return {run["pretrain_seed"]: run["top1"] for run in self.content["probes"] if run["side"] == side}


def _of_runs(groups: Mapping[Any, Sequence[float]], sides: Sequence[str]) -> Estimate | None:
    """Of runs by their pretraining; None of no runs."""
    if not groups:
        return None
    runs = sum(map(len, groups.values()))
    if len(groups) > 1:
        several = "" if runs == len(groups) else f" ({count(runs, 'fine-tuning')})"
        return of_groups(groups, f"{count(len(groups), 'pretraining')}{several}")
    pretrained = any(side not in (SCRATCH, LONGER, RANDOM) for side in sides)
    return of_groups(groups, f"{count(runs, 'fine-tuning seed')}{' of one pretraining' * pretrained}")
