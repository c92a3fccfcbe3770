"""Settings: what is accepted from YAML and from flags, and the one line that says what is not."""

import math
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.config import parse
from mpp.config.files import load_yaml
from mpp.errors import ConfigError
from mpp.pretraining.settings import PretrainConfig
from tests.config.recipe import Encoder, Optimiser, Recipe


def read(*argv: str) -> Recipe:
    """The command line's config."""
    return parse(Recipe, argv, "mpp", "A small recipe.", {"data": "data.source"})


def complaint(*argv: str) -> str:
    """The one line that a wrong command line gets."""
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "base.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def at(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_nothing_given_gives_the_defaults_of_the_recipe_not_of_its_groups() -> None:
    assert read() == Recipe()
    assert read("--encoder.width", "384").encoder == Encoder(name="vit_small", width=384)
    assert read("--optim.log-every", "100 steps").optim.log_every == "100 steps"  # one argument, with a space


FLAGS = [
    ("--run-dir runs/first", "run_dir", "runs/first"),
    ("--data folder:/images", "data.source", "folder:/images"),
    ("--data.source folder:/images", "data.source", "folder:/images"),
    ("--data=--odd", "data.source", "--odd"),
    ("--data.workers -1", "data.workers", -1),
    ("--optim.lr 2e-4", "optim.lr", 2e-4),
    ("--optim.lr 1", "optim.lr", 1.0),
    ("--optim.lr 1 --optim.lr 2", "optim.lr", 2.0),
    ("--optim.betas -0.5 -1e-3", "optim.betas", (-0.5, -0.001)),
    ("--optim.betas=0.5 .9", "optim.betas", (0.5, 0.9)),
    ("--optim.log-every=5%", "optim.log_every", "5%"),
    ("--encoder.size 224 160", "encoder.size", (224, 160)),
    ("--encoder.size", "encoder.size", ()),
    ("--encoder.width 384", "encoder.width", 384),
    ("--encoder.width None", "encoder.width", None),
    ("--encoder.width null", "encoder.width", None),
    ("--encoder.name=", "encoder.name", ""),
    ("--encoder.remat", "encoder.remat", True),
    ("--encoder.no-remat", "encoder.remat", False),
    ("--encoder.remat off", "encoder.remat", False),
    ("--dry-run --run-dir x", "dry_run", True),
    ("--no-dry-run", "dry_run", False),
    ("--dry_run=true", "dry_run", True),
    ("--compile off", "compile", "off"),
]


@pytest.mark.parametrize(("argv", "name", "value"), FLAGS)
def test_flags(argv: str, name: str, value: Any) -> None:
    result = at(read(*argv.split()), name)
    assert result == value
    assert type(result) is type(value)


YAML = [
    ("compile: off", "compile", "off"),
    ("compile: 'off'", "compile", "off"),
    ("optim: {lr: 1e-3}", "optim.lr", 1e-3),
    ("optim: {lr: .inf}", "optim.lr", math.inf),
    ("optim: {lr: inf}", "optim.lr", math.inf),
    ("optim.lr: 1e-3", "optim.lr", 1e-3),
    ("optim: {log_every: 100 epochs}", "optim.log_every", "100 epochs"),
    ("optim: {log_every: 010}", "optim.log_every", "010"),
    ("encoder: {size: 224}", "encoder.size", (224,)),
    ("encoder: {size: [224, 160]}", "encoder.size", (224, 160)),
    ("encoder: {size: []}", "encoder.size", ()),
    ("encoder: {width: null}", "encoder.width", None),
    ("encoder: {width: }", "encoder.width", None),
    ("encoder: {width: ~}", "encoder.width", None),
    ("encoder: {name: 'null'}", "encoder.name", "null"),
    ("encoder: {remat: true}", "encoder.remat", True),
    ("encoder: {remat: No}", "encoder.remat", False),
    ("dry_run: on", "dry_run", True),
    ("data: folder:/images", "data.source", "folder:/images"),
    ("data: {source: folder:/images}", "data.source", "folder:/images"),
    ("data: {source: --help}", "data.source", "--help"),
    ("data: {workers: -1}", "data.workers", -1),
    ("optim:\n  # lr: 3\n", "optim", Optimiser()),
    ("# nothing\n", "optim", Optimiser()),
    ("\ufeffcompile: on", "compile", "on"),
    ("encoder: &e {name: &n x}\nrun_dir: *n", "run_dir", "x"),
    ("encoder: {<<: {name: x, width: 3}, name: y}", "encoder", Encoder(name="y", width=3)),
]


@pytest.mark.parametrize(("text", "name", "value"), YAML)
def test_yaml(text: str, name: str, value: Any, yaml_file) -> None:
    path = yaml_file(text)
    result = at(read("--config", path), name)
    assert result == value
    assert type(result) is type(value)


def test_flags_override_the_file_wherever_it_is_named(yaml_file) -> None:
    path = yaml_file("optim: {lr: 1e-3, kind: adam}")
    for argv in (["--config", path, "--optim.lr", "3"], ["--optim.lr", "3", f"--config={path}"]):
        assert read(*argv).optim == Optimiser(lr=3.0, kind="adam")


WRONG_FLAGS = [
    ("--optim.lrr 3", "no setting '--optim.lrr'; did you mean '--optim.lr'?"),
    ("--lr 3", "no setting '--lr'; did you mean '--optim.lr'?"),
    ("--encoder.lr 3", "no setting '--encoder.lr'; did you mean '--optim.lr'?"),
    ("--Optim.LR=3", "no setting '--Optim.LR'; did you mean '--optim.lr'?"),
    ("--rundir x", "no setting '--rundir'; did you mean '--run-dir'?"),
    ("--logevery x", "no setting '--logevery'; did you mean '--optim.log-every'?"),
    ("--confg x", "no setting '--confg'; did you mean '--config'?"),
    ("--no-dry-runn", "no setting '--no-dry-runn'; did you mean '--dry-run'?"),
    ("--xyzzy 3", "no setting '--xyzzy'; --help lists them all"),
    ("--", "no setting '--'; --help lists them all"),
    ("--optim 3", "no setting '--optim': it is a group of settings, such as --optim.lr, --optim.betas, --optim.kind"),
    ("--optim.lr abc", "--optim.lr: takes a number, got 'abc'"),
    ("--optim.lr", "--optim.lr: takes a number, got nothing"),
    ("--optim.lr 1 2", "--optim.lr: takes a number, got '1' '2'"),
    ("--optim.lr=--help", "--optim.lr: takes a number, got '--help'"),
    ("--optim.lr x --optim.lr 3", "--optim.lr: takes a number, got 'x'"),
    ("--data.workers 1.5", "--data.workers: takes a whole number, got '1.5'"),
    ("--encoder.width x", "--encoder.width: takes a whole number or none, got 'x'"),
    ("--encoder.size 1 x", "--encoder.size: takes a list of whole numbers, got '1' 'x'"),
    ("--optim.betas 1", "--optim.betas: takes 2 numbers, got '1'"),
    ("--optim.kind adamww", "--optim.kind: takes one of adam, adamw, got 'adamww'; did you mean 'adamw'?"),
    ("--compile 7", "--compile: takes one of auto, on, off, got '7'"),
    ("--data a b", "--data: takes one text, got 'a' 'b'; put quotes around it"),
    ("--dry-run 7", "--dry-run: takes true or false, got '7'"),
    ("--no-dry-run true", "--no-dry-run: takes no value, got 'true'"),
    ("--optim.lr -3", "optim.lr must be positive, got -3.0"),
    ("stray --optim.lr 3", "unexpected 'stray'; settings are given as --NAME VALUE"),
    ("-x", "unexpected '-x'; settings are given as --NAME VALUE"),
    ("--config a.yaml --config b.yaml", "--config: given twice; it takes one file"),
    ("--config", "--config: takes one file, got nothing"),
    ("--config a.yaml b.yaml", "--config: takes one file, got 'a.yaml' 'b.yaml'"),
]


@pytest.mark.parametrize(("argv", "line"), WRONG_FLAGS)
def test_wrong_flags(argv: str, line: str) -> None:
    assert complaint(*argv.split()) == line


def test_a_name_in_several_groups_lists_them() -> None:
    with pytest.raises(ConfigError, match=r"'--\w+\.every' or '--\w+\.every' or '--\w+\.every'\?"):
        parse(PretrainConfig, ["--every", "3"], "pretrain", "", {})


WRONG_YAML = [
    ("optim: {lrr: 3}", "{path}: no setting 'optim.lrr'; did you mean 'optim.lr'?"),
    ("optm: {lr: 3}", "{path}: no setting 'optm'; did you mean 'optim'?"),
    ("run-dir: x", "{path}: no setting 'run-dir'; did you mean 'run_dir'?"),
    ("no_dry_run: true", "{path}: no setting 'no_dry_run'; did you mean 'dry_run'?"),
    ("optim: 3", "{path}: no setting 'optim': it is a group of settings, such as optim.lr, optim.betas, optim.kind"),
    ("optim: {lr: abc}", "{path}: optim.lr: takes a number, got 'abc'"),
    ("optim: {lr: {a: b}}", "{path}: optim.lr: takes a number, got {{'a': 'b'}}"),
    ("optim: {lr: }", "{path}: optim.lr: takes a number, got null"),
    ("optim: {lr: !!float 3}", "{path}: optim.lr: takes a number, got 3.0"),
    ("optim: {betas: [1, [2]]}", "{path}: optim.betas: takes 2 numbers, got '1' ['2']"),
    ("encoder: {size: [1, null]}", "{path}: encoder.size: takes a list of whole numbers, got '1' null"),
    ("encoder: {size: 224 160}", "{path}: encoder.size: takes a list of whole numbers, got '224 160'"),
    ("encoder: {name: [a, b]}", "{path}: encoder.name: takes one text, got ['a', 'b']"),
    ("dry_run: 7", "{path}: dry_run: takes true or false, got '7'"),
    ("dry_run: []", "{path}: dry_run: takes true or false, got []"),
    ("compile: of", "{path}: compile: takes one of auto, on, off, got 'of'; did you mean 'off'?"),
    ("optim: {lr: -3}", "{path}: optim.lr must be positive, got -3.0"),
    ("optim: {lr: 1}\noptim.lr: 2", "{path}: optim.lr is set twice"),
    ("data: x\ndata.source: y", "{path}: data.source is set twice"),
    ("optim:\n  lr: 1\n  lr: 2", "{path}:3: is not YAML that can be used: 'lr' is set twice"),
    ("- a", "{path}: holds no settings; a mapping such as 'optim: {{lr: 2e-4}}' is expected"),
    ("text", "{path}: holds no settings; a mapping such as 'optim: {{lr: 2e-4}}' is expected"),
]


@pytest.mark.parametrize(("text", "line"), WRONG_YAML)
def test_wrong_yaml(text: str, line: str, yaml_file) -> None:
    path = yaml_file(text)
    assert complaint("--config", path) == line.format(path=path)


NOT_YAML = "is not YAML that can be used: "
UNREADABLE = [
    (b"optim:\n  lr: [1\nrun_dir: x", f":3: {NOT_YAML}"),
    (b"optim:\n\tlr: 3", f":2: {NOT_YAML}"),
    (b"optim: {lr: *nowhere}", f":1: {NOT_YAML}"),
    (b"compile: on\n---\ncompile: off", f":2: {NOT_YAML}"),
    (b"compile: !!python/object:os.system on", f":1: {NOT_YAML}"),
    (b"? [a, b]\n: c", f":1: {NOT_YAML}"),
    (b"run_dir: caf\xe9", ": is not UTF-8 text"),
    (b"run_dir: \x01", ": is not YAML: "),
    (None, ": cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("text", "line"), UNREADABLE)
def test_what_cannot_be_read_is_an_error_with_its_line(text: bytes | None, line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_bytes(text)
    assert complaint("--config", str(path)).startswith(f"{path}{line}")


def test_a_bad_value_of_the_file_counts_unless_it_is_overridden(yaml_file) -> None:
    path = yaml_file("optim: {lr: -1}")
    assert complaint("--config", path) == f"{path}: optim.lr must be positive, got -1.0"
    assert read("--config", path, "--optim.lr", "1").optim.lr == 1.0
    assert complaint("--config", path, "--optim.lr", "-2") == "optim.lr must be positive, got -2.0"


def test_load_yaml_keeps_scalars_as_text(yaml_file) -> None:
    path = yaml_file("a: 1e-3\nb: off\nc: [1, 2.50]\nd: {e: null, f: 2020-01-01}")
    assert load_yaml(Path(path)) == {"a": "1e-3", "b": "off", "c": ["1", "2.50"], "d": {"e": None, "f": "2020-01-01"}}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exited:
        read(*argv)
    assert exited.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_setting_with_its_text_and_default(yaml_file, capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"[\s│]+", " ", printed(capsys, "--help", "--optim.lrr", "3"))
    assert text.startswith("usage: mpp [-h] [OPTIONS] A small recipe. ")
    for flag in ("-h, --help", "--version", "--config FILE", "--run-dir STR", "--dry-run, --no-dry-run"):
        assert f" {flag} " in text
    assert "--optim.lr FLOAT Learning rate. (default: 0.0002)" in text
    assert "--compile {auto,on,off} Whether to compile. (default: auto)" in text
    assert "encoder options" in text
    assert "--encoder.name STR Name in timm. (default: vit_small)" in text
    assert "(default: 0.25)" in printed(capsys, "-h", "--config", yaml_file("optim: {lr: 0.25}"))  # the file's own


def test_version_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"mpp \S.*\n", printed(capsys, "--version"))
    monkeypatch.setattr(metadata, "distributions", lambda **_: iter(()))
    assert printed(capsys, "--version") == "mpp (not installed)\n"


NAMES = ["run-dir", "compile", "dry-run", "encoder.size", "encoder.width", "optim.lr", "optim.betas", "data"]
WORDS = ["--", "--help", "-h", "-1", "None", "@x", "nan"]


@given(
    name=st.sampled_from([*NAMES, "no-dry-run"]),
    tokens=st.lists(st.text(st.characters(exclude_characters="\0")) | st.sampled_from(WORDS), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_value_or_one_line(
    name: str, tokens: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    tree: dict[str, Any] = {name.replace("-", "_"): tokens[0] if len(tokens) == 1 else tokens}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    values = [word for word in tokens if not word.startswith("--") and word != "-h"]
    for argv in (["--config", str(path)], [f"--{name}", *values], [f"--{name}={' '.join(tokens)}"]):
        said = ""
        try:
            read(*argv)
        except ConfigError as error:
            said = str(error)
        assert len(said.splitlines()) <= 1
