"""What users of an earlier head (7d58281) have on disk still opens, and goes on to the same bits.

old_runs/data.tar.xz was made by that head with the commands below, on images that `write_images` draws again:

    pretrain/    stopped by a signal at half its length       pretrained/  the same, ended
    finetune/    from pretrained/, ended                      study/       ended
    fewshot/     a table, with the features of cache/         old.csv      what finetune/ predicts
    cache/       features, decoded pixels                     shard.index  of a tar, each label one higher than it is

old_runs/made.json: what the stopped run ends in, and the processor and versions that computed it.
"""

import hashlib
import io
import json
import os
import shlex
import shutil
import tarfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpp.cli import fewshot, finetune, predict, pretrain, study, visualize
from mpp.data.sources.opening import open_source
from mpp.system.files import read_csv
from tests import runs

OLD = Path(__file__).parent / "old_runs"
MADE: dict[str, Any] = json.loads((OLD / "made.json").read_text()) if OLD.exists() else {}
CPU = "--train.device cpu --train.precision fp32 --data.workers 0 --log.no-report"
PRETRAIN = f"""--run-dir pretrain --data array:images.npz --train.length "20 steps" --train.batch-size 16
    --train.micro-batch 8 --model.name vit_tiny_patch16_224 --model.img-size 32 --model.patch-size 8
    --model.embed-dim 16 --model.num-heads 2 --model.depth 2 --model.drop-path 0.1 --optim.lr 1e-3
    --optim.weight-decay 0.05 --optim.ema-decay 0.9 --checkpoint.every "5 steps"
    --checkpoint.keep-last 1 --log.every "4 steps" --log.pictures 50% --log.num-pictures 2
    --fewshot.data array:images.npz --fewshot.every "5 steps" --fewshot.shots 1 --fewshot.seeds 0 {CPU}"""
FINETUNE = f"""--run-dir finetune --init pretrained --data array:images.npz --train.length "30 steps"
    --train.batch-size 16 --train.micro-batch 8 --optim.lr 0.05 --optim.ema-decay 0.8 --checkpoint.keep-last 1
    --log.every "5 steps" {CPU}"""
FIXED = Path("/tmp/mpp_old_runs_7d58281/images.npz")
"""What the cache has features and pixels of; it knows images by their path and time."""
PIXELS = f"""--run-dir pixels --data array:{FIXED} --data.cache pixels --train.length "2 steps" --train.batch-size 16
    --model.name vit_tiny_patch16_224 --model.img-size 32 --model.patch-size 8 --model.embed-dim 16
    --model.num-heads 2 --model.depth 1 --log.pictures "" {CPU}"""
FEWSHOT = f"""--init pretrained --data array:{FIXED} --shots 1 2 --seeds 0 1 --out fewshot --device cpu --workers 0
    --precision fp32"""
NEW = ("features/effective_rank", "features/largest_rank")
"""Figures that the version which made these runs did not have."""
PREDICT = "--init finetune pictures --device cpu --out"
STUDY = """--run-dir study --data array:images.npz --test array:test.npz --labels 100% --seeds 0 1 --shots 1 2
    --pretrain.model.name vit_tiny_patch16_224 --pretrain.model.img-size 32 --pretrain.model.patch-size 8
    --pretrain.model.embed-dim 16 --pretrain.model.num-heads 2 --pretrain.model.depth 2
    --pretrain.train.length "4 steps" --pretrain.train.batch-size 16 --pretrain.train.device cpu
    --pretrain.data.workers 0 --pretrain.checkpoint.keep-last 1
    --pretrain.log.pictures "" --pretrain.log.no-report --finetune.train.length "4 steps"
    --finetune.train.batch-size 8 --finetune.train.device cpu --finetune.data.workers 0 --finetune.optim.name adamw
    --finetune.optim.lr 1e-3 3e-3"""
TENSORS = ("model", "ema", "optimizer")


def images(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 40, 40, 3) of coarse noise on the colour of the class, and the classes; integers alone make them."""
    labels = np.arange(number) % 4
    hues = np.array([[150, 110, 110], [110, 150, 110], [110, 110, 150], [140, 140, 110]])[labels]
    image, y, x, c = np.ogrid[:number, :5, :5, :3]
    noise = ((image + 1) * (37 * y + 101 * x + 17 * c + 7 * seed + 1) ** 2) % 199 - 99
    pixels = (hues[:, None, None] + noise).clip(0, 255).astype(np.uint8)
    return pixels.repeat(8, axis=1).repeat(8, axis=2), labels


def write_images(folder: Path) -> None:
    """What the commands read, to lie in the current folder."""
    for name, number, seed in (("images", 40, 0), ("test", 24, 1)):
        pixels, labels = images(number, seed)
        np.savez(folder / f"{name}.npz", images=pixels, labels=labels)
    (folder / "pictures").mkdir()
    with tarfile.open(folder / "shard.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (picture, label) in enumerate(zip(*images(8, 2), strict=True)):
            text = b"P6 40 40 255\n" + picture.tobytes()
            (folder / "pictures" / f"{number}.ppm").write_bytes(text)
            for ending, data in (("ppm", text), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def versions() -> dict[str, str]:
    """On which the bits depend."""
    names = ("torch", "timm", "numpy", "pillow", "simplejpeg", "imagecodecs", "tifffile")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {"processor": next((line for line in lines if line.startswith("model name")), "")}
    return found | {"isa": torch.backends.cpu.get_cpu_capability()} | {name: metadata.version(name) for name in names}


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by where they are in it."""
    newest = max(run_dir.glob("checkpoints/step_*.pt"))
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key in value:
                walk(value[key], f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            found[name] = value

    for part, state in torch.load(newest, weights_only=True)["state"].items():
        if part in TENSORS:
            walk(state, part)
    return found


def digest(named: dict[str, torch.Tensor]) -> str:
    """Of names, types, shapes and bits."""
    hashed = hashlib.sha256()
    for name in sorted(named):
        value = named[name].numpy()
        hashed.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return hashed.hexdigest()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "old"
    with tarfile.open(OLD / "data.tar.xz") as tar:
        tar.extraction_filter = lambda member, _: member  # Python 3.12 asks for one, 3.11.0 to 3.11.3 know none
        tar.extractall(folder)
    write_images(folder)
    return folder


@pytest.fixture
def old(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all, as the current folder; its cache is the cache."""
    folder = shutil.copytree(unpacked, tmp_path / "moved")
    (folder / "shard.index").rename(folder / "shard.tar.index").touch()  # an older one than the tar is not read
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPP_CACHE", str(folder / "cache"))
    return folder


def test_a_stopped_run_goes_on_to_the_same_bits(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(shlex.split(PRETRAIN)) == 0
    assert "at step 10 of 20" in capsys.readouterr().err
    now, then = tensors(old / "pretrain"), tensors(old / "pretrained")
    assert now.keys() == then.keys()
    for name in now:
        torch.testing.assert_close(now[name], then[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    rows = [{k: v for k, v in row.items() if k not in NEW} for row in runs.figures(old / "pretrain")]
    for row, expected in zip(rows, runs.figures(old / "pretrained"), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert digest(then) == MADE["digest"]
    if versions() == MADE["versions"]:
        assert digest(now) == MADE["digest"]
        assert rows == runs.figures(old / "pretrained")
        model = Path("model", "model.safetensors")
        assert (old / "pretrain" / model).read_bytes() == (old / "pretrained" / model).read_bytes()


def kept(folder: Path) -> dict[str, bytes]:
    """What an ended run must not change."""
    return {name: data for name, data in files(folder).items() if name.endswith((".pt", ".safetensors", ".jsonl"))}


@pytest.mark.parametrize(
    ("folder", "tool", "words"),
    [("pretrained", pretrain, PRETRAIN.replace("pretrain", "pretrained", 1)), ("finetune", finetune, FINETUNE)],
)
def test_an_ended_run_is_left_as_it_is(
    folder: str, tool: Callable[[list[str]], int], words: str, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = kept(old / folder)
    assert tool(shlex.split(words)) == 0
    assert "is finished" in capsys.readouterr().err
    assert kept(old / folder) == before
    assert len(before) == 3


@pytest.mark.slow
def test_an_ended_study_is_left_as_it_is_and_its_tables_are_made_again(old: Path) -> None:
    folder = old / "study"
    before, document, then = (
        kept(folder),
        json.loads((folder / "study.json").read_text()),
        read_csv(folder / "table.csv"),
    )
    (folder / "table.csv").unlink()
    assert study(shlex.split(STUDY)) == 0
    for new, expected in zip(read_csv(folder / "table.csv"), then, strict=True):
        assert new.keys() == expected.keys()
        for name, cell in new.items():
            figure = name in ("top1", "std", "gain", "interval95") and cell
            assert (float(cell) == pytest.approx(float(expected[name]))) if figure else (cell == expected[name])
    after = json.loads((folder / "study.json").read_text())
    for part in ("pretraining", "finetuning", "fewshot", "probes", "data"):
        assert after[part] == document[part]
    assert kept(folder) == before


def test_a_fine_tuned_model_predicts_the_same(old: Path) -> None:
    assert predict(shlex.split(f"{PREDICT} new.csv")) == 0
    for new, then in zip(read_csv(old / "new.csv"), read_csv(old / "old.csv"), strict=True):
        for name, value in new.items():
            if name.startswith("probability"):
                assert float(value) == pytest.approx(float(then[name]), abs=1e-3)
            else:
                assert value == then[name]


@pytest.fixture
def fixed(old: Path) -> None:
    """Writes FIXED, in one step: other processes may read the same at this moment."""
    if versions() != MADE["versions"]:
        pytest.skip("the cache is of other versions of what decodes and computes")
    try:
        FIXED.parent.mkdir(exist_ok=True)
        written = shutil.copy(old / "images.npz", FIXED.parent / f"{os.getpid()}.npz")
        os.utime(written, (1e9, 1e9))
        Path(written).rename(FIXED)
    except OSError as error:
        pytest.skip(f"cannot write {FIXED}: {error}")


@pytest.mark.usefixtures("fixed")
def test_kept_features_are_found(old: Path) -> None:
    then, before = read_csv(old / "fewshot" / "fewshot.csv"), files(old / "cache" / "features")
    shutil.rmtree(old / "fewshot")
    assert fewshot(shlex.split(FEWSHOT)) == 0
    assert read_csv(old / "fewshot" / "fewshot.csv") == then
    assert files(old / "cache" / "features") == before


@pytest.mark.usefixtures("fixed")
def test_decoded_pixels_are_found(old: Path) -> None:
    before = sorted(path.name for path in (old / "cache").glob("*.pixels"))
    assert len(before) == 1
    assert pretrain(shlex.split(PIXELS)) == 0
    assert sorted(path.name for path in (old / "cache").glob("*.pixels")) == before


def test_the_index_beside_a_tar_is_read(old: Path) -> None:
    pixels, labels = images(8, 2)
    source = open_source("shards:shard.tar")
    for number in range(len(source)):
        data, label = source.read(number)
        assert data == b"P6 40 40 255\n" + pixels[number].tobytes()
        assert label == labels[number] + 1  # as this index has it


@pytest.mark.slow
@pytest.mark.parametrize("run_dir", ["pretrained", "finetune"])
def test_its_page_is_drawn(run_dir: str, old: Path) -> None:
    assert visualize(shlex.split(f"--init {run_dir} --images 128 --device cpu --workers 0 --report")) == 0
    page = (old / run_dir / "report.html").read_text()
    assert "<svg" in page
    assert "vit_tiny_patch16_224" in page
    assert page.count("data:image/png") > 3
