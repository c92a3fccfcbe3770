"""What the README says is so: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from benchmarks.settings import PLAN_ALIASES, PlanBench

import mpp
from mpp.cli import _ALIASES, _ENCODER, _FINETUNE, _with_images
from mpp.config import parse
from mpp.curation.settings import CheckRecipe, ShardRecipe
from mpp.downstream.settings import FewshotRecipe, FinetuneConfig, PredictRecipe, ProbeRecipe
from mpp.errors import UserError
from mpp.pretraining.settings import ConvertRecipe, PretrainConfig
from mpp.report.settings import VisualizeRecipe
from mpp.study.settings import StudyConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"^ {4}(?:torchrun .*?|python )(tools/\w+\.py .*)$", TEXT, re.MULTILINE)
TOOLS = {
    "tools/pretrain.py": (PretrainConfig, _ALIASES),
    "tools/finetune.py": (FinetuneConfig, _FINETUNE),
    "tools/fewshot.py": (FewshotRecipe, _ENCODER),
    "tools/probe.py": (ProbeRecipe, _ENCODER),
    "tools/predict.py": (PredictRecipe, {}),
    "tools/convert.py": (ConvertRecipe, {}),
    "tools/study.py": (StudyConfig, {}),
    "tools/visualize.py": (VisualizeRecipe, {}),
    "tools/check_data.py": (CheckRecipe, {}),
    "tools/shard.py": (ShardRecipe, {}),
    "tools/bench.py": (PlanBench, PLAN_ALIASES),
}


def test_the_python_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["tokens"].shape == (8, 197, 384)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tool, *words = (word for word in shlex.split(command, comments=True) if word != "...")
    cls, aliases = TOOLS[tool]
    if cls is PlanBench:
        assert words.pop(0) == "plan"
    config = parse(cls, _with_images(words) if cls is PredictRecipe else words, tool, "", aliases)
    if type(config) is PretrainConfig:
        assert config.data.source == "folder:/my/images"


@pytest.mark.parametrize("tool", sorted({*TOOLS} - {f"tools/{name}.py" for name in ("predict", "convert", "bench")}))
def test_what_a_missing_data_set_advises_is_a_flag_of_every_tool(tool: str) -> None:
    cls, aliases = TOOLS[tool]
    with pytest.raises(UserError, match="--download true fetches it") as missing:
        mpp.open_source("cifar10:nowhere")
    words = re.findall(r"(--download) (true)", str(missing.value))[0]
    config = parse(cls, ["--data", "cifar10:nowhere", *words], tool, "", aliases)
    assert getattr(config, "download", False) or config.data.download


def test_there_are_commands_for_every_tool() -> None:
    assert {command.partition(" ")[0] for command in COMMANDS} == set(TOOLS)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT))))
def test_the_links_lead_somewhere(link: str) -> None:
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists()
    if anchor:  # as GitHub makes them of headings
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", TEXT))))
def test_the_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", mpp.__all__)
def test_the_public_names_are_there(name: str) -> None:
    assert getattr(mpp, name).__name__ == name
    assert name in dir(mpp)
