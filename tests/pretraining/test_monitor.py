"""What a run prints and shows, from rows and sizes written by hand."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.data.transform import EvalTransform
from mpp.dist import World
from mpp.downstream.features import pool
from mpp.downstream.rankme import LARGEST, RANK, rankme
from mpp.downstream.verdict import Verdict
from mpp.pretraining.build import PretrainingRun, build
from mpp.pretraining.monitor import Monitor
from mpp.pretraining.recipe import diagnose
from mpp.pretraining.step import training_step
from mpp.pretraining.summary import dry_run_report, summary
from mpp.training.checkpoint import Checkpoints
from mpp.training.loop import NonFinite
from tests import runs


def built(source: str, **changed: str) -> PretrainingRun:
    return build(runs.pretrain_config(source, **changed), World(), torch.device("cpu"))


def write_rows(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(step: int, score: str, **figures: float) -> dict[str, Any]:
    """A row of training; the keys of `figures` follow the score's name."""
    named = {f"{score}{name}": value for name, value in figures.items()}
    return {"step": step, "images": 64 * step, "loss": 3.0, "time/images_per_second": 64.0} | named


def fewshot(step: int, *figures: float) -> dict[str, Any]:
    names = ("fewshot/1shot", "fewshot/1shot_std", "fewshot/5shot", "fewshot/5shot_std")
    return {"step": step, "images": 64 * step, **dict(zip(names, figures, strict=True)), "time/fewshot_seconds": 2.0}


VERDICT = Verdict(("It has learnt much.",))
BASELINES = {"_baseline_frequent": 0.21, "_baseline_neighbours": 0.314}


def test_summary_sets_the_model_beside_the_baselines_and_the_random_encoder(tmp_path: Path) -> None:
    write_rows(
        tmp_path,
        fewshot(0, 0.125, 0.01, 0.25, 0.02) | {RANK: 14.14, LARGEST: 96, "time/rank_seconds": 0.5},
        trained(50, "accuracy", **{"": 0.1, "_masked": 0.09, "_baseline_frequent": 0.2, "_baseline_neighbours": 0.3}),
        fewshot(60, 0.3, 0.01, 0.3, 0.02),
        trained(90, "accuracy", **{"": 0.412, "_masked": 0.4, **BASELINES}),
        fewshot(90, 0.5, 0.034, 0.625, 0.041) | {RANK: 6.28, LARGEST: 96, "time/rank_seconds": 0.5},
    )
    (tmp_path / "tensorboard").mkdir()
    assert summary(tmp_path, "accuracy", VERDICT).splitlines() == [
        "",
        "Finished: 90 steps, 5,760 images.",
        "",
        "Prediction of corrupted patches, accuracy (higher is better), mean over the last 40 steps:",
        "    40.0%  the model, at masked patches",
        "    41.2%  the model, at all corrupted patches",
        "    31.4%  trivial: the colour of the nearest visible patches",
        "    21.0%  trivial: always the most frequent colour",
        "",
        "Few-shot accuracy on frozen features (mean ± standard deviation over the draws of the shots):",
        "     shots      random init       pretrained",
        "         1     12.5% ± 1.0%     50.0% ± 3.4%",
        "         5     25.0% ± 2.0%     62.5% ± 4.1%",
        "  evaluated 3 times, in 6.2% of the time",  # 6 s beside 90 and 1
        "",
        "Effective rank of the features (low: collapsed; high alone means nothing): 14.1 at first, 6.3 at last, of 96",
        "  measured 2 times, in 1.0% of the time",
        "",
        "What the figures mean:",
        "- It has learnt much.",
        "",
        f"pictures     {tmp_path / 'pictures'}",
        f"curves       tensorboard --logdir {tmp_path}",
        f'model        timm.create_model("local-dir:{tmp_path / "model"}", pretrained=True)',
    ]


def test_summary_of_pixels_and_of_a_run_that_masks_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path, trained(7, "mse", **{"": 0.01234, "_masked": 0.02, **BASELINES}))
    lines = summary(tmp_path, "mse", VERDICT).splitlines()
    assert lines[3:6] == [
        "Prediction of corrupted patches, mse (lower is better), mean over the last 7 steps:",
        "   0.0200  the model, at masked patches",
        "   0.0123  the model, at all corrupted patches",
    ]
    assert not any("Few-shot" in line for line in lines)
    write_rows(tmp_path, trained(7, "accuracy", **{"": 0.5, **BASELINES}))
    text = summary(tmp_path, "accuracy", VERDICT)
    assert "at masked patches" not in text
    assert "  50.0%  the model, at all corrupted patches" in text


def report(run: PretrainingRun, seconds: float, evaluation: float = 1.0) -> str:
    monitor = Monitor(run, dry=True)
    monitor.evaluation_seconds = evaluation
    return dry_run_report(run, seconds, 0.0, monitor)


def test_a_dry_run_reports_the_cost_of_the_run(source: str) -> None:
    run = built(source, train__micro_batch="4", fewshot__every="20 steps")
    # 16 images in half a second, so 60 steps in 30 seconds, beside 4 evaluations: at 0, 20, 40 and 60.
    lines = dict(line.split(None, 1) for line in report(run, 0.5, 2.5).splitlines() if line)
    millions = sum(parameter.numel() for parameter in run.model.encoder.parameters()) / 1e6
    memory = lines.pop("memory")
    assert lines == {
        "images": "40 images in 4 classes",
        "model": f"vit_tiny_patch16_224, {millions:.1f} M parameters in its encoder, 4 x 4 patches",
        "device": f"cpu, {run.precision}, 1 process(es)",
        "batch": "16 = 1 x 4 x 4",
        "speed": "32.0 images/s (0.50 s/step)",
        "full": "run     60 steps, 960 images, 30 s",
        "evaluation": "2.5 s each, 4 times: 25.0% of the run",
        "dry": "run: nothing was written",
    }
    assert memory.endswith("GiB peak of this process")
    assert 0.05 < float(memory.split()[0]) < 64
    # Evaluations after step 0 are due at the multiples of the period and at the end; an epoch is of 40 images.
    for every, times in (("25 steps", 4), ("60 steps", 2), ("59 steps", 3), ("2 epochs", 13), ("auto", 2)):
        other = replace(run, config=replace(run.config, fewshot=replace(run.config.fewshot, every=every)))
        assert f"1.0 s each, {times} times:" in report(other, 1.0)
    for seconds, text in ((1.0, "60 s"), (2.5, "2 min"), (115.0, "115 min"), (121.0, "2.0 h"), (3600.0, "60.0 h")):
        log = replace(run.config.log, effective_rank=False)
        without = report(replace(run, fewshot=None, config=replace(run.config, log=log)), seconds)
        assert f"full run     60 steps, 960 images, {text}" in without
        assert "evaluation" not in without
    assert "evaluation   1.0 s each, 4 times" in report(replace(run, fewshot=None), 1.0)


@pytest.mark.parametrize("readable", [True, False])
def test_a_batch_that_was_not_finite_is_read_again_and_tried_in_fp32(
    readable: bool, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(source, train__precision="bf16", model__drop_path="0")
    monitor, rows = Monitor(run, dry=True), []
    monkeypatch.setattr(monitor.log, "row", lambda step, images, figures: rows.append((step, figures)))
    batches, step = run.batches(), training_step(run, "fp32")
    third = list(itertools.islice(batches, 3 * run.schedule.accumulate))[2 * run.schedule.accumulate :]
    batches.close()
    expected = sum(step(run.model, batch)[0].item() for batch in third) / run.schedule.accumulate
    run.state.images_seen = 3 * 16  # as on CUDA, which says so a step later
    if not readable:
        monkeypatch.setattr(run, "batches", lambda **_: (1 // zero for zero in [0]))
    text = diagnose(run, NonFinite(3), Checkpoints(tmp_path), monitor)
    ((at, event),) = rows
    assert (event["event"], event["precision"], at) == ("non_finite", "bf16", 3)
    if readable:
        assert float(event["fp32_loss"]) == pytest.approx(expected, rel=1e-5)
        assert f"step 3; in fp32 the same batch gives {expected:.4f}: try --train.precision fp32" in text
    else:
        assert "fp32_loss" not in event
        assert "step 3; try a lower --optim.lr, a longer" in text


def test_pictures_are_of_the_same_images_each_time(source: str) -> None:
    run = built(source)
    first, second = (Monitor(run, dry=True).pictured_images for _ in range(2))
    assert first.shape == (8, 3, 32, 32)
    assert torch.equal(first, second)
    assert len(np.unique(first.flatten(1).numpy(), axis=0)) == 8


def test_no_picture_where_none_of_its_images_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.write_folder(tmp_path / "images", *(f"{number}.png" for number in range(8)))
    for path in (tmp_path / "images").glob("*.png"):
        path.write_bytes(b"no picture")
    run = built(folder, fewshot__data="")
    Monitor(run, dry=True).picture(run.state)
    assert "no pictures: none of the 8 images drawn for them could be decoded" in "".join(capsys.readouterr())


def test_a_dry_run_is_not_warned_of_the_collapse_of_another(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"step": step, RANK: rank, LARGEST: 40} for step, rank in ((0, 20.0), (50, 1.1))]
    run = replace(built(source), fewshot=None)
    run.config = replace(run.config, run_dir=str(tmp_path))
    for dry in (False, True):
        monitor = Monitor(run, dry)
        monkeypatch.setattr(monitor.log, "row", lambda *_: None)
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monitor.evaluate(run.state)
        monitor.close()
        assert ("collapsed" in "".join(capsys.readouterr())) is not dry


def test_the_effective_rank_needs_no_labels_and_changes_nothing(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(built(source, optim__ema_decay="0"), fewshot=None)
    monitor, rows = Monitor(run, dry=True), []
    monkeypatch.setattr(monitor.log, "row", lambda step, images, figures: rows.append(figures))
    before, draws = {k: v.clone() for k, v in run.model.state_dict().items()}, torch.get_rng_state()
    monitor.initial()
    assert torch.equal(torch.get_rng_state(), draws)
    assert run.model.training
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    with np.load(source.removeprefix("array:")) as file, torch.no_grad():  # all 40, which are fewer than 2 x 48
        pixels = torch.stack([EvalTransform((32, 32))(image) for image in file["images"]])
        expected = rankme(pool(run.model.encoder.eval()(pixels / 127.5 - 1), 1, "mean").numpy())
    assert [(row[RANK], row[LARGEST]) for row in rows] == [(pytest.approx(expected, rel=1e-4), 40)]
    assert "time/rank_seconds" in rows[0]
