"""What a finished run and a dry run print."""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpp.downstream.rankme import ranks
from mpp.downstream.verdict import Verdict, of_pretraining
from mpp.pretraining.build import PretrainingRun
from mpp.pretraining.monitor import Monitor
from mpp.training.duration import in_words
from mpp.training.rows import Row, evaluation_seconds, last_part, read_rows, training_spans


def verdict_of(rows: Sequence[Row], starts: Sequence[Mapping[str, Any]], score: str, init: str = "") -> Verdict:
    """What a run's figures mean, by its rows and its starts, whose facts name its images and a warning on its targets.

    `score` and `init` as in `summary`.
    """
    facts = next((start for start in starts if start.get("data")), {})
    images = (facts.get("data") or {}).get("images")
    return of_pretraining(rows, score, images=images, init=init, warning=facts.get("warning") or "")


def summary(
    folder: Path,
    score: str,
    verdict: Verdict,
    notes: Sequence[str] = (),
    init: str = "",
    warnings: Sequence[str] = (),
) -> str:
    """The text that a finished run ends with, from the rows in its folder.

    Args:
        score: accuracy or mse.
        init: the weights that it went on from, if any.
        warnings: why it cannot have learnt.
    """
    rows = read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if score in row]
    evaluated = [row for row in rows if any(name.startswith("fewshot/") for name in row)]
    last, span = last_part(trained, score)
    form, better = ("7.1%", "higher") if score == "accuracy" else ("7.4f", "lower")
    lines = [
        "",
        f"Finished: {rows[-1]['step']:,} steps, {rows[-1]['images']:,} images.",
        "",
        f"Prediction of corrupted patches, {score} ({better} is better), mean over the last {span} steps:",
        f"  {last[f'{score}_masked']:{form}}  the model, at masked patches" if f"{score}_masked" in last else "",
        f"  {last[score]:{form}}  the model, at all corrupted patches",
        f"  {last[f'{score}_baseline_neighbours']:{form}}  trivial: the colour of the nearest visible patches",
        f"  {last[f'{score}_baseline_frequent']:{form}}  trivial: always the most frequent colour",
        "",
    ]
    if len(evaluated) > 1 and evaluated[0]["step"] == 0:
        first, final = evaluated[0], evaluated[-1]
        several = any(name.endswith("_std") and spread for name, spread in final.items())
        drawn = "mean ± standard deviation over the draws of the shots" if several else "one draw of the shots"
        lines.append(f"Few-shot accuracy on frozen features ({drawn}):")
        lines.append(f"  {'shots':>8}  {'its init' if init else 'random init':>15}  {'pretrained':>15}")
        for name in (n for n in final if n in first and n.startswith("fewshot/") and n.endswith("shot")):
            shots, cells = name.removeprefix("fewshot/").removesuffix("shot"), []
            for row in (first, final):
                spread = row.get(f"{name}_std")  # 0 for a single draw in older runs
                cells.append(f"{row[name]:.1%} ± {spread:.1%}" if spread else f"{row[name]:.1%}")
            lines.append(f"  {shots:>8}  " + "  ".join(f"{cell:>15}" for cell in cells))
        lines += [f"  evaluated {len(evaluated)} times, in {_share(rows, 'fewshot'):.1%} of the time", ""]
    if found := ranks(rows):
        (first, _), (final, largest) = found[0], found[-1]
        lines += [
            f"Effective rank of the features (low: collapsed; high alone means nothing): {first:.1f} at first, "
            f"{final:.1f} at last, of {largest:,}",
            f"  measured {len(found)} times, in {_share(rows, 'rank'):.1%} of the time",
            "",
        ]
    lines += [f"WARNING: {warning}" for warning in warnings]
    lines += verdict.lines()
    lines += [f"note: {note}" for note in notes] + [""] * bool(notes)
    lines.append(f"pictures     {folder / 'pictures'}")
    if (folder / "tensorboard").is_dir():
        lines.append(f"curves       tensorboard --logdir {folder}")
    lines.append(f'model        timm.create_model("local-dir:{folder / "model"}", pretrained=True)')
    return "\n".join(lines)


def _share(rows: Sequence[Row], kind: str) -> float:
    """The share of one kind of evaluation in the run's time."""
    return evaluation_seconds(rows, [kind]) / (
        evaluation_seconds(rows) + sum(seconds for _, seconds in training_spans(rows))
    )


def dry_run_report(run: PretrainingRun, seconds: float, before: float, monitor: Monitor) -> str:
    """What the full run would take, from the seconds of one step, of reading all images `before` the first, if it does,
    and of the evaluation that `monitor` made."""
    schedule, cuda, (rows, columns) = run.schedule, run.device.type == "cuda", run.model.encoder.grid
    training = seconds * schedule.total_steps
    parameters = sum(p.numel() for p in run.model.encoder.parameters())
    if cuda:
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB peak on the device"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB peak of this process"
    device = torch.cuda.get_device_name() if cuda else str(run.device)
    lines = [
        "",
        f"images       {run.source.describe()}",
        f"model        {run.config.model.name}, {parameters / 1e6:.1f} M parameters in its encoder, "
        f"{rows} x {columns} patches",
        f"device       {device}, {run.precision}, {run.world.size} process(es)",
        f"batch        {schedule.batch_size} = {run.world.size} x {schedule.accumulate} x {run.micro_batch}",
        f"memory       {memory}",
        f"speed        {schedule.batch_size / seconds:,.1f} images/s ({seconds:.2f} s/step)",
        f"full run     {schedule.total_steps:,} steps, {schedule.total_steps * schedule.batch_size:,} images, "
        f"{in_words(training)}",
    ]
    if before:
        lines.append(f"before it    {in_words(before)} to see every image whole once, for objective.words")
    if monitor.evaluates:
        period = monitor.evaluation_period
        times = 1 + (math.ceil(schedule.total_steps / period) if period else 1)  # one before the first step
        cost = times * monitor.evaluation_seconds
        share = cost / (cost + training)
        lines.append(f"evaluation   {monitor.evaluation_seconds:.1f} s each, {times} times: {share:.1%} of the run")
    lines.append("dry run: nothing was written")
    return "\n".join(lines)
