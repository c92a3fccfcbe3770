"""The tool that draws what a model learnt, on real little runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpp.cli import visualize
from tests import runs
from tests.browser import open_browser, visit

STEPS = ["--train.length", "12 steps", "--log.report", "true", "--log.pictures", "6 steps"]
STEPS += ["--checkpoint.every", "6 steps"]
OF_MODEL = ["filters", "positions", "attention-distance", "rollout", "heads", "patch-features", "image-features"]
SECTIONS = ["curves", "few-shot", "reconstructions", "targets", *OF_MODEL, "data", "how-it-was-made"]


def anchors(page: str) -> list[str]:
    """The sections of a page, in order."""
    return re.findall(r'<section[^>]* id="([\w-]+)"', page)


def report(init: Path, *words: str) -> str:
    """The page that the tool writes alone, by default into the run folder `init`."""
    assert visualize(["--init", str(init), "--report", "--device", "cpu", *words]) == 0
    return (Path(words[words.index("--out") + 1] if "--out" in words else init) / "report.html").read_text()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the tool prints when it refuses."""
    assert visualize(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def run(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its page."""
    folder = tmp_path_factory.mktemp("visualize") / "first"
    out, err = runs.call(runs.command(source, folder, *STEPS, log__to="tensorboard"))
    assert f"page         {folder / 'report.html'}" in out, err
    return folder


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are empty, but those of `run`, which is made before: they take half the time of a page."""
    monkeypatch.setattr("mpp.report.charts._svg", lambda _: "<svg xmlns='http://www.w3.org/2000/svg'/>")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same run in a folder to be damaged."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.mark.slow
def test_a_run_ends_with_its_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert anchors(page) == SECTIONS
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0})
    events.Reload()
    names = {"reconstruction", "report/filters_pretrained", "report/confusion", "report/rollout_sheet"}
    assert names <= set(events.Tags()["images"])
    assert [shown.step for shown in events.Images("report/confusion")] == [12]
    assert [event.step for event in events.Scalars("loss/all")] == [5, 10, 12]  # what the run wrote is there still


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_its_page_in_a_browser(run: Path, width: int, scheme: str) -> None:
    address, size = (run / "report.html").as_uri(), {"width": width, "height": 900}
    with open_browser() as browser, visit(browser, address, viewport=size, color_scheme=scheme) as opened:
        page = opened.page
        pictures = page.locator("main img").evaluate_all("all => all.map(i => [i.alt, i.naturalWidth])")
        assert len(pictures) > 50
        assert all(alt and width > 0 for alt, width in pictures)
        assert page.locator("main svg[role=img]").count() >= 8
        slider = page.get_by_role("slider", name="training step")
        predicted = page.get_by_alt_text(re.compile(r"^Image 1: predicted at step")).locator("visible=true")
        for step, key in ((12, "ArrowLeft"), (6, "ArrowRight")):
            assert slider.get_attribute("aria-valuetext") == f"step {step}"
            assert predicted.get_attribute("alt") == f"Image 1: predicted at step {step}."
            slider.press(key)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert not opened.problems
        assert not opened.requests


@pytest.mark.slow
def test_pictures_by_themselves(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualize(["--init", str(run), "--out", str(tmp_path / "look"), "--shown", "2", "--device", "cpu"]) == 0
    assert str(tmp_path / "look" / "report.html") in capsys.readouterr().out
    figures = {path.name: path for path in (tmp_path / "look" / "figures").iterdir()}
    assert {"filters_pretrained.png", "attention_distance.svg", "confusion.png", "target_histogram.svg"} <= set(figures)
    for path in figures.values():
        if path.suffix == ".png":
            assert np.asarray(Image.open(path)).std() > 0, path.name
        else:
            assert "<svg" in path.read_text(), path.name


@pytest.mark.slow
def test_a_run_that_still_trains(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "model")
    (copy / "report.html").unlink()
    (copy / "checkpoints" / "step_000000012.pt").unlink()
    rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= 6) + '{"step": 7, ')
    page = report(copy)
    assert "has not ended" in capsys.readouterr().err
    assert not (copy / "figures").exists()
    assert set(anchors(page)) >= {"curves", "reconstructions", "filters", "how-it-was-made"}


@pytest.mark.slow
def test_other_images_go_through_the_checkpoints(run: Path, tmp_path: Path) -> None:
    words = ["--data", runs.write_images(tmp_path / "other", 20), "--out", str(tmp_path / "out")]
    page = report(run, *words)
    assert "20 images" in page
    assert "step 12" in page
    assert "20 images" in report(run / "checkpoints" / "step_000000006.pt", *words)


@pytest.mark.slow
def test_one_checkpoint_of_many(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step_000000006.pt"
    assert "is no run folder; give --out" in refused(["--init", str(step)], capsys)
    page = report(step, "--out", str(tmp_path))
    assert "<h1>first, step_000000006</h1>" in page
    assert "predicted at step" not in page  # no slider to other steps
    assert "no such checkpoint" in refused(["--init", f"{step}x", "--out", str(tmp_path)], capsys)


@pytest.mark.slow
def test_what_is_asked_for_wrongly_leaves_the_page_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    for words, message in (
        (("--patch", "99", "0"), "there are 4 rows and 4 columns"),
        (("--device", "cuda:9"), "CUDA devices"),
        (("--results", "/nowhere"), "--results /nowhere: there is no such folder"),
        (("--img-size", "33"), "img_size"),
    ):
        assert message in refused(["--init", str(run), "--report", *words], capsys)
    assert (run / "report.html").read_bytes() == before


@pytest.mark.slow
def test_a_picture_cut_short_is_passed_over(copy: Path) -> None:
    sheet = copy / "pictures" / "reconstruction_000000006.png"
    sheet.write_bytes(sheet.read_bytes()[:-3000])
    page = report(copy)
    assert "predicted at step 12" in page
    assert "predicted at step 6" not in page


@pytest.mark.slow
def test_a_run_that_goes_on_has_no_model_until_it_ends(
    copy: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> NoReturn:
        raise Killed

    monkeypatch.setattr("mpp.training.run_folder.fit", killed)
    with pytest.raises(Killed):
        runs.call(runs.command(source, copy, *STEPS[2:], "--train.length", "20 steps", "--resume", "force"))
    assert not (copy / "model").exists()


@pytest.mark.slow
def test_any_weights(run: Path, source: str, tmp_path: Path) -> None:
    words = ["--data", source, "--out", str(tmp_path)]
    assert visualize(["--init", f"random:{run}", *words, "--device", "cpu"]) == 0
    assert anchors((tmp_path / "report.html").read_text()) == OF_MODEL
    assert "6 x 6 patches" in report(run / "model", *words, "--img-size", "48")


@pytest.mark.slow
def test_a_fine_tuned_run_and_its_comparison(run: Path, source: str, tmp_path: Path) -> None:
    tuned, every = run.parent / "tuned", ("--checkpoint.every", "6 steps")
    out, _ = runs.call(runs.finetune_command(source, tuned, *STEPS[:4], *every, init=str(run)))
    assert f"page         {tuned / 'report.html'}" in out
    page = (tuned / "report.html").read_text()
    assert anchors(page)[0] == "fine-tuning"
    assert "reconstructions" not in anchors(page)
    assert "downstream" in anchors(report(run))  # the fine-tuning beside it
    assert visualize(["--runs", str(run), str(tuned), "--out", str(tmp_path / "both")]) == 0
    page = (tmp_path / "both" / "report.html").read_text()
    assert "1 pretraining run and 1 fine-tuning run: first, tuned." in page


@pytest.mark.slow
def test_a_page_that_cannot_be_made_fails_no_run(source: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    out, err = runs.call(runs.command(source, tmp_path / "run", *STEPS[2:4], "--train.length", "1 steps"))
    assert "page  " not in out
    assert "--report tries again" in err


@pytest.mark.slow
def test_a_run_without_its_images_has_its_figures(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"source: array:.*", "source: array:/nowhere/images.npz", config))
    found = anchors(report(copy))
    assert "/nowhere/images.npz" in capsys.readouterr().err
    assert "curves" in found
    assert "filters" not in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to look at: give --init"),
        (["--init", "a", "--runs", "b"], "both --init and --runs"),
        (["--runs", "a", "b"], "--runs needs --out"),
        (["--runs", "a", "a", "--out", "o"], "runs takes different run folders"),
        (["--init", "vit_tiny_patch16_224", "--data", "demo"], "give --out"),
        (["--init", "random:vit_tiny_patch16_224", "--out", "o"], "give --data"),
        (["--init", "a", "--images", "100"], "images must be at least 128"),
        (["--init", "a", "--shown", "0"], "shown must be at least 1"),
        (["--init", "a", "--patch", "3"], "patch takes a row and a column"),
    ],
)
def test_what_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(words, capsys)


def test_weights_and_runs_that_cannot_be_inspected(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "config.yaml").write_text("pretrain: {}\nfinetune: {}\n")
    (tmp_path / "file").write_text("")
    small = ["--init", "random:vit_tiny_patch16_224", "--img-size", "32", "--device", "cpu"]
    out = ["--data", source, "--out", str(tmp_path / "out")]
    for words, message in (
        (["--init", "random:resnet18", *out, "--device", "cpu"], "only its VisionTransformer can be"),
        ([*small, *out, "--patch", "2", "0"], "there are 2 rows and 2 columns of patches"),
        (["--runs", "/nowhere", *out[2:]], "/nowhere"),
        (["--init", str(tmp_path / "study")], "is a study; name one of its runs"),
        ([*small, "--data", source, "--out", str(tmp_path / "file" / "out")], "cannot write to --out"),
    ):
        assert message in refused(words, capsys)
