"""The plan as it is printed."""

import functools
import re
from pathlib import Path

import pytest
from bench import bench
from benchmarks.cost import memory, shape
from benchmarks.cost.flops import total
from benchmarks.plan import SCALE, plan_of
from benchmarks.settings import PLAN_ALIASES, PlanBench

from mpp.config import parse
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig
from tests.runs import ROOT

ISSUE = "--model vit_large_patch16_224 --images 1.3M --epochs 320 --device h200 --devices 8"


def read(words: str) -> PlanBench:
    return parse(PlanBench, words.split(), "bench plan", "", PLAN_ALIASES)


@pytest.fixture(autouse=True, scope="module")
def built_once():
    """Plans of one model build it once."""
    built = functools.cache(
        lambda model, objective: build_model(PretrainConfig(model=model, objective=objective), "meta")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "build_model", lambda config, device: built(config.model, config.objective))
        yield


def test_the_figures_are_those_of_the_formulas() -> None:
    plan = plan_of(read(f"{ISSUE} --batch-size 4096"))
    assert plan.steps == round(320 * 1.3e6 / 4096)
    step = plan.step
    assert (step.setup.precision, step.setup.micro_batch, step.setup.accumulate) == ("bf16", 256, 2)
    assert step.computing == pytest.approx(512 * total(step.parts) / (0.4 * 989.4e12))
    assert plan.device_hours == pytest.approx(8 * plan.steps * step.seconds / 3600)
    assert tuple(plan.scale) == SCALE
    assert plan.scale[8] == step
    lines = str(plan).splitlines()
    assert lines[0].startswith("vit_large_patch16_224, 224 x 224 pixels: 303,827,456 parameters, 197 tokens, 98 of 196")
    held = memory.total(step.memory) / 1e9
    assert any(re.match(rf"  in all +{held:.3f} ", line) for line in lines)
    for name in ("patch embedding", "attention", "MLP", "head", "weights", "optimiser", "activations", "temporaries"):
        assert any(line.startswith(f"  {name} ") for line in lines), name
    assert f"{plan.device_hours:,.1f} device-hours" in str(plan)
    assert "assumptions:" in lines
    assert max(map(len, lines)) <= 120


@pytest.mark.slow
def test_settings_of_the_run_change_it() -> None:
    plain = plan_of(read(ISSUE))
    assert plan_of(read(f"{ISSUE} --grad-checkpointing")).device_hours > 1.2 * plain.device_hours
    assert plan_of(read(f"{ISSUE} --precision fp32")).device_hours > 10 * plain.device_hours
    assert plan_of(read(f"{ISSUE} --ema 0.99")).checkpoint_bytes == plain.checkpoint_bytes * 4 // 3
    assert plan_of(read(f"{ISSUE} --parallel fsdp")).step.memory["weights"] < plain.step.memory["weights"] / 7
    assert plan_of(read(f"{ISSUE} --img-size 384")).shape.tokens == 577
    assert plan_of(read(f"{ISSUE} --images-per-second 1000")).step.computing == 1024 / 8 / 1000
    assert "1,000, 1,000 a device" in str(plan_of(read("--images-per-second 1000")))
    assert plan_of(read(f"{ISSUE} --data folder:/x")).step == plain.step
    # One at the start, 19 a twentieth of the run (1,016 steps) apart, and one after the last of 20,312 steps.
    assert plain.checkpoints == 21
    assert plan_of(parse(PlanBench, ["--checkpoint.every", "0 steps"], "", "", PLAN_ALIASES)).checkpoints == 2


def test_a_config_of_the_pretraining_is_planned() -> None:
    plan = plan_of(read(f"--config {ROOT}/configs/pretrain/in1k_b16.yaml --devices 8 --device a100-40"))
    assert (plan.steps, plan.step.images, plan.step.setup.optimiser) == (100_000, 4096, "adam")
    assert plan.shape.parameters == 86_193_152


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_has_a_plan(config: Path) -> None:
    assert str(plan_of(read(f"--config {config} --device h200")))


def test_a_batch_too_large_is_divided_and_said() -> None:
    plan = plan_of(read("--model vit_large_patch16_224 --device rtx4090"))
    assert plan.step.setup.micro_batch <= plan.step.largest < 256
    assert "train.micro_batch 256 does not fit; planned with 64" in str(plan)


def test_numbers_have_no_exponents() -> None:
    assert "2,000 epochs" in str(plan_of(read(ISSUE.replace("320", "2000"))))
    slow, short = plan_of(read("--model vit_large_patch16_224 --device cpu --epochs 300")), read("--epochs 0.00001")
    assert (plan_of(short).steps, plan_of(short).checkpoints) == (1, 2)
    for text in map(str, (slow, plan_of(short), plan_of(read(f"{ISSUE} --image-kib 1e7")))):
        assert not re.search(r"\de[+-]\d", text)
    assert re.search(r"the run +\d+,\d+ d,", str(slow))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["plan", "--model.name", "vit_tiny_patch16_224", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "vit_tiny_patch16_224, 224 x 224 pixels" in out
    assert err == ""
