"""Every shipped config: it parses, builds, can be trained on what it is meant for, and says what the paper says."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpp.pretraining.build
from mpp.cli.commands import ALIASES
from mpp.config import from_file, parse
from mpp.data.sources.base import Source
from mpp.data.sources.in_memory import ListSource
from mpp.dist import World
from mpp.downstream.labelled import label
from mpp.downstream.settings import FinetuneConfig
from mpp.downstream.tuning import build_tuning
from mpp.errors import UserError
from mpp.pretraining.build import build, build_model
from mpp.pretraining.encoder_choice import choose_encoder
from mpp.pretraining.settings import FewshotConfig, PretrainConfig
from mpp.study.settings import StudyConfig
from tests.runs import ROOT

CONFIGS = {
    tool: {path.stem: path for path in sorted((ROOT / "configs" / tool).glob("*.yaml"))}
    for tool in ("pretrain", "finetune", "study")
}
CLASSES: dict[str, type[Any]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "study": StudyConfig}
NAMES, STUDIES = CONFIGS["pretrain"], CONFIGS["study"]
# The paper's table 1: millions of parameters; layers, width, MLP, patch.
PAPER = {"paper_b16": (86, 12, 768, 3072, 16), "paper_l16": (307, 24, 1024, 4096, 16)}
PAPER |= {"paper_h14": (632, 32, 1280, 5120, 14)}
# Images that each config was written for; JFT-300M has about 303 million.
SMALL = {"base": 20_000, "cifar10_ti4": 50_000, "demo": 3_000, "in1k_b16": 1_281_167}
BEST = {"best_base": "base", "best_cifar10_ti4": "cifar10_ti4"}
IMAGES = SMALL | {name: SMALL[faithful] for name, faithful in BEST.items()} | dict.fromkeys(PAPER, 303 * 10**6)
CPU = torch.device("cpu")


def load(name: str) -> PretrainConfig:
    return from_file(PretrainConfig, NAMES[name])


def test_they_are_all_there() -> None:
    kinds = ("ablation", "best", "continue", "length")
    kinds += ("benefit", "benefit_compute", "benefit_few", "benefit_words")
    assert set(NAMES) == set(IMAGES)
    assert set(CONFIGS["finetune"]) == {"paper", "modern"}
    assert set(STUDIES) == {"benefit_gpu", *(f"{kind}_cpu" for kind in kinds)}


def command(path: Path, tool: str) -> tuple[list[str], str]:
    """The words behind the tool in the command of the comment that a config opens with, and the rest of the comment."""
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    text = "\n".join(line.removeprefix("#").strip() for line in lines[:end]).replace("\\\n", " ")
    before, _, after = text.partition(f"tools/{tool}.py ")
    line, _, rest = after.partition("\n")
    line, gap, remark = line.partition("   (")  # `command    (remark)`
    if before.splitlines()[-1].count("(") == 1:  # `make demo   (or: python tools/pretrain.py ...)`
        line = line.removesuffix(")")
    return shlex.split(line), "\n".join([*before.splitlines()[:-1], gap + remark, rest])


def mentioned(cls: type[Any], prose: str, aliases: dict[str, str]) -> list[str]:
    """The flags that a text mentions, each with its value where it has one."""

    def parses(argv: list[str]) -> bool:
        try:
            parse(cls, argv, "", "", aliases)
        except UserError:
            return False
        return True

    argv: list[str] = []
    for flag, value in re.findall(r'(--[a-z][a-z_.-]*)(?: ("[^"]+"|[^\s`()]+))?', prose):
        tries = [[flag, value.strip('".,;')], [flag]] if value else [[flag]]
        argv += next((words for words in tries if parses([*argv, *words])), tries[0])
    return argv


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool, paths in CONFIGS.items() for name in paths])
def test_it_opens_with_a_command_that_works_and_mentions_settings_that_exist(
    tool: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path, cls, aliases = CONFIGS[tool][name], CLASSES[tool], {} if tool == "study" else ALIASES
    words, prose = command(path, tool)
    assert words[: words.index("--config") + 2][-1] == str(path.relative_to(ROOT))
    config, file = parse(cls, words, tool, "", aliases), from_file(cls, path)
    assert config.run_dir
    if tool == "study":
        config, file = config.finetune, file.finetune
    if tool == "pretrain":
        assert config.data.source
    # What the command leaves alone is the file's.
    parts = ("model", "objective", "train") if tool == "pretrain" else ("model", "optim", "train", "loss", "schedule")
    assert all(getattr(config, part) == getattr(file, part) for part in parts)
    parse(cls, mentioned(cls, prose, aliases), tool, "", aliases)


def parameters(layers: int, width: int, mlp: int, patch: int) -> int:
    """Of an encoder for 224 pixels, by the formula."""
    attention, norm = 4 * (width * width + width), 2 * width
    block = attention + 2 * norm + (width * mlp + mlp) + (mlp * width + width)
    tokens = (224 // patch) ** 2 + 1
    return (3 * patch**2 + 1) * width + width + tokens * width + layers * block + norm


@pytest.mark.parametrize("name", NAMES)
def test_its_model_and_objective_build(name: str) -> None:
    config = load(name)
    config = replace(config, model=choose_encoder(config.model, IMAGES[name], 224, cpu=False)[0])
    model = build_model(config, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.out_features == model.target.outputs == 512
    height, width = config.model.image_hw
    assert model.encoder.grid == (height // model.encoder.patch[0], width // model.encoder.patch[1])
    if name in PAPER:
        assert sum(parameter.numel() for parameter in model.encoder.parameters()) == parameters(*PAPER[name][1:])


def test_parameters_are_the_paper_s_table_1() -> None:
    """The table counts the encoder with the classifier of ImageNet's 1,000 classes: 86.6M, 306.5M, 632.0M.

    Its 307M for ViT-L are those of L/32; the patches of L/16 are smaller and more, which makes 304.3M.
    """
    for name, (millions, layers, width, mlp, patch) in PAPER.items():
        found = parameters(layers, width, mlp, 32 if name == "paper_l16" else patch) + 1000 * (width + 1)
        assert found / 1e6 == pytest.approx(millions, abs=0.6)


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
def test_the_best_recipes_differ_from_the_faithful_ones_in_objective_and_crops_alone(name: str, faithful: str) -> None:
    best, usual = load(name), load(faithful)
    assert best.objective != usual.objective
    assert (best.objective.words, best.data.crop_scale) == (4, (0.6, 1))
    assert replace(best, objective=usual.objective, data=replace(best.data, crop_scale=usual.data.crop_scale)) == usual


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


def shallow(config: PretrainConfig) -> PretrainConfig:
    """With as small a model as its objective allows, and no few-shot evaluation."""
    small = replace(config.model, depth=config.objective.mask_enters + 1, embed_dim=48, num_heads=3)
    return replace(config, model=small, fewshot=FewshotConfig())


@pytest.mark.parametrize("name", NAMES)
def test_its_schedule_fits_the_images_that_it_is_meant_for(name: str, unread) -> None:
    unread(IMAGES[name])
    config = load(name)
    run = build(shallow(config), World(), CPU)
    total, rate = run.schedule.total_steps, run.schedule.rate
    warmup = run.steps("schedule.warmup")
    assert 1 < warmup < total / 2
    assert rate(0) == 0 < rate(1) < rate(warmup) == pytest.approx(run.config.optim.lr)
    assert rate(warmup) > rate((warmup + total) // 2) > rate(total) == pytest.approx(0, abs=1e-12)
    assert run.schedule.accumulate * run.micro_batch == run.config.train.batch_size
    for setting in ("checkpoint.every", "log.every"):
        assert 1 <= run.steps(setting) <= total / 4
    if name in PAPER:
        assert (total, warmup) == (1_000_000, 10_000)
        assert 13 < total * run.schedule.batch_size / IMAGES[name] < 14  # "14 epochs"


def labelled(images: int, classes: int = 10):
    """Labelled images that are one pixel each."""
    pixels, labels = np.zeros((images, 1, 1, 3), np.uint8), np.arange(images) % classes
    return label(ListSource(pixels, labels), ListSource(pixels[:classes], labels[:classes]))


@pytest.mark.parametrize("name", CONFIGS["finetune"])
def test_fine_tuning_can_be_built_as_it_says(name: str) -> None:
    config = replace(from_file(FinetuneConfig, CONFIGS["finetune"][name]), init="random:vit_tiny_patch16_224")
    parts = build_tuning(config, labelled(10_000), 1e-3, World(), CPU)
    assert parts.schedule.rate(0) == 0
    assert parts.schedule.rate(parts.schedule.total_steps) == pytest.approx(0, abs=1e-12)
    assert parts.schedule.accumulate * parts.micro_batch == parts.config.train.batch_size
    side = config.model.img_size[0] if config.model.img_size else 224
    model: Any = parts.model
    assert (model.patch_embed.img_size, model.head.out_features) == ((side, side), 10)
    assert (parts.state.ema is not None) == (name == "modern")


def test_the_paper_s_fine_tuning_says_what_appendix_b_1_1_says() -> None:
    config = from_file(FinetuneConfig, CONFIGS["finetune"]["paper"])
    assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == ("sgd", 0.9, 0)
    assert (config.optim.lr, config.optim.clip_norm, config.optim.layer_decay) == ((0.003, 0.01, 0.03, 0.06), 1, 1)
    assert (config.train.batch_size, config.train.length, config.schedule.warmup) == (512, "20k steps", "500 steps")
    assert (config.schedule.kind, config.model.img_size, config.model.head) == ("cosine", (384,), "linear")
    assert (config.loss.smoothing, config.loss.mixup, config.loss.cutmix) == (0, 0, 0)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_s_two_recipes_can_be_built(name: str, unread) -> None:
    config = from_file(StudyConfig, STUDIES[name])
    unread(50_000)
    arms = config.parsed_arms()
    for arm in arms[1:]:
        build_model(shallow(arm.pretrain), "meta")
    build_model(arms[0].pretrain, "meta")
    first = shallow(arms[0].pretrain)
    assert build(first, World(), CPU).schedule.total_steps > 300
    sizes = ("name", "img_size", "patch_size", "embed_dim", "depth", "num_heads")
    model = replace(config.finetune.model, **{size: getattr(first.model, size) for size in sizes})
    train = replace(config.finetune.train, length=config.lengths[0])
    data = replace(config.finetune.data, cache="none")  # of images that are one pixel each
    one = replace(config.finetune, init="none", model=model, train=train, data=data)
    assert build_tuning(one, labelled(500), one.optim.lr[0], World(), CPU).schedule.total_steps > 100
