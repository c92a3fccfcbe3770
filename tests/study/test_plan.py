"""The pretrainings of a study, their lengths, and its fine-tuning runs, without training anything."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.config import overridden, to_yaml
from mpp.data.sources.in_memory import ListSource
from mpp.downstream.labelled import label
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.model.encoder import model_args
from mpp.model.settings import ModelConfig
from mpp.pretraining.settings import PretrainConfig
from mpp.study import equal_time
from mpp.study.equal_time import (
    EQUAL_TIME,
    EqualTime,
    equal_lengths,
    pretraining_step,
    scratch_step,
    step_time_ratios,
    survey_seconds,
)
from mpp.study.plan import FinetuneRun, Plan, finetune_runs, images_of, pretrainings
from mpp.study.settings import LONGER, StudyConfig
from mpp.training.settings import TrainConfig
from mpp.weights.base import Weights, build
from mpp.weights.timm_folder import write_timm_folder

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = PretrainConfig(
    model=ModelConfig(name="vit_tiny_patch16_224", img_size=(32,), patch_size=(8,), embed_dim=48, depth=1, num_heads=3),
    train=TrainConfig(length="100 steps", batch_size=16, micro_batch=8, device="cpu"),
)


def study(**settings: Any) -> StudyConfig:
    usual = {"run_dir": "runs/s", "data": "demo", "pretrain": TINY, "arms": ("a", "b: --train.batch_size 32")}
    return StudyConfig(**{**usual, **settings})


def labelled(images: int):
    """Labelled images that are one pixel each."""
    pixels, labels = np.zeros((images, 1, 1, 3), np.uint8), np.arange(images) % 4
    return label(ListSource(pixels, labels), ListSource(pixels[:4], labels[:4]))


def planned(config: StudyConfig, images: int = 160) -> Plan:
    of = labelled(images)
    return Plan(config, of, pretrainings(config), finetune_runs(config, of, 1600))


def test_every_arm_is_pretrained_with_every_seed() -> None:
    runs = pretrainings(study(pretrain_seeds=(0, 3)), EqualTime({"a": {"images": 7}, "b": {"images": 640}}))
    assert [(run.arm.name, run.config.train.seed, run.config.run_dir) for run in runs] == [
        (arm, seed, f"runs/s/pretrain/{arm}/seed_{seed}") for seed in (0, 3) for arm in "ab"
    ]
    # The first arm keeps its own length; that of the others is of equal time.
    assert [run.config.train.length for run in runs] == ["100 steps", "640 images"] * 2
    assert [run.config.train.batch_size for run in runs] == [16, 32] * 2
    assert all(run.config.data.source == "demo" for run in runs)
    assert images_of(runs[0].config) == 1600
    # An arm with a length of its own keeps that, too.
    config = study(arms=("a: --train.length '50 steps'", "b", "c: --train.length '900 images'"))
    runs = pretrainings(config, EqualTime({name: {"images": 640} for name in "abc"}))
    assert [run.config.train.length for run in runs] == ["50 steps", "640 images", "900 images"]


def test_a_pretraining_whose_encoder_was_chosen_is_finished(tmp_path: Path) -> None:
    auto = replace(TINY, model=replace(TINY.model, name="auto", img_size="auto", patch_size=()))
    run = pretrainings(study(pretrain=auto, run_dir=str(tmp_path)))[0]
    assert not run.finished
    (run.folder / "model").mkdir(parents=True)
    (run.folder / "model" / "config.json").touch()
    chosen = replace(
        run.config, model=replace(auto.model, name="vit_tiny_patch16_224", img_size=(96,), patch_size=(8,))
    )
    (run.folder / "config.yaml").write_text(to_yaml(chosen))
    assert run.finished
    (run.folder / "config.yaml").write_text(to_yaml(replace(chosen, model=replace(chosen.model, depth=2))))
    assert not run.finished


def test_sides_of_a_setting_stand_together_and_take_the_pretrainings_in_turn() -> None:
    config = study(labels=("50%", "100%"), lengths=("2 epochs", "3 steps"), longer=("50%",), pretrain_seeds=(5, 6))
    expected = []
    for labels, length in (("50%", "2 epochs"), ("100%", "3 steps")):
        for seed, start in ((0, 5), (1, 6), (2, 5)):
            expected.append(FinetuneRun("scratch", labels, length, seed, None))
            if labels == "50%":  # half of 160 images twice: in batches of 32, which auto takes, 5 steps
                expected.append(FinetuneRun(LONGER, labels, f"{160 + 1600} images", seed, None))
            expected += [FinetuneRun(arm, labels, length, seed, start) for arm in "ab"]
    assert planned(config).finetunings == expected
    # In equal time: as many images more as were measured.
    timed = finetune_runs(config, labelled(160), 1600, EqualTime(longer={"50%": {"images": 640}}))
    assert {run.length for run in timed if run.side == LONGER} == {"800 images"}


def test_the_share_that_chooses_the_rates_comes_first() -> None:
    plan = planned(study(labels=("50%", "100%"), longer=("50%",), tune_at=("100%",)))
    assert [(run.side, run.labels, run.seed) for run in plan.finetunings[:4]] == [
        *((side, "100%", 0) for side in ("scratch", "a", "b")),
        ("scratch", "50%", 0),
    ]
    sides = ("scratch", LONGER, "a", "b")
    assert {plan.rate_group(run) for run in plan.finetunings} == {(side, "100%") for side in sides}
    each = replace(plan, config=replace(plan.config, tune_at=("",)))  # as older studies have it
    assert len({each.rate_group(run) for run in plan.finetunings}) == 3 * 2 + 1


def test_a_share_takes_the_rate_of_the_next_larger_one_that_chooses() -> None:
    plan = planned(study(labels=("5%", "50%", "100%"), longer=("5%",), tune_at=("100%", "50%")))
    assert {run.labels for run in plan.finetunings[:6]} == {"50%", "100%"}
    taken = {(run.labels, plan.rate_group(run)[1]) for run in plan.finetunings}
    assert taken == {("5%", "50%"), ("50%", "50%"), ("100%", "100%")}
    smaller = replace(plan, config=replace(plan.config, tune_at=("5%", "50%")))
    assert smaller.rate_group(next(run for run in plan.finetunings if run.labels == "100%"))[1] == "50%"


def test_scratch_is_the_first_arm_s_encoder_and_has_no_layer_decay() -> None:
    config = study(download=True)
    tuning = overridden(config.finetune, ["--optim.lr", "1", "2", "--optim.layer-decay", "0.7"])
    plan = planned(replace(config, finetune=tuning))
    scratch = plan.finetune_config(FinetuneRun("scratch", "10%", "9 steps", 2, None))
    assert scratch.init == "random:runs/s/pretrain/a/seed_0"
    assert scratch.run_dir == "runs/s/finetune/scratch/labels_10/seed_2"
    assert (scratch.optim.lr, scratch.optim.layer_decay) == ((1.0, 2.0), 1.0)
    settled = replace(plan.config, finetune=overridden(tuning, ["--optim.lr", "auto"]))
    run = FinetuneRun("scratch", "10%", "9 steps", 2, None)
    assert replace(plan, config=settled).finetune_config(run, 2.0).optim.lr == ("auto",)  # of the share's own size
    tuned = plan.finetune_config(FinetuneRun("b", "10%", "9 steps", 2, 0), 2.0)
    assert (tuned.init, tuned.optim.lr, tuned.optim.layer_decay) == ("runs/s/pretrain/b/seed_0", (2.0,), 0.7)
    assert (tuned.train.seed, tuned.data.labels_seed, tuned.data.labels, tuned.train.length) == (2, 2, "10%", "9 steps")
    assert all(each.data.download for each in (tuned, *(run.config for run in plan.pretrainings)))
    names = {"1%": "1", "0.1": "10", "100%": "100", "0.07": "7", "0.5%": "0.5", "1": "100"}  # shares in percent
    for share, name in names.items():
        folder = Path(plan.finetune_config(FinetuneRun("a", share, "9 steps", 0, 0)).run_dir)
        assert folder.parent.name == f"labels_{name}"


def test_equal_lengths_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def ratios(makers: list[Any]) -> tuple[float, list[tuple[float, int]]]:
        measured.append(len(makers))
        return 0.01, [(ratio, 16)] * (len(makers) - 1)

    monkeypatch.setattr(equal_time, "step_time_ratios", ratios)
    arms, ratio = study(arms=("a", "b: --train.batch_size 32", "c")).parsed_arms(), 0.5
    found = equal_lengths(tmp_path, arms[:2], 1600).arms
    assert found == {
        "a": {"ratio": 1.0, "images": 1600, "flags": ""},
        "b": {"ratio": 0.5, "images": 3200, "flags": "--train.batch_size 32"},
    }
    assert json.loads((tmp_path / EQUAL_TIME).read_text()) == {"arms": found, "longer": {}}
    ratio = 3.0
    later = {**found, "c": {"ratio": 3.0, "images": 528, "flags": ""}}  # 533 images in whole steps of 16
    assert equal_lengths(tmp_path, arms, 1600).arms == later  # an arm more: it alone is measured beside the first
    assert equal_lengths(tmp_path, arms, 1600).arms == later
    assert measured == [2, 2]
    with pytest.raises(UserError, match="another first arm"):
        equal_lengths(tmp_path, arms[1:], 1600)
    with pytest.raises(UserError, match="of other flags"):
        equal_lengths(tmp_path, study(arms=("a: --train.seed 0", "c")).parsed_arms(), 1600)
    # Training from scratch is measured beside them, each share of the labels once.
    ratio, scratch = 2.0, {share: pretraining_step(TINY) for share in ("1%", "10%")}
    longer = {"1%": {"ratio": 2.0, "images": 800}}
    assert equal_lengths(tmp_path, arms, 1600, {"1%": scratch["1%"]}) == EqualTime(later, longer)
    ratio = 4.0
    longer |= {"10%": {"ratio": 4.0, "images": 400}}
    for _ in range(2):
        assert equal_lengths(tmp_path, arms, 1600, scratch) == EqualTime(later, longer)
    assert measured == [2, 2, 2, 2]
    # An arm with other flags makes another step.
    ratio = 3.0
    again = equal_lengths(tmp_path, study(arms=("a", "b: --objective.bits 4", "c")).parsed_arms(), 1600)
    assert again == EqualTime({**later, "b": {"ratio": 3.0, "images": 528, "flags": "--objective.bits 4"}}, longer)
    older = {"a": {"ratio": 1.0, "images": 1600}, "b": {"ratio": 0.5, "images": 3200}}  # which lacks the flags
    (tmp_path / EQUAL_TIME).write_text(json.dumps({"arms": older}))
    assert equal_lengths(tmp_path, study().parsed_arms(), 1600) == EqualTime(older)


def test_reading_all_images_first_takes_from_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_time, "step_time_ratios", lambda makers: (0.01, [(2.0, 16)] * (len(makers) - 1)))
    monkeypatch.setattr(equal_time, "survey_seconds", lambda config: 3.2 if config.objective.words else 0.0)
    arms = study(arms=("a: --objective.words 4", "b", "c: --objective.words 4")).parsed_arms()
    for _ in range(2):  # measured, then read
        found = equal_lengths(tmp_path, arms, 1600, {"1%": pretraining_step(TINY)})
        # 3.2 s are 320 images of the first arm, at 0.01 s each.
        assert {name: (of["images"], of.get("survey")) for name, of in found.arms.items()} == {
            "a": (1600, 320),
            "b": ((1600 + 320) / 2, None),
            "c": (1600 / 2, 320),
        }
        assert found.longer["1%"]["images"] == (1600 + 320) / 2
    # One arm more, beside what the first one took.
    monkeypatch.setattr(equal_time, "survey_seconds", lambda config: 6.4 if config.objective.words else 0.0)
    more = (*arms, *study(arms=("d: --objective.words 4",)).parsed_arms())
    assert equal_lengths(tmp_path, more, 1600).arms["d"]["images"] == (1600 + 320 - 640) / 2


def test_reading_all_images_is_timed_where_the_objective_asks_for_it(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), np.uint8))
    config = replace(TINY, data=replace(TINY.data, source=f"array:{tmp_path / 'images.npy'}"))
    assert survey_seconds(config) == 0
    assert 0 < survey_seconds(replace(config, objective=replace(config.objective, words=4.0))) < 60


@pytest.mark.parametrize(
    "text", ["x", "[1]", "3", '{"arms": 3}', '{"arms": {"a": 3}}', '{"longer": {"1%": {"images": 0}}}', '{"b": {}}']
)
def test_lengths_that_cannot_be_read_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / EQUAL_TIME).write_text(text)
    with pytest.raises(UserError, match="delete it to measure again"):
        equal_lengths(tmp_path, study().parsed_arms(), 1600)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_time, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(equal_time, "_ROUNDS", 3)


@pytest.mark.usefixtures("short")
def test_equal_time_of_weights_that_are_gone_on_from(tmp_path: Path) -> None:
    size = {"patch_size": [8, 8], "embed_dim": 48, "num_heads": 3, "depth": 1}
    weights = Weights("vit_tiny_patch16_224", size, None, (32, 32))
    write_timm_folder(replace(weights, state=build(weights).state_dict()), tmp_path)
    config = PretrainConfig(init=str(tmp_path), train=TINY.train)  # the weights say the rest
    assert [size for _, size in step_time_ratios([pretraining_step(config)] * 2)[1]] == [16]


@pytest.mark.usefixtures("short")
def test_scratch_is_timed_by_its_own_step() -> None:
    plan = planned(study(finetune=replace(FinetuneConfig(), train=TrainConfig(batch_size=32, device="cpu"))))
    encoder = Weights("vit_tiny_patch16_224", model_args(TINY.model), None, (32, 32))
    config = plan.finetune_config(plan.finetunings[0], 1e-3)
    run, make_update = scratch_step(config, plan.labelled, encoder)()
    before = run.model.head.weight.detach().clone()
    make_update()
    assert run.state.images_seen == run.schedule.batch_size == 32
    assert not torch.equal(run.model.head.weight, before)
    seconds, ((ratio, size),) = step_time_ratios([pretraining_step(TINY), lambda: (run, make_update)])
    assert (0 < seconds < 1, ratio > 0, size) == (True, True, 32)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_a_deeper_encoder_takes_longer(device: str) -> None:
    shallow = replace(TINY, train=replace(TINY.train, device=device, compile="off"))
    deep = replace(TINY.model, depth=24)
    _, ((same, _), (more, _)) = step_time_ratios(
        [pretraining_step(config) for config in (shallow, shallow, replace(shallow, model=deep))]
    )
    assert more > 1.5 * same
