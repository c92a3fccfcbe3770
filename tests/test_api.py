"""The tools from Python: settings as values, images that the program holds, results, errors, and what they leave."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from PIL import Image
from torch.utils.data import Dataset, Subset

import mpp
from mpp.api.results import result_of
from mpp.cli import main
from mpp.cli.commands import TOOLS
from mpp.config import from_values, to_dict
from mpp.data.decoding import decode
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import SourceError
from mpp.data.sources.from_python import as_image, register
from mpp.data.sources.opening import open_source
from mpp.downstream.settings import FewshotRecipe
from mpp.errors import ConfigError, UserError
from mpp.pretraining.settings import PretrainConfig
from mpp.system.outcome import Outcome
from tests.runs import FINETUNE, TINY

SHORT = {"train.length": "8 steps", "log.pictures": "", "log.to": []}


def pictures(seed: int = 0, number: int = 40) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (number, 40, 40, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def state() -> dict[str, Any]:
    """What a call must leave as it was."""
    numbers: Any = np.random.get_state()
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "torch's generator": hash(torch.random.get_rng_state().numpy().tobytes()),
        "NumPy's generator": hash(numbers[1].tobytes()),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "processes": torch.distributed.is_initialized(),
        "environment": dict(os.environ),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on images in memory, made in another thread than the main one."""
    folder, found = tmp_path_factory.mktemp("api") / "first", []

    def make() -> None:
        found.append(mpp.pretrain(config=TINY, data=pictures(), run_dir=folder, **SHORT))

    before = state()
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert state() == before
    return found[0]


def test_a_run_gives_figures_paths_and_its_encoder(run: Any) -> None:
    assert run.figures["steps"] == 8
    assert 0 <= run.figures["accuracy_masked"] <= 1
    assert run.run_dir == Path(run.config.run_dir)
    assert run.paths["model"] == run.run_dir / "model"
    assert run.encoder()(torch.zeros(2, 3, 32, 32)).shape == (2, 48)
    with pytest.raises(UserError, match="has no head to classify with: fine-tune it first"):
        run.model()
    assert f"accuracy_masked               {run.figures['accuracy_masked']:.1%}" in repr(run)


def test_it_goes_on_with_the_same_images_alone(run: Any) -> None:
    text = (run.run_dir / "config.yaml").read_text("utf-8")
    (spec,) = [line.partition("source: ")[2] for line in text.splitlines() if "source: " in line]
    assert spec == register(pictures(), labelled=False).name
    assert mpp.pretrain(config=TINY, data=pictures(), run_dir=run.run_dir, **SHORT).figures == run.figures
    with pytest.raises(UserError, match=r"holds a run with another config \(data.source: .*python:list of 40 images"):
        mpp.pretrain(config=TINY, data=pictures(1), run_dir=run.run_dir, **SHORT)


def test_a_command_line_cannot_have_them(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", str(run.run_dir / "config.yaml"), "--run-dir", str(tmp_path / "new")]) == 2
    line = (
        "images of a Python program that has ended or no longer has them; hand them over again, from Python, or name a "
    )
    assert line in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_labelled_images_in_every_tool(run: Any, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    before = state()
    labelled = [(image, "ab"[number % 2]) for number, image in enumerate(pictures())]
    few = mpp.fewshot(init=[run.run_dir], data=labelled, shots=[1, 5], pool="mean", encoder={"device": "cpu"})
    assert [(row["shots"], type(row["accuracy"])) for row in few.tables["fewshot"]] == [(1, float), (5, float)]
    assert f"{few.figures[f'{run.run_dir} (mean), 5 shots']:.1%}" in capsys.readouterr().out
    probed = mpp.probe(init=run.run_dir, data=labelled, kind="knn", k=5, pool=("mean",), **{"encoder.device": "cpu"})
    assert probed.tables["probe"][0]["top1"] == pytest.approx(probed.figures[f"{run.run_dir} (mean)"], abs=1e-6)
    settings = {**FINETUNE, **SHORT, "log.evaluate": ""}
    settings = {name: value for name, value in settings.items() if name != "log.pictures" and "model." not in name}
    tuned = mpp.finetune(init=run.run_dir, data=labelled, run_dir="ft", **settings)
    assert tuned.figures["train_images"] == 32
    assert tuned.model()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert tuned.encoder()(torch.zeros(1, 3, 32, 32)).shape == (1, 48)
    assert "confusion" in tuned._repr_html_()
    assert "data:image/png;base64," in tuned._repr_html_()
    labelled[0][0].save("a.png")
    capsys.readouterr()
    named = mpp.predict(init="ft", images="a.png", device="cpu")
    assert (capsys.readouterr().out, [*tmp_path.glob("*.csv")]) == ("", [])
    (row,) = named.tables["predictions"]
    model, transform = mpp.load("ft")
    with torch.inference_mode():
        best = model(transform(labelled[0][0])[None]).softmax(1)[0]
    assert (row["class1"], row["probability1"]) == (
        "ab"[int(best.argmax())],
        pytest.approx(float(best.max()), abs=1e-4),
    )
    assert state() == before


def test_names_stay_texts_and_figures_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("path,class1,probability1\n0001,1_0,0.9000\n2,nan,1\n")
    found = result_of("predict", SimpleNamespace(out=str(tmp_path / "p.csv"), top=5), 0)
    assert found.tables["predictions"] == [
        {"path": "0001", "class1": "1_0", "probability1": 0.9},
        {"path": "2", "class1": "nan", "probability1": 1},
    ]
    (tmp_path / "m.csv").write_text("path,class1\na.png,0.5000\n")  # a class of that name, of several an image
    found = result_of("predict", SimpleNamespace(out=str(tmp_path / "m.csv"), top=5), 0)
    assert found.tables["predictions"] == [{"path": "a.png", "class1": 0.5}]
    few = Outcome(0, fewshot=[("model", "layer", "accuracy"), ("0001", "2", "0.5")])
    assert result_of("fewshot", SimpleNamespace(), few).tables["fewshot"][0] == {
        "model": "0001",
        "layer": 2,
        "accuracy": 0.5,
    }


def test_a_tool_without_a_folder_has_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("report.html").touch()
    assert not result_of("fewshot", SimpleNamespace(out=""), 0).paths
    assert not result_of("pretrain", SimpleNamespace(run_dir="", dry_run=True), 0).paths


def test_whether_a_run_would_start_is_a_figure_and_no_error() -> None:
    grey = [np.zeros((40, 40), np.uint8)] * 2
    looked_at = mpp.check_data(data=grey, workers=0, img_size=32)
    assert looked_at.figures["would_start"] is True
    assert looked_at.figures["images"] == 2
    one = mpp.check_data(data=grey[:1], workers=0, img_size=32)
    assert (one.figures["would_start"], one.figures["why"]) == (False, "there is one image only")


@pytest.mark.parametrize(
    ("status", "error"), [(75, mpp.Stopped), (130, KeyboardInterrupt), (UserError("no room"), UserError)]
)
def test_how_a_run_ends(status: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: PretrainConfig) -> int:
        if isinstance(status, Exception):
            raise status
        return status

    monkeypatch.setattr("mpp.pretraining.recipe.run", stop)
    with pytest.raises(error, match=None if error is KeyboardInterrupt else "runs/first was asked|no room"):
        mpp.pretrain(data="demo", run_dir="runs/first")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: mpp.pretrain(),
            "no images to learn from: give --data, such as --data folder:/my/images or --data demo",
        ),
        (lambda: mpp.pretrain(**{"optm.lr": 1}), "no setting 'optm.lr'; did you mean 'optim.lr'?"),
        (lambda: mpp.pretrain(optim={"lr": "fast"}), "optim.lr: takes a number or auto, got 'fast'"),
        (lambda: mpp.pretrain(optim=3), "no setting 'optim': it is a group of settings, such as optim.name, optim.lr"),
        (lambda: mpp.pretrain(dry_run="maybe"), "dry_run: takes true or false, got 'maybe'"),
        (lambda: mpp.pretrain(**{"optim.lr": None}), "optim.lr: takes a number or auto, got null"),
        (
            lambda: mpp.pretrain(**{"optim.lr": object()}),
            "optim.lr: takes numbers, texts and lists of these, got",
        ),
        (lambda: mpp.pretrain(config="bse"), "--config bse: no such file, and no config of that name; did you mean"),
        (lambda: mpp.pretrain(config=3), "config: takes a name, a path, a dict or a PretrainConfig, got int"),
        (
            lambda: mpp.finetune(config=PretrainConfig()),
            "config: takes a name, a path, a dict or a FinetuneConfig",
        ),
        (lambda: mpp.fewshot(init="none", data=iter([])), "list_iterator has no length; give a list or a Dataset"),
        (lambda: mpp.fewshot(init="none", data=[]), "list of images is empty"),
        (
            lambda: mpp.fewshot(init="none", data=[{"image": 1}]),
            "python:list of 1 image: image 0 cannot be used: dict",
        ),
        (lambda: mpp.load("no/such"), "--init no/such: there is no such file or folder"),
    ],
)
def test_errors_are_one_line(call: Callable[[], object], line: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_every_tool_of_the_table_is_a_function() -> None:
    assert {name for name in TOOLS if name != "cache"} <= {*mpp.__all__}
    assert all(TOOLS[name].about in getattr(mpp, name).__doc__ for name in TOOLS if name not in ("cache", "study"))
    with pytest.raises(UserError, match="no labelled images: give --data, such as --data cifar10:DIR or"):
        mpp.study()  # a package of that name is there, too


@pytest.mark.parametrize(
    "config",
    [
        {"optim": {"lr": np.str_("0.5")}, "train.batch_size": np.int64(64)},
        {"optim.lr": "0.5", "train": {"batch_size": 64}},
    ],
    ids=["nested", "dotted"],
)
def test_settings_are_checked_as_flags_are(config: dict[str, Any]) -> None:
    found = from_values(PretrainConfig, config, {"data": "demo", "dry_run": True}, TOOLS["pretrain"].aliases, "")
    assert (found.optim.lr, found.train.batch_size, found.data.source, found.dry_run) == (0.5, 64, "demo", True)
    again = from_values(PretrainConfig, found, {"optim": found.optim}, {}, "pretrain")
    assert again == found
    assert from_values(PretrainConfig, to_dict(found), {}, {}, "pretrain") == found
    shipped = from_values(PretrainConfig, "demo", {"model.img_size": [32, 48]}, {}, "pretrain")
    assert shipped.model.img_size == (32, 48)
    assert from_values(FewshotRecipe, None, {"l2": "cv", "init": Path("runs/a")}, {}, "fewshot").init == ("runs/a",)


class Pairs(Dataset):
    """As torchvision's datasets: tensors, numbered labels, and their names."""

    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index >= 6:
            raise IndexError
        return torch.full((3, 8, 10), index / 5), torch.tensor([index % 2])


def test_a_dataset_of_tensors_is_a_source() -> None:
    for images, labels in ((Pairs(), [0, 1, 0, 1, 0, 1]), (Subset(Pairs(), [1, 3, 4]), [1, 1, 0])):
        source = register(images)
        assert source.classes == ("cat", "dog")
        assert source.labels().tolist() == labels  # pyright: ignore[reportOptionalMemberAccess]
    assert open_source(source.name) is source
    image, label = register(Pairs()).read(5)
    assert label == 1
    assert decode(image, DecodeOptions()).tolist() == np.full((8, 10, 3), 255).tolist()


RGBA = Image.new("RGBA", (4, 2), (200, 0, 0, 0))


def test_a_label_may_be_a_row_of_zeros_and_ones() -> None:
    source = register([(RGBA, [1, 0, 0]), (RGBA, torch.tensor([1, 1, 0])), (RGBA, np.zeros(3))])
    sets = source.label_sets()
    assert sets is not None
    assert (source.labels(), source.classes) == (None, ("0", "1", "2"))
    assert sets.table[sets.number].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("RGB", (4, 2), (9, 8, 7)), [9, 8, 7]),
        (Image.new("L", (4, 2), 9), [9, 9, 9]),
        (Image.new("1", (4, 2), 1), [255, 255, 255]),
        (Image.new("CMYK", (4, 2), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGB", (4, 2), (9, 8, 7)).quantize(2), [9, 8, 7]),
        (RGBA, [255, 255, 255]),  # transparent: the background
        (np.full((2, 4, 3), 9, np.uint8), [9, 9, 9]),
        (np.full((2, 4), 1.0), [255, 255, 255]),
        (torch.full((3, 2, 4), 9, dtype=torch.uint8), [9, 9, 9]),
        (torch.zeros(2, 4), [0, 0, 0]),
    ],
)
def test_images_of_any_kind(image: Any, pixel: list[int], tmp_path: Path) -> None:
    assert decode(as_image(image), DecodeOptions()).tolist() == np.tile(pixel, (2, 4, 1)).tolist()
    if isinstance(image, Image.Image) and image.mode != "CMYK":
        image.save(tmp_path / "a.png")
        assert decode(as_image(tmp_path / "a.png"), DecodeOptions())[0, 0].tolist() == pixel


@pytest.mark.parametrize(
    ("images", "line"),
    [
        ([np.zeros((3, 40, 40), np.uint8)], r"looks like \(C, H, W\); arrays are \(H, W, C\)"),
        ([torch.zeros(40, 40, 3)], r"looks like \(H, W, C\); tensors are \(C, H, W\)"),
        ([(RGBA, 0.5)], "a label is 0.5; labels are whole numbers from 0, names, or None"),
        ([(RGBA, 0), (RGBA, "a")], "some labels are numbers and some are names"),
        ([(RGBA, -3)], "there is a label -3"),
        ([(RGBA, [0, 1]), (RGBA, [1])], "some images have more labels than others; give each a row of 0 and 1"),
        (
            [(RGBA, [0, 7]), (RGBA, [1, 0])],
            r"the labels are int64 \(2, 2\) and hold 7; several labels an image are 2 rows",
        ),
    ],
)
def test_what_is_no_source(images: list[Any], line: str) -> None:
    with pytest.raises(SourceError, match=line):
        register(images)


def test_a_list_is_its_own_though_its_fingerprint_leaves_the_difference_out() -> None:
    first = [np.zeros((4, 4, 3), np.uint8)] * 1500
    second = [*first[:7], np.ones((4, 4, 3), np.uint8), *first[8:]]
    sources = register(first), register(second)
    assert [int(np.asarray(source.image(7)).max()) for source in sources] == [0, 1]


def test_a_bad_image_among_good_ones_is_a_bad_file() -> None:
    source = register([RGBA, None, RGBA])
    with pytest.raises(OSError, match="NoneType is no image"):
        source.read(1)
    with pytest.raises(ConfigError):
        mpp.pretrain(data=source.name, run_dir="x", **{"optim.lr": -1})
