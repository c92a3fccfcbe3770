"""Settings as they are written, read back and compared."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.config import differences, from_file, parse, to_dict, to_yaml
from mpp.data.settings import DataConfig
from mpp.pretraining.settings import PretrainConfig
from tests.config.recipe import Encoder, Optimiser, Recipe, Source

WRITTEN = """\
run_dir: runs/first
compile: auto
dry_run: false
encoder:
  name: vit_base
  size: [224, 160]
  width: null
  remat: false
optim:
  lr: 0.0002
  betas: [0.9, 0.999]
  kind: adamw
  log_every: 50 steps
data:
  source: ''
  workers: -1
"""


def test_to_yaml_reads_well() -> None:
    assert to_yaml(Recipe(run_dir="runs/first", encoder=Encoder(size=(224, 160)))) == WRITTEN


# Characters of any kind, surrogates included: a path may hold bytes that are no UTF-8.
odd = ["null", "~", "off", "1e-3", "--help", "-h", "<<", "=", "---", ".inf"]
texts = st.text(st.characters()) | st.sampled_from(odd)
numbers = st.floats(allow_nan=False)
recipes = st.builds(
    Recipe,
    run_dir=texts,
    compile=st.sampled_from(["auto", "on", "off"]),
    dry_run=st.booleans(),
    encoder=st.builds(
        Encoder,
        name=texts,
        size=st.lists(st.integers()).map(tuple),
        width=st.none() | st.integers(),
        remat=st.booleans(),
    ),
    optim=st.builds(Optimiser, lr=st.floats(0, exclude_min=True), betas=st.tuples(numbers, numbers), log_every=texts),
    data=st.builds(Source, source=texts, workers=st.integers()),
)


@given(config=recipes)
@settings(max_examples=60, deadline=None)
def test_what_to_yaml_writes_is_read_back_exactly(config: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = from_file(Recipe, path)
    assert again == config
    assert repr(again) == repr(config)  # tells -0.0 from 0.0, 1 from 1.0


def test_the_pretraining_recipe_is_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(PretrainConfig()), encoding="utf-8")
    assert from_file(PretrainConfig, path) == PretrainConfig()
    assert parse(PretrainConfig, ["--config", str(path)], "pretrain", "", {}) == PretrainConfig()


DIFFERENCES: list[tuple[Any, list[str]]] = [
    (Recipe(), []),
    (Recipe(optim=Optimiser(lr=1e-3)), ["optim.lr: 0.0002 -> 0.001"]),
    (Recipe(compile="on", optim=Optimiser(kind="adam")), ['compile: "auto" -> "on"', 'optim.kind: "adamw" -> "adam"']),
    (Recipe(encoder=Encoder(name="vit_small", size=(8, 9), width=3, remat=True)), [
        "encoder.size: [224] -> [8, 9]", "encoder.width: null -> 3", "encoder.remat: false -> true"
    ]),
    (Recipe(run_dir="elsewhere", optim=Optimiser(log_every="5%")), []),
    (Recipe(data=Source(source="demo", workers=3)), []),
]  # fmt: skip


@pytest.mark.parametrize(("new", "lines"), DIFFERENCES)
def test_differences_leave_free_fields_and_free_groups_out(new: Recipe, lines: list[str]) -> None:
    assert differences(Recipe, to_dict(Recipe()), to_dict(new)) == lines


def test_some_values_of_a_setting_may_stand_for_each_other() -> None:
    """An older run's config says none where the default is auto by now."""
    none, auto, pixels = (to_dict(PretrainConfig(data=DataConfig(cache=cache))) for cache in ("none", "auto", "pixels"))
    assert differences(PretrainConfig, none, auto) == differences(PretrainConfig, auto, none) == []
    assert differences(PretrainConfig, auto, pixels) == ['data.cache: "auto" -> "pixels"']
    assert differences(PretrainConfig, pixels, none) == ['data.cache: "pixels" -> "none"']


def test_differences_see_settings_that_came_and_went_but_no_nan() -> None:
    old = to_dict(replace(Recipe(), optim=Optimiser(betas=(math.nan, 1))))
    new = to_dict(replace(Recipe(), optim=Optimiser(betas=(math.nan, 1.0))))
    assert differences(Recipe, old, new) == []
    del old["compile"]
    del new["encoder"]["width"]
    assert differences(Recipe, old, new) == ['compile: absent -> "auto"', "encoder.width: null -> absent"]


def test_credentials_are_neither_written_nor_compared() -> None:
    def named(name: str) -> Recipe:
        return Recipe(encoder=Encoder(name=name))

    secret = "shards:https://user:SECRET@host/a-{0..9}.tar?sig=ONE s3://key:TOO@bucket/b.tar"
    assert "shards:https://host/a-{0..9}.tar s3://bucket/b.tar" in to_yaml(named(secret))
    assert differences(Recipe, to_dict(named(secret)), to_dict(named(secret.replace("ONE", "TWO")))) == []
    (line,) = differences(Recipe, to_dict(named(secret)), to_dict(named(secret.replace("a-", "c-"))))
    assert "host/c-" in line
    assert not any(word in line for word in ("SECRET", "ONE", "TOO"))
