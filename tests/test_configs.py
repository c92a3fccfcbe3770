"""Every shipped config: it parses, builds, can be trained on what it is meant for, and says what the paper says."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpp.pretraining.build
from mpp.cli import _ALIASES
from mpp.config import from_file, parse
from mpp.data.sources.base import Source
from mpp.data.sources.in_memory import ListSource
from mpp.dist import World
from mpp.downstream.labelled import label
from mpp.downstream.settings import FinetuneConfig
from mpp.downstream.tuning import build_tuning
from mpp.errors import UserError
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig
from mpp.pretraining.build import build, build_model
from mpp.pretraining.settings import FewshotConfig, PretrainConfig
from mpp.study.settings import StudyConfig

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
NAMES = [path.stem for path in PATHS]
PAPER = {"paper_b16": 86, "paper_l16": 307, "paper_h14": 632}
# Images that each config was written for; JFT-300M has about 303 million.
SMALL = {"base": 20_000, "cifar10_ti4": 50_000, "demo": 3_000, "in1k_b16": 1_281_167}
BEST = {"best_base": "base", "best_cifar10_ti4": "cifar10_ti4"}
IMAGES = SMALL | {name: SMALL[faithful] for name, faithful in BEST.items()} | dict.fromkeys(PAPER, 303 * 10**6)


def load(name: str) -> PretrainConfig:
    return from_file(PretrainConfig, ROOT / "configs" / "pretrain" / f"{name}.yaml")


def header(path: Path) -> list[str]:
    """The comment that a config opens with."""
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def command(path: Path, tool: str = "pretrain") -> tuple[list[str], str]:
    """The words behind the tool in the header's command, and the rest of the header."""
    text = "\n".join(header(path)).replace("\\\n", " ")
    before, _, after = text.partition(f"tools/{tool}.py ")
    line, _, rest = after.partition("\n")
    line, gap, remark = line.partition("   (")  # `command    (remark)`
    if before.splitlines()[-1].count("(") == 1:  # `make demo   (or: python tools/pretrain.py ...)`
        line = line.removesuffix(")")
    prose = "\n".join([*before.splitlines()[:-1], gap + remark, rest])
    return shlex.split(line), prose


def test_the_issue_s_configs_are_all_there() -> None:
    assert set(NAMES) == set(IMAGES)


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_and_its_model_and_objective_build(name: str) -> None:
    config = load(name)
    model = build_model(config, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.out_features == model.target.outputs == 512
    height, width = config.model.image_hw
    assert model.encoder.grid == (height // model.encoder.patch[0], width // model.encoder.patch[1])


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_it_opens_with_a_command_that_works(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words, _ = command(path)
    assert words[: words.index("--config") + 2][-1] == str(path.relative_to(ROOT))
    config = parse(PretrainConfig, words, "pretrain", "", _ALIASES)
    assert config.data.source
    assert config.run_dir
    # What the command leaves alone is the file's.
    file = from_file(PretrainConfig, path)
    assert (config.model, config.objective, config.train) == (file.model, file.objective, file.train)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_settings_that_its_header_mentions_exist(path: Path) -> None:
    parse(PretrainConfig, mentioned(PretrainConfig, command(path)[1]), "pretrain", "", _ALIASES)


def mentioned(cls: type[Any], prose: str) -> list[str]:
    """The flags that a text mentions, each with its value where it has one."""
    argv: list[str] = []
    for flag, value in re.findall(r'(--[a-z][a-z_.-]*)(?: ("[^"]+"|[^\s`()]+))?', prose):
        tries = [[flag, value.strip('".,;')], [flag]] if value else [[flag]]
        argv += next((words for words in tries if parses(cls, [*argv, *words])), tries[0])
    return argv


def parses(cls: type[Any], argv: list[str]) -> bool:
    try:
        parse(cls, argv, "", "", _ALIASES)
    except UserError:
        return False
    return True


def count(config: ModelConfig, classes: int) -> int:
    """Parameters of the encoder, and of a linear classifier on top of it."""
    encoder = build_encoder(config, "meta")
    return sum(parameter.numel() for parameter in encoder.parameters()) + classes * (encoder.embed_dim + 1)


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_the_paper_s_table_1(name: str) -> None:
    """The table counts the encoder with the classifier of ImageNet's 1,000 classes: 86.6M, 306.5M, 632.0M.

    Its 307M for ViT-L are those of L/32; the patches of L/16 are smaller and more, which makes 304.3M.
    """
    config = load(name).model
    counted = dataclasses.replace(config, patch_size=(32,)) if name == "paper_l16" else config
    assert count(counted, 1000) / 1e6 == pytest.approx(PAPER[name], abs=0.6)


# Layers, width, MLP, patch: the paper's table 1.
SHAPES = {"paper_b16": (12, 768, 3072, 16), "paper_l16": (24, 1024, 4096, 16), "paper_h14": (32, 1280, 5120, 14)}


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_the_formula_s(name: str) -> None:
    layers, width, mlp, patch = SHAPES[name]
    attention, norm = 4 * (width * width + width), 2 * width
    block = attention + 2 * norm + (width * mlp + mlp) + (mlp * width + width)
    tokens = (224 // patch) ** 2 + 1
    expected = (3 * patch**2 + 1) * width + width + tokens * width + layers * block + norm
    assert count(load(name).model, 0) == expected


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_configs_say_what_appendix_b_1_2_says(name: str) -> None:
    config = load(name)
    assert (config.optim.name, config.optim.lr) == ("adam", 2e-4)
    assert (config.optim.betas, config.optim.eps) == ((0.9, 0.999), 1e-8)
    assert (config.optim.weight_decay, config.optim.clip_norm, config.optim.ema_decay) == (0, 0, 0)
    assert (config.schedule.kind, config.schedule.cooldown) == ("cosine", "0 steps")
    assert config.train.batch_size == 4096
    objective = config.objective
    assert (objective.target, objective.bits) == ("mean_colour", 3)
    assert (objective.ratio, objective.split) == (0.5, (0.8, 0.1, 0.1))
    assert (objective.picking, objective.random_from) == ("uniform", "image")
    assert (config.model.pos_embed, config.model.act, config.model.drop_path) == ("learned", "gelu_tanh", 0)
    assert config.model.image_hw == (224, 224)


@pytest.mark.parametrize(("name", "faithful"), BEST.items())
def test_the_best_recipes_differ_from_the_faithful_ones_in_the_objective_alone(name: str, faithful: str) -> None:
    best = load(name)
    assert best.objective != load(faithful).objective
    assert dataclasses.replace(best, objective=load(faithful).objective) == load(faithful)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch):
    """Puts a source that has a length, and images that nobody can read, in the place of every other."""

    class Unread(Source):
        def __init__(self, length: int) -> None:
            super().__init__("unread")
            self.length = length

        def __len__(self) -> int:
            return self.length

        def image(self, index: int) -> bytes:
            raise OSError

        def quick_fingerprint(self, labelled: bool = True) -> str:
            return "unread"

    return lambda length: monkeypatch.setattr(mpp.pretraining.build, "open_images", lambda *_, **__: Unread(length))


@pytest.mark.parametrize("name", NAMES)
def test_its_schedule_fits_the_images_that_it_is_meant_for(name: str, unread) -> None:
    unread(IMAGES[name])
    config = load(name)
    small = dataclasses.replace(config.model, depth=config.objective.mask_enters + 1, embed_dim=48, num_heads=3)
    small = dataclasses.replace(config, model=small, fewshot=FewshotConfig())
    run = build(small, World(), torch.device("cpu"))
    total, rate = run.schedule.total_steps, run.schedule.rate
    warmup = run.steps("schedule.warmup")
    assert 1 < warmup < total / 2
    assert rate(0) == 0 < rate(1) < rate(warmup) == pytest.approx(config.optim.lr)
    assert rate(warmup) > rate((warmup + total) // 2) > rate(total) == pytest.approx(0, abs=1e-12)
    assert run.schedule.accumulate * run.micro_batch == config.train.batch_size
    for setting in ("checkpoint.every", "log.every"):
        assert 1 <= run.steps(setting) <= total / 4
    if name in PAPER:
        assert (total, warmup) == (1_000_000, 10_000)
        assert 13 < total * run.schedule.batch_size / IMAGES[name] < 14  # "14 epochs"


FINETUNE = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
STUDY = sorted((ROOT / "configs" / "study").glob("*.yaml"))
OTHERS = [*((path, "finetune", FinetuneConfig) for path in FINETUNE), *((path, "study", StudyConfig) for path in STUDY)]


def test_the_other_recipes_have_their_configs() -> None:
    assert {path.stem for path in FINETUNE} == {"paper", "modern"}
    on_a_cpu = {
        f"{kind}_cpu" for kind in ("benefit", "benefit_few", "benefit_long", "ablation", "best", "length", "continue")
    }
    assert {path.stem for path in STUDY} == {"benefit_gpu", *on_a_cpu}


@pytest.mark.parametrize(("path", "tool", "cls"), OTHERS, ids=[path.stem for path, _, _ in OTHERS])
def test_the_other_recipes_open_with_a_command_that_works(
    path: Path, tool: str, cls: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words, prose = command(path, tool)
    assert words[: words.index("--config") + 2][-1] == str(path.relative_to(ROOT))
    aliases = _ALIASES if tool == "finetune" else {}
    config = parse(cls, words, tool, "", aliases)
    assert config.run_dir
    file = from_file(cls, path)
    for part in ("model", "optim", "train", "loss", "schedule"):
        ours, theirs = (getattr(c if tool == "finetune" else c.finetune, part) for c in (config, file))
        assert ours == theirs
    parse(cls, mentioned(cls, prose), tool, "", aliases)


def labelled(images: int, classes: int = 10):
    """Labelled images that are one pixel each."""
    pixels, labels = np.zeros((images, 1, 1, 3), np.uint8), np.arange(images) % classes
    return label(ListSource(pixels, labels), ListSource(pixels[:classes], labels[:classes]))


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_fine_tuning_can_be_built_as_it_says(path: Path) -> None:
    config = dataclasses.replace(from_file(FinetuneConfig, path), init="random:vit_tiny_patch16_224")
    parts = build_tuning(config, labelled(10_000), config.optim.lr[0], World(), torch.device("cpu"))
    total = parts.schedule.total_steps
    assert parts.schedule.rate(0) == 0
    assert parts.schedule.rate(total) == pytest.approx(0, abs=1e-12)
    assert parts.schedule.accumulate * parts.micro_batch == config.train.batch_size
    side = config.model.img_size[0] if config.model.img_size else 224
    model: Any = parts.model
    assert model.patch_embed.img_size == (side, side)
    assert model.head.out_features == 10
    assert (parts.state.ema is not None) == (path.stem == "modern")


def test_the_paper_s_fine_tuning_says_what_appendix_b_1_1_says() -> None:
    config = from_file(FinetuneConfig, ROOT / "configs" / "finetune" / "paper.yaml")
    assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == ("sgd", 0.9, 0)
    assert (config.optim.lr, config.optim.clip_norm, config.optim.layer_decay) == ((0.003, 0.01, 0.03, 0.06), 1, 1)
    assert (config.train.batch_size, config.train.length, config.schedule.warmup) == (512, "20k steps", "500 steps")
    assert (config.schedule.kind, config.model.img_size, config.model.head) == ("cosine", (384,), "linear")
    assert (config.loss.smoothing, config.loss.mixup, config.loss.cutmix) == (0, 0, 0)


@pytest.mark.parametrize("path", STUDY, ids=lambda path: path.stem)
def test_a_study_s_two_recipes_can_be_built(path: Path, unread) -> None:
    config = from_file(StudyConfig, path)
    unread(50_000)
    arms = config.parsed_arms()
    for arm in arms:
        build_model(arm.pretrain, "meta")
    first = arms[0].pretrain
    assert build(first, World(), torch.device("cpu")).schedule.total_steps > 300
    told = first.model
    model = dataclasses.replace(
        config.finetune.model, name=told.name, img_size=told.img_size, patch_size=told.patch_size,
        embed_dim=told.embed_dim, depth=told.depth, num_heads=told.num_heads,
    )  # fmt: skip
    for length in config.lengths:
        train = dataclasses.replace(config.finetune.train, length=length)
        data = dataclasses.replace(config.finetune.data, cache="none")  # of images that are one pixel each
        one = dataclasses.replace(config.finetune, init="none", model=model, train=train, data=data)
        parts = build_tuning(one, labelled(500), one.optim.lr[0], World(), torch.device("cpu"))
        assert parts.schedule.total_steps > 100
