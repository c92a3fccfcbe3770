"""A run's events in the real TensorBoard: what its server makes of them, and what a browser shows."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import pytest

from mpp.pretraining.settings import PretrainConfig
from mpp.training.log import RunLog
from tests.browser import open_browser, visit

pytestmark = pytest.mark.slow

SHOTS = {"fewshot/5shot": 0.5, "fewshot/5shot_std": 0.125}
KINDS = {"accuracy": 0.25, "accuracy_masked": 0.125, "accuracy_baseline_neighbours": 0.1875, "loss": 4.0}
# TensorBoard's own page says these of itself, in its version 2.21.
ITS_OWN = ("Multiple instances of Three.js", "paper-header-panel is deprecated", "paper-toolbar is deprecated")
ITS_OWN += ("GPU stall due to ReadPixels",)  # drawing without a graphics card


def start(folder: Path, resume: int, steps: range) -> None:
    """A start of a run: rows from the step after `resume`, some pictures, and features at the end."""
    log = RunLog(folder, resume, config=PretrainConfig(run_dir=str(folder)))
    rng = np.random.default_rng(0)
    if not resume:
        log.row(0, 0, SHOTS)
    for step in steps:
        log.row(step, 8 * step, {**KINDS, "lr": 1e-3, "time/images_per_second": 100.0 + step})
        if step % 4 == 0:
            log.picture("reconstruction", step, rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
    thumbnails = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    log.features(
        "features", rng.normal(size=(12, 5)).astype(np.float32), [f"kind {n % 3}" for n in range(12)], thumbnails
    )
    log.close()


@dataclass(frozen=True)
class Server:
    address: str

    def ask(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        url = f"{self.address}data/plugin/{path}" + (f"?{urlencode(query)}" if query else "")
        posted = None if body is None else json.dumps(body).encode()
        with urlopen(Request(url, posted, {"Content-Type": "application/json"}), timeout=60) as answer:
            held = answer.read()
        return json.loads(held) if answer.headers.get_content_type() == "application/json" else held


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 6 and went on from its checkpoint of step 3 without looking at shots again."""
    folder = tmp_path_factory.mktemp("tensorboard")
    start(folder / "first", 0, range(1, 7))
    time.sleep(1)  # TensorBoard reads the files of a run in order of the second in which they began
    start(folder / "first", 3, range(4, 9))
    return folder


@pytest.fixture(scope="module")
def server(logdir: Path) -> Iterator[Server]:
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                found = re.search(r"http://127\.0\.0\.1:\d+/", line)
                if found:
                    break
            else:
                pytest.fail(f"TensorBoard did not start: {''.join(said)}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or its pipe would fill
            server = Server(found[0])
            wait_for(lambda: server.ask("scalars/tags").get(RUN))
            yield server
        finally:
            process.terminate()


RUN = "first/tensorboard"


def wait_for(ready: Callable[[], Any]) -> None:
    for _ in range(300):
        if ready():
            return
        time.sleep(0.1)
    pytest.fail("TensorBoard does not read the events")


def test_its_scalars_are_those_of_the_resumed_run(server: Server) -> None:
    spread = {f"fewshot_spread/5shot_{end}" for end in ("std", "low", "high")}
    kinds = {"accuracy/all", "accuracy/masked", "accuracy/trivial_neighbours", "loss/all"}
    tags = server.ask("scalars/tags")
    assert tags.keys() == {RUN}
    assert tags[RUN].keys() == kinds | {"schedule/lr", "time/images_per_second", "fewshot/5shot"} | spread
    speed = server.ask("scalars/scalars", run=RUN, tag="time/images_per_second")
    assert [(step, value) for _, step, value in speed] == [(step, 100.0 + step) for step in range(1, 9)]
    edges = {end: server.ask("scalars/scalars", run=RUN, tag=f"fewshot_spread/5shot_{end}") for end in ("low", "high")}
    assert {end: held[0][1:] for end, held in edges.items()} == {"low": [0, 0.375], "high": [0, 0.625]}


def test_its_charts_are_still_those_of_the_whole_run(server: Server) -> None:
    layout = server.ask("custom_scalars/layout")["category"]
    titles = {category["title"]: [chart["title"] for chart in category["chart"]] for category in layout}
    assert titles == {
        "What it learns": ["accuracy in training", "loss in training"],
        "What it is worth": ["few-shot accuracy, 5 images a class, ± standard deviation"],
        "How it runs": ["learning rate", "images per second"],
    }
    assert layout[0]["chart"][0]["multiline"]["tag"] == [
        "accuracy/all",
        "accuracy/masked",
        "accuracy/trivial_neighbours",
    ]
    (band,) = layout[1]["chart"][0]["margin"]["series"]
    assert band == {
        "value": "fewshot/5shot",
        "lower": "fewshot_spread/5shot_low",
        "upper": "fewshot_spread/5shot_high",
    }


def test_its_pictures_are_there(server: Server) -> None:
    assert server.ask("images/tags") == {RUN: {"reconstruction": {"displayName": "", "description": "", "samples": 1}}}
    pictures = server.ask("images/images", run=RUN, tag="reconstruction", sample="0")
    assert [picture["step"] for picture in pictures] == [4, 8]


def test_the_last_figures_stand_beside_the_settings(server: Server) -> None:
    (group,) = server.ask(
        "hparams/session_groups", {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_UNKNOWN"]}
    )["sessionGroups"]
    assert group["name"] == RUN
    assert group["hparams"]["optim.lr"] == pytest.approx(2e-4)
    assert group["hparams"]["model.name"] == "vit_base_patch16_224"
    assert "run_dir" not in group["hparams"]
    figures = {metric["name"]["tag"]: (metric["trainingStep"], metric["value"]) for metric in group["metricValues"]}
    assert figures["accuracy/masked"] == (8, 0.125)
    assert figures["fewshot/5shot"] == (0, 0.5)


def test_the_projector_has_one_embedding_with_labels_and_thumbnails(server: Server) -> None:
    assert server.ask("projector/runs") == [RUN]
    (entry,) = server.ask("projector/info", run=RUN)["embeddings"]
    assert (entry["tensorName"], entry["tensorShape"]) == ("features", [12, 5])
    assert entry["sprite"]["singleImageDim"] == [8, 8]
    which = {"run": RUN, "name": "features"}
    assert server.ask("projector/metadata", **which, num_rows="12").split(b"\n")[:2] == [b"kind 0", b"kind 1"]
    assert len(server.ask("projector/tensor", **which)) == 12 * 5 * 4
    assert server.ask("projector/sprite_image", **which).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.mark.parametrize(
    ("tab", "shown"),
    [
        ("scalars", ["accuracy/masked", "fewshot/5shot"]),
        ("custom_scalars", ["What it learns", "accuracy in training", "few-shot accuracy, 5 images a class"]),
        ("images", ["reconstruction", RUN]),
        ("hparams", ["optim.lr", "accuracy/masked", RUN]),
        ("projector", ["Points: 12", "Dimension: 5", "1 tensor found"]),
    ],
)
def test_a_browser_shows_it_and_asks_no_other_host(server: Server, browser: Any, tab: str, shown: list[str]) -> None:
    with visit(browser, f"{server.address}#{tab}", viewport={"width": 1440, "height": 1000}) as opened:
        # The projector and hparams are pages within the page.
        for text in shown:
            wait_until(opened.page, lambda text=text: any(seen(frame, text) for frame in opened.page.frames), text)
        problems = [text for text in opened.problems if not any(own in text for own in ITS_OWN)]
        assert problems == []
        assert opened.requests == []


def seen(frame: Any, text: str) -> bool:
    return frame.get_by_text(text).locator("visible=true").count() > 0


def wait_until(page: Any, ready: Callable[[], bool], what: str) -> None:
    for _ in range(300):
        if ready():
            return
        page.wait_for_timeout(100)
    pytest.fail(f"{what!r} is not shown")
