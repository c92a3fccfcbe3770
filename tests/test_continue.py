"""Going on with masked patch prediction from weights that are there already, by the real command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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
from mpp.pretraining.build import build_model
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

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)


def write_timm(folder: Path, name: str = "vit_tiny_patch16_224", **args: Any) -> Path:
    """Random weights of timm's model, as timm itself writes them, head and all."""
    torch.manual_seed(5)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **args}
    model: Any = timm.create_model(name, num_classes=3, **args)
    shape = {"input_size": (args.get("in_chans", 3), 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    model.pretrained_cfg = {**model.pretrained_cfg, **shape}
    timm.models.save_for_hf(model, str(folder), {}, model_args=args, safe_serialization=True)
    return folder


def words(source: str, run_dir: Path, init: Path | str, *flags: str, **changed: str) -> list[str]:
    """The command line of a tiny run that goes on; settings of the model only where they are `changed`."""
    _, *given = runs.command(source, run_dir, *flags, init=str(init), train__precision="fp32", **changed)
    kept = {f"--{name.replace('__', '.')}" for name in changed} | {"--model.drop_path"}
    out: list[str] = []
    taken = True
    for word in given:
        if word.startswith("--"):
            taken = not word.startswith("--model.") or word in kept
        out += [word] * taken
    return out


class Continued(NamedTuple):
    source: str
    init: Path
    run_dir: Path


LENGTH = {"train__length": "12 steps", "checkpoint__every": "5 steps"}


@pytest.fixture(scope="module")
def continued(source: str, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    """A run of 12 steps from a timm folder."""
    folder = tmp_path_factory.mktemp("continued")
    init = write_timm(folder / "timm", mlp_ratio=3.0, init_values=0.1)
    assert pretrain(words(source, folder / "run", init, **LENGTH)) == 0
    return Continued(source, init, folder / "run")


def test_the_config_is_whole(continued: Continued) -> None:
    config = from_file(PretrainConfig, continued.run_dir / "config.yaml")
    told = config.model
    assert (told.name, told.img_size, told.patch_size) == ("vit_tiny_patch16_224", (32,), (8,))
    assert (told.embed_dim, told.depth, told.num_heads, told.drop_path) == (48, 2, 3, 0.1)
    assert (config.data.mean, config.data.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert sorted(config.init_args) == ["init_values=0.1", "mlp_ratio=3.0"]
    encoder = build_model(config, "cpu").encoder
    assert encoder.vit.blocks[0].mlp.fc1.out_features == 3 * 48
    assert encoder.vit.blocks[0].ls1.gamma.shape == (48,)


def test_it_begins_with_the_weights_and_moves_them(continued: Continued) -> None:
    original: Any = timm.create_model(f"local-dir:{continued.init}", pretrained=True).eval()
    first = load_file(continued.run_dir / "init" / "model.safetensors")
    theirs = {name: value for name, value in original.state_dict().items() if not name.startswith("head.")}
    runs.assert_same(dict(sorted(first.items())), dict(sorted(theirs.items())))
    last: Any = timm.create_model(f"local-dir:{continued.run_dir / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        moved = (last.forward_features(images) - original.forward_features(images)).abs().max()
    assert moved > 1e-2
    assert set(theirs) == set(last.state_dict())


def test_its_checkpoints_open_with_what_the_config_cannot_name(continued: Continued) -> None:
    checkpoint = Checkpoints(continued.run_dir / "checkpoints").latest()
    assert checkpoint is not None
    _, model = restored(checkpoint)
    images = torch.randn(2, 3, 32, 32)
    expected = build(weights_or_checkpoint(str(continued.run_dir))).eval()
    with torch.no_grad():
        pooled = model.encoder.eval()(images)[:, 1:].mean(dim=1)
        torch.testing.assert_close(expected(images), pooled)
        torch.testing.assert_close(build(weights_or_checkpoint(str(checkpoint))).eval()(images), pooled)


def test_what_it_began_with_can_be_looked_at(continued: Continued) -> None:
    first = first_weights(continued.run_dir)
    original: Any = timm.create_model(f"local-dir:{continued.init}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert (first.mean, first.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    with torch.no_grad():
        torch.testing.assert_close(build(first).eval()(images), original.forward_features(images)[:, 1:].mean(dim=1))


def test_few_shot_before_the_first_step_is_that_of_the_weights(continued: Continued) -> None:
    row = read_rows(continued.run_dir / "metrics.jsonl")[0]
    frozen = FrozenConfig(device="cpu", precision="fp32", workers=0, cache=False)
    recipe = FewshotRecipe(
        (str(continued.init),), continued.source, pool=("mean",), shots=(1,), seeds=(0,), encoder=frozen
    )
    (result,) = fewshot_results(recipe).values()
    assert row["step"] == 0
    assert row["fewshot/1shot"] == result.figures()["fewshot/1shot"]


def test_where_it_came_from_is_written_down(continued: Continued) -> None:
    state = load_file(continued.init / "model.safetensors")
    (start,) = json.loads((continued.run_dir / "environment.json").read_text())
    assert start["init"] == f"{continued.init} (SHA-256 of its weights {weights_hash(state)})"
    assert start["init"] in str(making_section(read_run(continued.run_dir)))


def test_killed_and_resumed_without_the_weights_it_is_the_same(
    continued: Continued, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = Path(shutil.copytree(continued.init, tmp_path / "timm"))
    told = words(continued.source, tmp_path / "run", init, **LENGTH)
    # What a kill after step 9 leaves behind, of the same run.
    shutil.copytree(continued.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    for step in (10, 12):
        (tmp_path / "run" / "checkpoints" / f"step_{step:09d}.pt").unlink()
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(continued.init), str(init)))
    shutil.rmtree(init)
    assert pretrain(told) == 0
    assert "at step 5 of 12" in capsys.readouterr().err
    runs.assert_same_run(tmp_path / "run", continued.run_dir)
    ours, theirs = (from_file(PretrainConfig, run / "config.yaml") for run in (tmp_path / "run", continued.run_dir))
    assert overridden(ours, ["--init", theirs.init, "--run-dir", theirs.run_dir]) == theirs


def refused(capsys: pytest.CaptureFixture[str], told: list[str]) -> str:
    assert pretrain(told) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pretrain: error: ")
    return line


def test_a_run_that_began_with_others_is_refused(continued: Continued, capsys: pytest.CaptureFixture[str]) -> None:
    told = words(continued.source, continued.run_dir, "vit_tiny_patch16_224", "--resume", "force", **LENGTH)
    line = refused(capsys, told)
    assert f"{continued.run_dir} began with --init {continued.init}, not --init vit_tiny_patch16_224" in line
    line = refused(capsys, words(continued.source, continued.run_dir, continued.init, model__depth="3", **LENGTH))
    assert f"model.depth 3 contradicts --init {continued.init}, which has 2; leave it out" in line


def test_the_init_may_be_spelt_otherwise(continued: Continued, capsys: pytest.CaptureFixture[str]) -> None:
    spelt = f"{Path(continued.init).parent}/./{Path(continued.init).name}/"
    assert pretrain(words(continued.source, continued.run_dir, spelt, **LENGTH)) == 0
    assert "is finished" in capsys.readouterr().err


def test_the_weights_are_not_written_over(continued: Continued, capsys: pytest.CaptureFixture[str]) -> None:
    for init in (continued.init, f"{continued.init}/model"):
        line = refused(capsys, words(continued.source, Path(continued.init), str(init), **LENGTH))
        assert "is what --init names; choose another folder to write to" in line


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "another depth": ({"model__depth": "3"}, "model.depth 3 contradicts --init TMP/timm, which has 2"),
    "a mean of two": ({"data__mean": "0.1,0.2"}, "data.mean takes one number or 3"),
    "nothing there": ({"init": "TMP/nowhere"}, "--init TMP/nowhere: there is no such file or folder"),
    "no weights": ({"init": "random:TMP/timm"}, "has no weights to go on from; leave it out for new ones"),
    "arguments without weights": ({"init": "", "init_args": "depth=2"}, "init_args is filled in from"),
    "other arguments": ({"init_args": "mlp_ratio=2.0"}, "init_args is filled in from --init TMP/timm; leave it out"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the weights of a ViT."""
    folder = tmp_path_factory.mktemp("wrong")
    write_timm(folder / "timm")
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(
    case: str, folder: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, said = WRONG[case]
    changed = {"init": "TMP/timm"} | changed
    changed = {name: value.replace("TMP", str(folder)) for name, value in changed.items()}
    told = words(source, tmp_path / "run", changed.pop("init"), **changed)
    assert said.replace("TMP", str(folder)) in refused(capsys, told)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_and_writes_nothing(
    folder: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(words(source, tmp_path / "run", folder / "timm", "--dry-run", model__img_size="48")) == 0
    assert "vit_tiny_patch16_224, 0.1M parameters, 6x6 patches" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_hybrid_at_another_size_on_a_gpu() -> None:
    weights = replace(
        open_weights("random:timm:vit_tiny_r_s16_p8_224"), image_hw=(64, 64), args={"mlp_ratio": 2.0, "depth": 1}
    )
    state = build(weights, classes=()).state_dict()
    weights = replace(weights, state=state)
    model, _, init_args = complete_configs("there", weights, ModelConfig(img_size=(96,)), DataConfig())
    encoder = build_continued(model, init_args, "cuda").eval()
    load_encoder(encoder, weights)
    images = torch.randn(2, 3, 96, 96)
    original: Any = build(weights, classes=(), image_hw=(96, 96)).eval()
    with torch.no_grad():
        found = encoder(images.cuda()).cpu()
        torch.testing.assert_close(found, original.forward_features(images), rtol=0, atol=2e-3)
