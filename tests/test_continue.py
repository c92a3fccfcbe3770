"""Going on with masked patch prediction from weights that are there already, by the real command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpp.cli import pretrain
from mpp.config import from_file, overridden
from mpp.data.settings import DataConfig
from mpp.downstream.evaluate import fewshot_results
from mpp.downstream.feature_cache import weights_hash
from mpp.downstream.settings import FewshotRecipe, FrozenConfig
from mpp.model.settings import ModelConfig
from mpp.pretraining.restore import first_weights, restored, weights_or_checkpoint
from mpp.pretraining.settings import PretrainConfig
from mpp.report.provenance import making_section
from mpp.report.run_record import read_run
from mpp.training.checkpoint import Checkpoints
from mpp.training.rows import read_rows
from mpp.weights.base import build
from mpp.weights.continued import build_continued, complete_configs, load_encoder
from mpp.weights.opening import open_weights
from tests import runs
from tests.weights.models import dinov2_names, timm_model

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)


def words(source: str, run_dir: Path, init: Path | str, *flags: str, **changed: str) -> list[str]:
    changed = {"init": str(init), "train__length": "12 steps", "checkpoint__every": "5 steps"} | changed
    return runs.command(source, run_dir, *flags, **changed)[1:]


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's model, as timm itself writes them, head and all."""
    torch.manual_seed(5)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    args |= {"mlp_ratio": 3.0, "init_values": 0.1}
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    folder = tmp_path_factory.mktemp("continued") / "timm"
    timm.models.save_for_hf(model, str(folder), {}, model_args=args, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def run_dir(source: str, init: Path) -> Path:
    """A run of 12 steps from a timm folder."""
    assert pretrain(words(source, init.parent / "run", init)) == 0
    return init.parent / "run"


@pytest.fixture(scope="module")
def original(init: Path) -> Any:
    return timm.create_model(f"local-dir:{init}", pretrained=True).eval()


def test_it_begins_with_the_weights_and_moves_them(run_dir: Path, original: Any) -> None:
    first = load_file(run_dir / "init" / "model.safetensors")
    theirs = {name: value for name, value in original.state_dict().items() if not name.startswith("head.")}
    runs.assert_same(dict(sorted(first.items())), dict(sorted(theirs.items())))
    last: Any = timm.create_model(f"local-dir:{run_dir / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        moved = (last.forward_features(images) - original.forward_features(images)).abs().max()
    assert moved > 1e-2
    assert set(theirs) == set(last.state_dict())


def test_its_checkpoints_and_what_it_began_with_open(run_dir: Path, original: Any) -> None:
    checkpoint = Checkpoints(run_dir / "checkpoints").latest()
    assert checkpoint is not None
    _, model = restored(checkpoint)
    images, first = torch.randn(2, 3, 32, 32), first_weights(run_dir)
    assert sorted(from_file(PretrainConfig, run_dir / "config.yaml").init_args) == ["init_values=0.1", "mlp_ratio=3.0"]
    assert (first.mean, first.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    with torch.no_grad():
        torch.testing.assert_close(build(first).eval()(images), original.forward_features(images)[:, 1:].mean(dim=1))
        pooled = model.encoder.eval()(images)[:, 1:].mean(dim=1)
        for spec in (run_dir, checkpoint):
            torch.testing.assert_close(build(weights_or_checkpoint(str(spec))).eval()(images), pooled)


def test_few_shot_before_the_first_step_is_that_of_the_weights(run_dir: Path, init: Path, source: str) -> None:
    row = read_rows(run_dir / "metrics.jsonl")[0]
    frozen = FrozenConfig(device="cpu", precision="fp32", workers=0, cache=False)
    recipe = FewshotRecipe((str(init),), source, pool=("mean",), shots=(1,), seeds=(0,), encoder=frozen)
    (result,) = fewshot_results(recipe).values()
    assert row["step"] == 0
    assert row["fewshot/1shot"] == result.figures()["fewshot/1shot"]


def test_where_it_came_from_is_written_down(run_dir: Path, init: Path) -> None:
    (start,) = json.loads((run_dir / "environment.json").read_text())
    state = load_file(init / "model.safetensors")
    assert start["init"] == f"{init} (SHA-256 of its weights {weights_hash(state)})"
    assert start["init"] in str(making_section(read_run(run_dir)))


@pytest.mark.slow
def test_killed_and_resumed_without_the_weights_it_is_the_same(
    run_dir: Path, init: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = words(source, tmp_path / "run", tmp_path / "timm")
    # What a kill after step 9 leaves behind, of a run of the same weights, which are gone.
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    for step in (10, 12):
        (tmp_path / "run" / "checkpoints" / f"step_{step:09d}.pt").unlink()
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(init), str(tmp_path / "timm")))
    assert pretrain(told) == 0
    assert "at step 5 of 12" in capsys.readouterr().err
    runs.assert_same_run(tmp_path / "run", run_dir)
    ours, theirs = (from_file(PretrainConfig, run / "config.yaml") for run in (tmp_path / "run", run_dir))
    assert overridden(ours, ["--init", theirs.init, "--run-dir", theirs.run_dir]) == theirs


def test_the_init_may_be_spelt_otherwise(
    run_dir: Path, init: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(words(source, run_dir, f"{init.parent}/./{init.name}/")) == 0
    assert "is finished" in capsys.readouterr().err


def test_registers_go_through_a_step_unharmed(source: str, tmp_path: Path) -> None:
    size = {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    model = timm_model(**size, reg_tokens=4, no_embed_class=True, init_values=1e-5)
    torch.save(dinov2_names(model), tmp_path / "dinov2.pth")
    rate = {"optim__lr": "1e-9", "optim__ema_decay": "0", "schedule__warmup": "0 steps", "train__length": "1 step"}
    assert pretrain(words(source, tmp_path / "run", tmp_path / "dinov2.pth", log__every="1 step", **rate)) == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images), model.forward_features(images)
        for folder in ("init", "model"):  # before the step and after it
            opened: Any = timm.create_model(f"local-dir:{tmp_path / 'run' / folder}", pretrained=True).eval()
            assert opened.num_prefix_tokens == 5
            found = opened.forward_features(images)
            torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-5)
            torch.testing.assert_close(opened(images), found[:, 5:].mean(dim=1))  # of 16 patches
    (row,) = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert row["lr"] == 1e-9
    assert row["grad_norm"] > 0


# TMP holds the weights, timm, and the run that began with them; new/ is not there.
WRONG: dict[str, tuple[str, dict[str, str], str]] = {
    "others": ("TMP/run", {"init": "vit_tiny_patch16_224"}, "TMP/run began with --init TMP/timm, not --init vit_tiny"),
    "a run of another depth": (
        "TMP/run",
        {"model__depth": "3"},
        "model.depth 3 contradicts --init TMP/timm, which has",
    ),
    "written over": ("TMP/timm", {}, "is what --init names; choose another folder to write to"),
    "its model written over": ("TMP/timm", {"init": "TMP/timm/model"}, "is what --init names; choose another folder"),
    "another depth": ("TMP/new", {"model__depth": "3"}, "model.depth 3 contradicts --init TMP/timm, which has 2"),
    "a mean of two": ("TMP/new", {"data__mean": "0.1,0.2"}, "data.mean takes one number or 3"),
    "nothing there": ("TMP/new", {"init": "TMP/nowhere"}, "--init TMP/nowhere: there is no such file or folder"),
    "no weights": ("TMP/new", {"init": "random:TMP/timm"}, "has no weights to go on from; leave it out for new ones"),
    "arguments alone": ("TMP/new", {"init": "", "init_args": "depth=2"}, "init_args is filled in from"),
    "other arguments": ("TMP/new", {"init_args": "mlp_ratio=2.0"}, "filled in from --init TMP/timm; leave it out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str, run_dir: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, changed, reason = WRONG[case]
    changed = {"init": "TMP/timm"} | changed
    told = words(source, Path(folder), changed.pop("init"), "--resume", "force", **changed)
    assert pretrain([word.replace("TMP", str(run_dir.parent)) for word in told]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pretrain: error: ")
    assert reason.replace("TMP", str(run_dir.parent)) in line
    assert not (run_dir.parent / "new").exists()


def test_a_dry_run_tells_and_writes_nothing(
    init: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(words(source, tmp_path / "run", init, "--dry-run", model__img_size="48")) == 0
    assert "vit_tiny_patch16_224, 0.1 M parameters in its encoder, 6 x 6 patches" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_hybrid_at_another_size_on_a_gpu() -> None:
    weights = open_weights("random:timm:vit_tiny_r_s16_p8_224")
    weights = replace(weights, image_hw=(64, 64), args={"mlp_ratio": 2.0, "depth": 1})
    weights = replace(weights, state=build(weights, classes=()).state_dict())
    model, _, init_args = complete_configs("there", weights, ModelConfig(img_size=(96,)), DataConfig())
    encoder = build_continued(model, init_args, "cuda").eval()
    load_encoder(encoder, weights)
    images = torch.randn(2, 3, 96, 96)
    original: Any = build(weights, classes=(), image_hw=(96, 96)).eval()
    with torch.no_grad():
        found = encoder(images.cuda()).cpu()
        torch.testing.assert_close(found, original.forward_features(images), rtol=0, atol=2e-3)
