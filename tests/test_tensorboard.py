"""A run's events in the real TensorBoard: what its server makes of them, and what a browser shows."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import pytest

from mpp.pretraining.settings import PretrainConfig
from mpp.training.log import RunLog
from mpp.training.settings import OptimConfig
from tests.browser import open_browser, visit

pytestmark = pytest.mark.slow

KINDS = {"accuracy": 0.25, "accuracy_masked": 0.125, "accuracy_baseline_neighbours": 0.1875, "loss": 4.0}
# TensorBoard's own page says these of itself, in its version 2.21.
ITS_OWN = ("Multiple instances of Three.js", "paper-header-panel is deprecated", "paper-toolbar is deprecated")
ITS_OWN += ("GPU stall due to ReadPixels",)  # drawing without a graphics card


RUN = "first/tensorboard"


def write(folder: Path, resume: int, steps: range) -> None:
    """A start of a run: rows from the step after `resume`, some pictures, and features at the end."""
    log = RunLog(folder, resume, config=PretrainConfig(run_dir=str(folder), optim=OptimConfig(lr=2e-4)))
    rng = np.random.default_rng(0)
    if not resume:
        log.row(0, 0, {"fewshot/5shot": 0.5, "fewshot/5shot_std": 0.125})
    for step in steps:
        log.row(step, 8 * step, {**KINDS, "lr": 1e-3, "time/images_per_second": 100.0 + step})
        if step % 4 == 0:
            log.picture("reconstruction", step, rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
    thumbnails = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    labels = [f"kind {n % 3}" for n in range(12)]
    log.features("features", rng.normal(size=(12, 5)).astype(np.float32), labels, thumbnails)
    log.close()


Ask = Callable[..., Any]
"""`ask("scalars/scalars", run=..., tag=...)` is the server's answer; a first argument more is posted as JSON."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server of a run that was killed after step 6 and went on from its checkpoint of step 3, without few-shot."""
    logdir = tmp_path_factory.mktemp("tensorboard")
    write(logdir / "first", 0, range(1, 7))
    time.sleep(1)  # TensorBoard reads the files of a run in order of the second in which they began
    write(logdir / "first", 3, range(4, 9))
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in process.stderr)), None)
            assert found, "TensorBoard did not start"
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or its pipe would fill
            yield found[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def ask(address: str) -> Ask:
    """Asks the server, once it has read the events."""

    def ask(path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        posted = None if body is None else json.dumps(body).encode()
        url = f"{address}data/plugin/{path}?{urlencode(query)}".removesuffix("?")
        with urlopen(Request(url, posted, {"Content-Type": "application/json"}), timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if answer.headers.get_content_type() == "application/json" else content

    wait_for(lambda: ask("scalars/tags").get(RUN), time.sleep)
    return ask


def wait_for(ready: Callable[[], Any], sleep: Callable[[float], Any]) -> None:
    for _ in range(300):
        if ready():
            return
        sleep(0.1)
    pytest.fail("TensorBoard does not show it")


def test_its_scalars_are_those_of_the_resumed_run(ask: Ask) -> None:
    spread = {f"fewshot_spread/5shot_{end}" for end in ("std", "low", "high")}
    kinds = {"accuracy/all", "accuracy/masked", "accuracy/trivial_neighbours", "loss/all"}
    tags = ask("scalars/tags")
    assert tags.keys() == {RUN}
    assert tags[RUN].keys() == kinds | {"schedule/lr", "time/images_per_second", "fewshot/5shot"} | spread
    speed = ask("scalars/scalars", run=RUN, tag="time/images_per_second")
    assert [(step, value) for _, step, value in speed] == [(step, 100.0 + step) for step in range(1, 9)]
    for end, value in {"low": 0.375, "high": 0.625}.items():
        assert ask("scalars/scalars", run=RUN, tag=f"fewshot_spread/5shot_{end}")[0][1:] == [0, value]


def test_its_charts_are_still_those_of_the_whole_run(ask: Ask) -> None:
    layout = ask("custom_scalars/layout")["category"]
    assert {category["title"]: [chart["title"] for chart in category["chart"]] for category in layout} == {
        "What it learns": ["accuracy in training", "loss in training"],
        "What it is worth": ["few-shot accuracy, 5 images a class, ± standard deviation"],
        "How it runs": ["learning rate", "images per second"],
    }
    lines = ["accuracy/all", "accuracy/masked", "accuracy/trivial_neighbours"]
    assert layout[0]["chart"][0]["multiline"]["tag"] == lines
    edges = {"lower": "fewshot_spread/5shot_low", "upper": "fewshot_spread/5shot_high"}
    assert layout[1]["chart"][0]["margin"]["series"] == [{"value": "fewshot/5shot", **edges}]


def test_its_pictures_are_there(ask: Ask) -> None:
    assert ask("images/tags") == {RUN: {"reconstruction": {"displayName": "", "description": "", "samples": 1}}}
    pictures = ask("images/images", run=RUN, tag="reconstruction", sample="0")
    assert [picture["step"] for picture in pictures] == [4, 8]


def test_the_last_figures_stand_beside_the_settings(ask: Ask) -> None:
    body = {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_UNKNOWN"]}
    (group,) = ask("hparams/session_groups", body)["sessionGroups"]
    assert group["name"] == RUN
    assert group["hparams"]["optim.lr"] == pytest.approx(2e-4)
    assert group["hparams"]["model.name"] == "vit_base_patch16_224"
    assert "run_dir" not in group["hparams"]
    figures = {metric["name"]["tag"]: (metric["trainingStep"], metric["value"]) for metric in group["metricValues"]}
    assert figures["accuracy/masked"] == (8, 0.125)
    assert figures["fewshot/5shot"] == (0, 0.5)


def test_the_projector_has_one_embedding_with_labels_and_thumbnails(ask: Ask) -> None:
    assert ask("projector/runs") == [RUN]
    (entry,) = ask("projector/info", run=RUN)["embeddings"]
    assert (entry["tensorName"], entry["tensorShape"]) == ("features", [12, 5])
    assert entry["sprite"]["singleImageDim"] == [8, 8]
    which = {"run": RUN, "name": "features"}
    assert ask("projector/metadata", **which, num_rows="12").split(b"\n")[:2] == [b"kind 0", b"kind 1"]
    assert len(ask("projector/tensor", **which)) == 12 * 5 * 4
    assert ask("projector/sprite_image", **which).startswith(b"\x89PNG")


@pytest.mark.usefixtures("ask")
def test_a_browser_shows_it_and_asks_no_other_host(address: str) -> None:
    tabs = {
        "scalars": ["accuracy/masked", "fewshot/5shot"],
        "custom_scalars": ["What it learns", "accuracy in training", "few-shot accuracy, 5 images a class"],
        "images": ["reconstruction", RUN],
        "hparams": ["optim.lr", "accuracy/masked", RUN],
        "projector": ["Points: 12", "Dimension: 5", "1 tensor found"],
    }

    def visible(page: Any, text: str) -> bool:  # the projector and hparams are pages within the page
        return any(frame.get_by_text(text).locator("visible=true").count() for frame in page.frames)

    with open_browser() as browser:
        for tab, texts in tabs.items():
            with visit(browser, f"{address}#{tab}", viewport={"width": 1440, "height": 1000}) as opened:
                page = opened.page
                wait_for(lambda: all(visible(page, text) for text in texts), lambda s: page.wait_for_timeout(1000 * s))  # noqa: B023
                assert not [text for text in opened.problems if not any(own in text for own in ITS_OWN)]
                assert not opened.requests
