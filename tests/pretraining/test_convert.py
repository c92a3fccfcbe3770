"""The convert command: whatever mpp reads, to timm, Hugging Face and ONNX, computing the same."""

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
    for init, out in ((run, "of_run"), (checkpoint, "of_checkpoint")):
        assert convert(["--init", str(init), "--out", str(tmp_path / out)]) == 0
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / out / file).read_bytes() == (run_dir / "model" / file).read_bytes()
    assert capsys.readouterr().err.count("its newest checkpoint is taken, step_000000002.pt") == 1


def test_checkpoints_that_cannot_be_converted(
    run_dir: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints") / "step_000000002.pt"
    torn.write_bytes(torn.read_bytes()[:5000])
    shutil.copy(run_dir / "config.yaml", tmp_path)
    reasons = {tuned / "checkpoints" / "step_000000004.pt": "only checkpoints of pretraining", torn: "cannot read"}
    for path, words in reasons.items():
        assert convert(["--init", str(path), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not (tmp_path / "out").exists()


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


def test_a_timm_folder_to_hugging_face_and_back(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    assert convert(["--init", str(tuned / "model"), "--out", str(hf), "--format", "hf"]) == 0
    assert "transformers.AutoModel.from_pretrained(" in capsys.readouterr().out
    assert convert(["--init", str(hf), "--out", str(back)]) == 0
    torch.testing.assert_close(computed(back, images()), computed(hf, images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_how_images_are_framed_is_kept(form: str, tuned: Path, tmp_path: Path) -> None:
    framing = {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "center"}  # 32 of 40 pixels
    write_timm_folder(replace(open_weights(str(tuned / "model")), **framing), tmp_path / "theirs")
    assert convert(["--init", str(tmp_path / "theirs"), "--out", str(tmp_path / "out"), "--format", form]) == 0
    read = open_weights(str(tmp_path / "out"))
    assert {key: getattr(read, key) for key in framing} == framing


@pytest.mark.slow
def test_to_onnx(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.onnx"
    assert convert(["--init", str(tuned), "--out", str(out)]) == 0
    assert f"onnxruntime.InferenceSession({str(out)!r})" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for number in (1, 3):
        pixels = images(number=number)
        (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        np.testing.assert_allclose(found, computed(tuned, pixels), rtol=0, atol=1e-4)


def test_the_paper_s_checkpoints(shared: Callable[[str], Path], tmp_path: Path) -> None:
    params = shared("fixtures/vit_token_params.npz")
    for form in ("timm", "hf"):
        assert convert(["--init", str(params), "--out", str(tmp_path / form), "--format", form]) == 0
        found, expected = (computed(spec, images()) for spec in (tmp_path / form, params))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


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


def test_the_paper_s_hybrid_that_timm_cannot_build(
    shared: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    "a single file": ("--init TMP/file --out TMP/x", "of a single file only .npz can be read"),
    "an existing folder": ("--init RUN --out TMP/full", "--out TMP/full exists; choose another or remove it"),
    "an existing file": ("--init RUN --out TMP/file", "--out TMP/file exists; choose another or remove it"),
    "below a file": ("--init RUN --out TMP/file/x", "cannot write"),
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
    case: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, reason = (text.replace("TMP", str(tmp_path)).replace("RUN", str(run_dir)) for text in WRONG[case])
    for name in ("empty", "full", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("file", "zero.npz", "full/file"):
        (tmp_path / name).touch()
    if "resnet" in words:
        timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "resnet"), safe_serialization=True)
    before = sorted(tmp_path.rglob("*"))
    assert convert(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("convert: error: ")
    assert reason in line
    assert sorted(tmp_path.rglob("*")) == before
