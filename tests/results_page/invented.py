"""Studies for a pencil, and how the page's tables are read."""

import re

from results_page.data import Study

from tests.invented_studies import study


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
        {
            "side": side,
            "pretrain_seed": seed,
            "layer": -1,
            "pool": "mean",
            "shots": 10,
            "accuracy": list(draws),
            "rank": 7.0 + (seed or 0),
        }
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
