"""The last words of a run and of a dry run, as plain text."""

import math
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mpp.pretraining.build import Run
from mpp.pretraining.monitor import Watch
from mpp.training.log import read_rows
from mpp.training.rows import last_part, training_spans


def summary(folder: Path, score: str, notes: Sequence[str] = (), init: str = "") -> str:
    """What a finished run has to say, from its own rows, and what else is to be said. `init`: what it went on from."""
    rows = read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if score in row]
    evaluated = [row for row in rows if any(name.startswith("fewshot/") for name in row)]
    lines = ["", f"Finished: {rows[-1]['step']:,} steps, {rows[-1]['images']:,} images.", ""]
    last, span = last_part(trained, score)
    unit: Callable[[float], str] = (lambda v: f"{v:7.1%}") if score == "accuracy" else (lambda v: f"{v:7.4f}")
    better = "higher" if score == "accuracy" else "lower"
    lines += [
        f"Prediction of corrupted patches, {score} ({better} is better), mean over the last {span} steps:",
        f"  {unit(last[f'{score}_masked'])}  the model, at masked patches" if f"{score}_masked" in last else "",
        f"  {unit(last[score])}  the model, at all corrupted patches",
        f"  {unit(last[f'{score}_baseline_neighbours'])}  trivial: the colour of the nearest visible patches",
        f"  {unit(last[f'{score}_baseline_frequent'])}  trivial: always the most frequent colour",
        "",
    ]
    if len(evaluated) > 1 and evaluated[0]["step"] == 0:
        first, final = evaluated[0], evaluated[-1]
        several = any(name.endswith("_std") and spread for name, spread in final.items())
        drawn = "mean ± standard deviation over the draws of the shots" if several else "one draw of the shots"
        lines.append(f"Few-shot accuracy on frozen features ({drawn}):")
        lines.append(f"  {'shots':>8}  {'its init' if init else 'random init':>15}  {'pretrained':>15}")
        for name in (n for n in final if n in first and n.startswith("fewshot/") and n.endswith("shot")):
            cells = (_around(row[name], row.get(f"{name}_std")) for row in (first, final))
            shots = name.removeprefix("fewshot/").removesuffix("shot")
            lines.append(f"  {shots:>8}  " + "  ".join(f"{c:>15}" for c in cells))
        lines += [f"  evaluated {len(evaluated)} times, in {_evaluation_share(rows):.1%} of the time", ""]
    lines += [f"note: {note}" for note in notes] + [""] * bool(notes)
    lines.append(f"pictures     {folder / 'pictures'}")
    if (folder / "tensorboard").is_dir():
        lines.append(f"curves       tensorboard --logdir {folder}")
    lines.append(f'model        timm.create_model("local-dir:{folder / "model"}", pretrained=True)')
    return "\n".join(lines)


def _around(mean: float, spread: float | None) -> str:
    """With the spread where there is one: of a single draw older runs wrote 0."""
    return f"{mean:.1%} ± {spread:.1%}" if spread else f"{mean:.1%}"


def _evaluation_share(rows: list[dict[str, Any]]) -> float:
    """Few-shot evaluation's share of the run's time, over all starts of the run."""
    evaluating = sum(row.get("time/fewshot_seconds", 0.0) for row in rows)
    training = sum(seconds for _, seconds in training_spans(rows))
    return evaluating / (evaluating + training)


def dry_run_report(parts: Run, ends: list[float], watch: Watch) -> str:
    """What the full run would take, judged by the second of two steps (the first pays for warming up)."""
    schedule = parts.schedule
    seconds = ends[1] - ends[0]
    speed = schedule.batch_size / seconds
    training = seconds * schedule.total_steps
    parameters = sum(p.numel() for p in parts.model.encoder.parameters())
    lines = [
        "",
        f"images       {parts.source.describe()}",
        f"model        {parts.config.model.name}, {parameters / 1e6:.1f}M parameters, "
        f"{parts.model.encoder.grid[0]}x{parts.model.encoder.grid[1]} patches",
        f"device       {_device_name(parts)}, {parts.precision}, {parts.world.size} process(es)",
        f"batch        {schedule.batch_size} = {parts.world.size} x {schedule.accumulate} x {parts.micro_batch}",
        f"memory       {_peak_memory(parts)}",
        f"speed        {speed:,.1f} images/s ({seconds:.2f} s/step)",
        f"full run     {schedule.total_steps:,} steps, {schedule.total_steps * schedule.batch_size:,} images, "
        f"{_duration(training)}",
    ]
    if parts.fewshot is not None:
        period = watch.fewshot_period
        times = 1 + (math.ceil(schedule.total_steps / period) if period else 1)  # before the first step, too
        cost = times * watch.evaluation_seconds
        share = cost / (cost + training)
        lines.append(f"few-shot     {watch.evaluation_seconds:.1f} s each, {times} times: {share:.1%} of the run")
    lines.append("dry run: nothing was written")
    return "\n".join(lines)


def _device_name(parts: Run) -> str:
    return torch.cuda.get_device_name() if parts.device.type == "cuda" else str(parts.device)


def _peak_memory(parts: Run) -> str:
    if parts.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB peak on the device"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB peak of this process"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
