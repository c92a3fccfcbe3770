"""The convert command: whatever mpp reads, to timm, Hugging Face and ONNX, computing the same."""

import filecmp
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.cli import convert, finetune, pretrain
from mpp.weights.base import build
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import write_timm_folder
from tests import runs
from tests.weights.models import images

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)


@pytest.fixture(scope="module")
def run_dir(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    assert pretrain(runs.command(source, folder, train__length="2 steps", fewshot__data="")[1:]) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(source: str, run_dir: Path) -> Path:
    """A fine-tuned run."""
    folder = run_dir.parent / "tuned"
    assert finetune(runs.finetune_command(source, folder, init=str(run_dir), train__length="4 steps")[1:]) == 0
    return folder


def computed(spec: Path | str, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return build(open_weights(str(spec))).eval()(pixels)


def test_a_run_that_has_not_ended_gives_its_newest_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(run / "model")
    checkpoint = run / "checkpoints" / "step_000000002.pt"
    for init, out in ((run, tmp_path / "of_run"), (checkpoint, tmp_path / "of_checkpoint")):
        assert convert(["--init", str(init), "--out", str(out)]) == 0
        files = ["model.safetensors", "config.json"]
        assert filecmp.cmpfiles(out, run_dir / "model", files, shallow=False)[0] == files
    assert capsys.readouterr().err.count("its newest checkpoint is taken, step_000000002.pt") == 1


def test_a_folder_of_weights_may_be_called_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(run_dir / "model", tmp_path / "checkpoints" / "mine")
    assert convert(["--init", str(model), "--out", str(tmp_path / "out")]) == 0
    assert filecmp.cmp(tmp_path / "out" / "model.safetensors", model / "model.safetensors", shallow=False)


def test_a_run_to_timm_at_another_size(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(["--init", str(tuned), "--out", str(tmp_path / "same")]) == 0
    printed = capsys.readouterr().out
    assert f"vit_tiny_patch16_224, 32x32 pixels, 4 classes -> {tmp_path / 'same'}" in printed
    model: Any = eval(printed.splitlines()[-1], {"timm": timm}).eval()  # the example
    with torch.no_grad():
        torch.testing.assert_close(model(images()), computed(tuned, images()), rtol=0, atol=1e-5)
    assert convert(["--init", str(tuned), "--out", str(tmp_path / "other"), "--img-size", "48", "40"]) == 0
    weights = open_weights(str(tmp_path / "other"))
    assert (weights.image_hw, weights.classes) == ((48, 40), ("0", "1", "2", "3"))
    with torch.no_grad():
        resized = build(open_weights(str(tuned)), image_hw=(48, 40)).eval()(images(48, 40))
    torch.testing.assert_close(computed(tmp_path / "other", images(48, 40)), resized, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_to_onnx(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert convert(["--init", str(tuned), "--out", str(tmp_path / "model.onnx")]) == 0
    example = capsys.readouterr().out.splitlines()[-1].replace(")", ", providers=['CPUExecutionProvider'])")
    (found,) = eval(example, {"onnxruntime": onnxruntime}).run(None, {"images": images().numpy()})
    np.testing.assert_allclose(found, computed(tuned, images()), rtol=0, atol=1e-4)


def test_heads_that_a_form_cannot_hold_are_noted(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def converted(init: Path, form: str) -> tuple[str, str]:
        out = tmp_path / f"{init.name}_{form}"
        assert convert(["--init", str(init), "--out", str(out), "--format", form]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    def written(name: str, **changes: Any) -> Path:
        weights = replace(open_weights(str(tuned)), state=None, **changes)
        write_timm_folder(replace(weights, state=build(weights).state_dict()), tmp_path / name)
        return tmp_path / name

    out, err = converted(tuned, "hf")
    assert "32x32 pixels, no head -> " in out
    assert "the head of 4 classes was left out" in err
    assert "for one that fits, fine-tune with --model.pool token\n" in err
    tanh = written("tanh", representation=5)
    assert "4 classes (their head in head.safetensors) -> " in converted(tanh, "timm")[0]
    out, err = converted(tanh, "hf")
    assert "no head -> " in out
    assert "fine-tune with --model.pool token --model.head linear\n" in err
    assert "4 classes -> " in converted(written("token", pool="token"), "hf")[0]


def test_the_paper_s_checkpoints_and_the_hybrid_that_timm_cannot_build(
    shared: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = shared("fixtures/vit_token_params.npz")
    for init, form in ((params, "timm"), (tmp_path / "timm", "hf"), (tmp_path / "hf", "auto")):
        assert convert(["--init", str(init), "--out", str(tmp_path / form), "--format", form]) == 0
        found, expected = (computed(spec, images()) for spec in (tmp_path / form, params))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert f"transformers.AutoModel.from_pretrained({str(tmp_path / 'hf')!r})" in capsys.readouterr().out
    params = str(shared("fixtures/hybrid_params.npz"))
    assert convert(["--init", params, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "note: timm has no hybrid with the stem units [2, 1]: only mpp reads this folder" in printed.err
    assert printed.out.splitlines()[-1] == f"mpp.weights.opening.open_weights({str(tmp_path / 'out')!r})"
    assert torch.equal(computed(tmp_path / "out", images()), computed(params, images()))


WRONG: dict[str, tuple[str, str]] = {
    "no init": ("--out TMP/x", "nothing to convert: give --init"),
    "no out": ("--init RUN", "nowhere to write to: give --out"),
    "missing": ("--init TMP/nowhere --out TMP/x", "--init TMP/nowhere: there is no such file or folder"),
    "empty": ("--init TMP/empty --out TMP/x", "--init TMP/empty: the folder is empty"),
    "0 bytes": ("--init TMP/zero.npz --out TMP/x", "TMP/zero.npz"),
    "a single file": (
        "--init TMP/file --out TMP/x",
        "cannot read the weights TMP/file: truncated, or no file of tensors",
    ),
    "an existing folder": ("--init RUN --out TMP/full", "--out TMP/full exists; choose another or remove it"),
    "an existing file": ("--init RUN --out TMP/file", "--out TMP/file exists; choose another or remove it"),
    "below a file": ("--init RUN --out TMP/file/x", "cannot write"),
    "of fine-tuning": ("--init TUNED/checkpoints/step_000000004.pt --out TMP/x", "only checkpoints of pretraining"),
    "torn": ("--init TMP/checkpoints/step_000000002.pt --out TMP/x", "cannot read"),
    "no weights": ("--init random:test_vit --out TMP/x", "--init random:test_vit has no weights to convert"),
    "a cut patch": ("--init RUN --out TMP/x --img-size 33", "img_size 33 is not a multiple of the patch"),
    "no form": ("--init RUN --out TMP/x --format keras", "--format: takes one of auto, timm, hf, onnx"),
    "the current folder": ("--init RUN --out .", "it is or holds the current folder; name a new one"),
    "the same by its name": ("--init RUN --out ../here", "it is or holds the current folder; name a new one"),
    "the folder above": ("--init RUN --out ..", "--out .. exists; choose another or remove it"),
    "a ResNet to hf": ("--init TMP/resnet --out TMP/x --format hf", "TMP/resnet cannot be written as Hugging Face's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(
    case: str, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"TMP": tmp_path, "RUN": tuned.parent / "run", "TUNED": tuned}
    words, reason = WRONG[case]
    for name, place in places.items():
        words, reason = words.replace(name, str(place)), reason.replace(name, str(place))
    for name in ("empty", "full", "here", "checkpoints"):
        (tmp_path / name).mkdir()
    shutil.copy(places["RUN"] / "config.yaml", tmp_path)
    torn = Path("checkpoints", "step_000000002.pt")
    (tmp_path / torn).write_bytes((places["RUN"] / torn).read_bytes()[:5000])
    monkeypatch.chdir(tmp_path / "here")
    for name in ("file", "zero.npz", "full/file"):
        (tmp_path / name).touch()
    if "resnet" in words:
        timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "resnet"), safe_serialization=True)
    before = sorted(tmp_path.rglob("*"))
    assert convert(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("convert: error: ")
    assert reason in err
    assert sorted(tmp_path.rglob("*")) == before
