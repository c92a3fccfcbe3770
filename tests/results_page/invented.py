"""Studies that nobody ran, as the study tool leaves their data; and how the page's tables are read."""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from results_page.data import Study

IMAGES = {"1%": 500, "10%": 5_000, "100%": 50_000}
SCRATCH = {"1%": 0.284, "10%": 0.344, "100%": 0.398}
HARDWARE = {"system": "Linux-6.1.0", "processor": "AMD EPYC", "cores": 2, "memory_gib": 15.6, "hosts": 1}
ENVIRONMENT = {
    "time": "2026-11-21T20:00:00+00:00",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "versions": {"python": "3.11.7", "mpp": "0.1.0", "torch": "2.13.0+cpu", "timm": "1.0.31", "numpy": "2.4.6"},
    "hardware": HARDWARE | {"devices": ["cpu"]},
    "precision": "fp32",
}


def study(
    name: str,
    arms: Mapping[str, tuple[str, float]],
    *,
    images: Mapping[str, int] | None = None,
    longer: Sequence[str] = (),
    pretrain_seeds: Sequence[int] = (0,),
    layers: Sequence[int] = (-1,),
    pools: Sequence[str] = ("mean", "token"),
    equal_time: Mapping[str, float] | None = None,
    probe: bool = True,
) -> dict[str, Any]:
    """study.json of a study of three shares of the labels and three seeds, with figures that scatter as real ones do.

    `arms`: name -> (flags, about what it gains at 1 % of the labels, less the more labels there are); `images` of an
    arm's pretraining, where they are not 300,032; `equal_time`: time of an arm's image as a multiple of the first's.
    """
    chance = random.Random(name)
    seeds = (0, 1, 2)
    seen = {arm: (images or {}).get(arm, 300_032) for arm in arms}
    rates = {"1%": 5e-4, "10%": 1e-3, "100%": 1e-3}
    finetuning = []
    for number, labels in enumerate(IMAGES):
        for seed in seeds:
            draw = chance.gauss(0, 0.006)  # of the labelled images, which all sides share
            sides = {"scratch": 0.0} | ({"scratch, longer": 0.02} if labels in longer else {})
            for side, gain in (sides | {arm: gain / (1 + number) for arm, (_, gain) in arms.items()}).items():
                top1 = SCRATCH[labels] + draw + gain + chance.gauss(0, 0.004)
                start = None if side in sides else pretrain_seeds[seed % len(pretrain_seeds)]
                run = {"side": side, "labels": labels, "seed": seed, "pretrain_seed": start, "length": "40k images"}
                run |= {"images": 40_000 + 300_032 * (side == "scratch, longer"), "steps": 625, "lr": rates[labels]}
                sweep = None if seed else {"0.0005": 0.30 + number / 50, "0.001": 0.31, "0.003": None}
                run |= {"sweep": sweep, "train_images": IMAGES[labels], "top1": top1, "top5": top1 + 0.4}
                finetuning.append(run | {"balanced": top1, "seconds": 95.25})
    frozen = [("random", None, 0.0), *((arm, s, gain / 2) for arm, (_, gain) in arms.items() for s in pretrain_seeds)]
    return {
        "schema": 1,
        "name": name,
        "finished": True,
        "config": {
            "run_dir": f"runs/{name}",
            "data": "shards:cifar10-train-*.tar.gz",
            "test": "shards:cifar10-test-*.tar.gz",
            "pretrain": {"data": {"source": ""}},
            "arms": [f"{arm}: {flags}" if flags else arm for arm, (flags, _) in arms.items()] if len(arms) > 1 else [],
            "pretrain_seeds": list(pretrain_seeds),
            "labels": list(IMAGES),
            "seeds": list(seeds),
            "finetune": {"optim": {"lr": [0.0005, 0.001, 0.003]}},
        },
        "environment": ENVIRONMENT,
        "data": {"train_images": 50_000, "test_images": 10_000, "classes": 10},
        "equal_time": equal_time
        and {"arms": {arm: {"ratio": ratio, "images": seen[arm]} for arm, ratio in equal_time.items()}},
        "pretraining": [
            _pretraining(arm, flags, seed, seen[arm], chance)
            for seed in pretrain_seeds
            for arm, (flags, _) in arms.items()
        ],
        "finetuning": finetuning,
        "fewshot": [
            {"side": side, "pretrain_seed": seed, "layer": layer, "pool": pool, "shots": shots}
            | {"accuracy": [0.12 + 0.035 * shots**0.5 + value + chance.gauss(0, 0.005) for _ in seeds]}
            | {"rank": 40.0 + 4 * layer + 100 * gain}
            for side, seed, gain in frozen
            for layer in layers
            for value in [gain * (1 - abs(layer + 3) / 8)]
            for pool in pools
            for shots in (1, 10)
        ],
        "probes": [
            {"side": side, "pretrain_seed": seed, "top1": 0.371 + gain + chance.gauss(0, 0.003)}
            for side, seed, gain in frozen
            if probe
        ],
        "device_seconds": 19_000.0,
    }


def _pretraining(arm: str, flags: str, seed: int, images: int, chance: random.Random) -> dict[str, Any]:
    score, model, trivial = ("mse", 0.021, 0.034) if "pixels" in flags else ("accuracy", 0.411, 0.296)
    model += chance.gauss(0, 0.001)
    final = {"loss": 1.77 + chance.random() / 10, f"{score}_masked": model, f"{score}_baseline_neighbours": trivial}
    run = {"arm": arm, "flags": flags, "seed": seed, "images": images, "steps": images // 128, "batch_size": 128}
    run |= {"parameters": 2_690_000, "lr": 2e-3, "seconds": images * (0.0015 if "late" in arm else 0.0020)}
    run["final"] = final | {f"{score}_baseline_frequent": 0.058 if score == "accuracy" else 0.25}
    return run | {"curve": [[images * i // 50, model * (1 - 0.9**i)] for i in range(1, 51)]}


def all_kinds() -> dict[str, dict[str, Any]]:
    """One study of each kind, by name."""
    best = {"default": ("", 0.05), "late masks": ("--objective.mask_at 4", 0.07), "several targets": ("--x y", 0.11)}
    lengths = {
        f"{name}, {n}k": (f"{flags}--train.length '{n}k images'", gain * i)
        for name, flags, gain in (("usual", "", 0.02), ("late masks", "--objective.mask-enters 2 ", 0.03))
        for i, n in enumerate((50, 150, 500, 1500), 1)
    }
    ablation = {
        "mean colour, 50 %": ("", 0.05),
        "4x4 colours": ("--objective.target colour_4x4", 0.052),
        "pixels (L2)": ("--objective.target pixels", 0.03),
        "15 %": ("--objective.ratio 0.15", 0.04),
        "75 %": ("--objective.ratio 0.75", 0.065),
        "blocks": ("--objective.picking block", 0.05),
    }
    begun = {"new weights": ("", 0.03), "continued": ("--init runs/other/pretrain/usual/seed_0", 0.06)}
    pools, times = ("mean", "token", "mean+token"), {"default": 1.0, "late masks": 0.75, "several targets": 1.2}
    longer, seeds, every = ("1%", "100%"), (0, 1, 2), tuple(range(-6, 0))
    made = (
        study("benefit_cpu", {"pretrained": ("", 0.05)}, longer=longer, layers=every, pools=pools),
        study("ablation_cpu", ablation, pretrain_seeds=seeds, layers=(-1, -3)),
        study("length_cpu", lengths, images={arm: int(arm.split()[-1][:-1]) * 1000 for arm in lengths}),
        study("best_cpu", best, images={"late masks": 400_000, "several targets": 250_112}, equal_time=times),
        study("continue_cpu", begun, pretrain_seeds=seeds),
    )
    return {each["name"]: each for each in made}


def by_hand() -> Study:
    """A study small enough for a pencil: one share, three seeds, two pretrainings of two arms, two draws."""
    top1 = {
        "scratch": (0.30, 0.32, 0.34),
        "scratch, longer": (0.33, 0.35, 0.34),
        "usual": (0.40, 0.42, 0.47),
        "other": (0.51, 0.53, 0.58),
        "same": (0.42, 0.43, 0.47),
    }
    frozen = {("random", None): (0.20, 0.22), ("usual", 0): (0.30, 0.34), ("usual", 1): (0.36, 0.40)}
    content = study("benefit_hand", {"usual": ("", 0.1), "other": ("--x", 0.2), "same": ("--y", 0.1)}, probe=False)
    content["config"] |= {"labels": ["1%"], "pretrain_seeds": [0, 1]}
    runs = {run["side"]: run for run in content["finetuning"] if run["labels"] == "1%"}
    runs["scratch, longer"] = runs["scratch"]
    held_out = {"usual": 0.30, "other": 0.42, "same": 0.40}  # of the learning rate that each chose with the first seed
    content["finetuning"] = [
        runs[side]
        | {"side": side, "seed": seed, "top1": value, "pretrain_seed": None if side.startswith("scratch") else seed}
        | {"sweep": {"0.1": held_out[side], "0.2": 0.1} if side in held_out and not seed else None}
        for side, values in top1.items()
        for seed, value in enumerate(values)
    ]
    content["fewshot"] = [
        {"side": side, "pretrain_seed": seed, "layer": -1, "pool": "mean", "shots": 10}
        | {"accuracy": list(draws), "rank": 7.0 + (seed or 0)}
        for (side, seed), draws in frozen.items()
    ]
    return Study(content, content["name"])


def rows(text: str) -> dict[str, list[str]]:
    """Cells of a Markdown table by the first of each row; its head is the row ""."""
    first, _, *rest = [line.strip("|").split("|") for line in text.splitlines()]
    return {"": [cell.strip() for cell in first]} | {line[0].strip(): [c.strip() for c in line[1:]] for line in rest}


def check_tables(text: str) -> None:
    """Every row of a table has as many cells as its head."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") - line.count(r"\|") for line in table.splitlines()}) == 1, table
