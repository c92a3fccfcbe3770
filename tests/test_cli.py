"""The commands as processes, as far as they go without torch, and how they turn a run's end into an exit code."""

import ast
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import mpp.cli
from mpp.cli import main, pretrain
from mpp.cli.commands import TOOLS as TABLE
from mpp.data.sources.specs import check_outside_images
from mpp.errors import ConfigError, UserError, command, install
from mpp.pretraining.settings import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent


def call(
    *argv: str, tool: str = "pretrain", cwd: Path = ROOT, python: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a tool."""
    command = [sys.executable, *python, str(ROOT / "tools" / f"{tool}.py"), *argv]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


# What --help of each tool has, a flag to misspell, and what a command line without settings is answered.
NO_ENCODER = "no encoder: give --init, such as --init runs/first, or several, one after the other"
TOOLS: dict[str, tuple[list[str], str, str]] = {
    "pretrain": (
        ["--config FILE", "--run-dir STR", "--model.img-size", "--optim.lr FLOAT", "--log.num-pictures INT"],
        "--optim.lr",
        "no images to learn from: give --data, such as --data folder:/my/images or --data demo",
    ),
    "finetune": (
        [
            "--optim.lr [FLOAT|{auto} [FLOAT|{auto} ...]]",
            "--data.labels STR",
            "--model.head {linear,probe,tanh,keep,auto}",
        ],
        "--optim.lr",
        "nothing to start from: give --init, such as --init runs/first, or none for a new model",
    ),
    "fewshot": (
        ["--init [STR [STR ...]]", "--shots [INT [INT ...]]", "--pool [{mean,token,mean+token,quarters}"],
        "--shots",
        NO_ENCODER,
    ),
    "probe": (["--kind {linear,knn,attentive}", "--l2 [FLOAT [FLOAT ...]]", "--layer INT"], "--kind", NO_ENCODER),
    "predict": (["--init STR", "--top INT"], "--top", "no model: give --init, such as --init runs/ft"),
    "embed": (
        ["--init STR", "--pool {mean,token,mean+token,quarters,none}"],
        "--pool",
        "no encoder: give --init, such as --init runs/first, or --index to look into features",
    ),
    "convert": (
        ["--init STR", "--format {auto,timm,hf,onnx}"],
        "--init",
        "nothing to convert: give --init, such as --init runs/first or --init vit.npz",
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_helps_at_once_and_refuses_in_one_line(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, meant, line = TOOLS[tool]
    done = call("--help", tool=tool, cwd=tmp_path, python=("-X", "importtime"), COLUMNS="80")
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in flags), done.stdout
    assert all(len(text) <= 80 for text in done.stdout.splitlines() if text.startswith("│"))
    modules = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()}
    assert "mpp.config" in modules
    assert not modules & {"torch", "timm", "numpy"}
    misspelt = meant + meant[-1]
    for words, said in (([], line), ([misspelt, "3"], f"no setting '{misspelt}'; did you mean '{meant}'?")):
        assert getattr(mpp.cli, tool)(words) == 2
        assert capsys.readouterr() == ("", f"{tool}: error: {said}\n")


@pytest.mark.parametrize(
    ("tool", "argv", "line"),
    [
        ("pretrain", "--data demo", "nowhere to write to: give --run-dir, such as --run-dir runs/first, or --dry-run"),
        ("finetune", "--init none", "no images to learn from: give --data, such as --data folder:/my/labelled or"),
        ("finetune", "--init none --data demo", "nowhere to write to: give --run-dir, such as --run-dir runs/ft"),
    ],
)
def test_what_a_tool_needs(tool: str, argv: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert getattr(mpp.cli, tool)(argv.split()) == 2
    assert capsys.readouterr().err.startswith(f"{tool}: error: {line}")


@pytest.mark.parametrize(
    ("tool", "argv"),
    [
        ("pretrain", ["--data", "folder:DIR", "--run-dir", "DIR/runs/first"]),
        ("pretrain", ["--data", "demo", "--fewshot.data", "folder:DIR", "--run-dir", "DIR"]),
        ("finetune", ["--init", "none", "--data", "demo", "--test", "folder:DIR", "--run-dir", "DIR/ft"]),
        ("fewshot", ["--init", "none", "--data", "folder:DIR", "--out", "DIR/few"]),
        ("visualize", ["--init", "none", "--data", 'demo + folder:"DIR"', "--out", "DIR/look"]),
        ("check_data", ["--data", "2 * demo + 1 * folder:DIR/../images", "--out", "DIR/check"]),
        ("study", ["--data", "folder:DIR", "--run-dir", "DIR/study"]),
    ],
)
def test_nobody_writes_pictures_among_the_images(tool: str, argv: list[str], tmp_path: Path, capsys) -> None:
    (images := tmp_path / "images").mkdir()
    argv = [word.replace("DIR", str(images)) for word in argv]
    assert getattr(mpp.cli, tool)(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tool}: error: {argv[-2]} {argv[-1]} is in the folder of the images, folder:{tmp_path}")
    assert line.endswith("give a folder outside of it")
    assert not any(images.iterdir())


def test_where_pictures_among_the_images_are_harmless(tmp_path: Path) -> None:
    images, run = tmp_path / "images", tmp_path / "images" / "old"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()  # a run that has begun may go on
    for folder in (tmp_path / "run", tmp_path, images / ".run", images / ".here" / "run", run, ""):
        check_outside_images("--run-dir", str(folder), [f"folder:{images}", "", "nonsense", "demo", f"csv:{images}"])


def test_one_command_has_all_tools(recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z-]+) +\S.{10,75}$", capsys.readouterr().out, re.MULTILINE)
    assert [name.replace("-", "_") for name in listed] == 2 * list(TABLE)
    recipe(lambda config: 0)
    assert main(["pretrain", *ARGV, "--config", "demo"]) == 0
    assert main(["--version"]) == 0
    assert re.fullmatch(r"mpp \S.*\n", capsys.readouterr().out)
    for words, line in {
        "pretrian": "mpp: error: no tool 'pretrian'; did you mean 'pretrain'?",
        "x": "mpp: error: no tool 'x'; mpp --help lists them all",
        "check-data": "mpp check-data: error: no images to look at: give --data, such as --data folder:/my/images",
        "check_data --dta x": "mpp check_data: error: no setting '--dta'; did you mean '--data'?",
    }.items():
        assert main(words.split()) == 2
        assert capsys.readouterr().err == f"{line}\n"


def test_a_wrong_config_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("optim: {lr: fast}")
    done = call("--config", "x.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "pretrain: error: x.yaml: optim.lr: takes a number or auto, got 'fast'\n",
    )


def test_rank_0_speaks_for_all_about_settings() -> None:
    assert call("--lr", "3", RANK="0").stderr == "pretrain: error: no setting '--lr'; did you mean '--optim.lr'?\n"
    done = call("--lr", "3", RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_help_into_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


Run = Callable[[PretrainConfig], int]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Puts a function in the place of `mpp.pretraining.recipe.run`, which needs torch."""
    monkeypatch.delenv("RANK", raising=False)

    def put(run: Run) -> None:
        module = types.ModuleType("mpp.pretraining.recipe")
        module.__dict__["run"] = run
        monkeypatch.setitem(sys.modules, "mpp.pretraining.recipe", module)

    return put


def raising(error: BaseException) -> Run:
    def run(config: PretrainConfig) -> int:
        raise error

    return run


ARGV = ["--data", "demo", "--run-dir", "runs/first"]


def test_the_recipe_gets_the_config_and_gives_the_exit_code(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[PretrainConfig] = []
    recipe(lambda config: configs.append(config) or 75)
    assert pretrain([*ARGV, "--train.seed", "7"]) == 75
    monkeypatch.setattr(sys, "argv", ["pretrain", "--data", "demo", "--dry-run"])
    assert pretrain() == 75
    found = [(config.run_dir, config.dry_run, config.train.seed) for config in configs]
    assert found == [("runs/first", False, 7), ("", True, 0)]


NO_ROOM, CHANGED = UserError("no room in runs/first"), ConfigError("the config changed")
ELSEWHERE = f"[rank 3 on {socket.gethostname()}] no room in runs/first"


@pytest.mark.parametrize(
    ("raised", "rank", "code", "line"),
    [
        (NO_ROOM, "0", 2, "pretrain: error: no room in runs/first\n"),
        (UserError("two\nlines"), "0", 2, "pretrain: error: two lines\n"),
        (CHANGED, "0", 2, "pretrain: error: the config changed\n"),
        (CHANGED, "3", 2, ""),
        (NO_ROOM, "3", 2, f"pretrain: error: {ELSEWHERE}\n"),
        (KeyboardInterrupt(), "0", 130, "pretrain: interrupted\n"),
        (KeyboardInterrupt(), "3", 130, ""),
    ],
)
def test_how_a_run_ends(
    raised: BaseException, rank: str, code: int, line: str, recipe, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    recipe(raising(raised))
    monkeypatch.setenv("RANK", rank)
    assert pretrain(ARGV) == code
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback(recipe) -> None:
    recipe(raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        pretrain(ARGV)


def test_letters_that_the_locale_lacks_do_not_end_a_run(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    recipe(lambda config: print("41 ± 2", flush=True) or 0)
    assert pretrain(ARGV) == 0
    assert said.getvalue() == rb"41 \xb1 2" + b"\n"


@pytest.mark.parametrize(
    ("started", "other"),
    [
        ("tools/pretrain.py", "python tools/check_data.py"),
        (str(ROOT / "tools" / "pretrain.py"), f"python {shlex.quote(str(ROOT / 'tools' / 'check_data.py'))}"),
        ("/usr/bin/mpp-pretrain", "mpp check-data"),
        ("/somewhere/else/tools/of_mine.py", "mpp check-data"),
        ("tests/test_cli.py", "mpp check-data"),
        ("", "mpp check-data"),
    ],
)
def test_another_tool_is_named_as_this_one_was_started(started: str, other: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [started])
    assert command("check_data") == other


def trees(pattern: str) -> Iterator[tuple[Path, ast.AST]]:
    """The files of mpp whose text has the pattern, each with its syntax tree: to make one of all takes a second."""
    for path in (ROOT / "mpp").rglob("*.py"):
        text = path.read_text("utf-8")
        if re.search(pattern, text):
            yield path, ast.parse(text)


def test_an_extra_is_installed_by_its_packages_and_never_by_the_name_of_another_project(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    assert install("hf") == "'/my venv/bin/python' -m pip install 'datasets>=4' transformers"
    assert install("onnx") == "'/my venv/bin/python' -m pip install onnx onnxruntime onnxscript"

    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("mpp.errors.requires", nothing)
    assert shlex.split(install("hf"))[3:] == ["install", "-e", f"{ROOT}[hf]"]
    for path, tree in trees("pip install"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != install.__doc__:
                assert not re.search(r"pip install.*\bmpp\b", node.value), (path, node.lineno)


def test_nothing_that_is_printed_names_a_file_that_a_wheel_lacks() -> None:
    scripts = re.findall(r"^ *(mpp-\S+) = mpp\.cli:(\w+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert all(callable(getattr(mpp.cli, function)) for _, function in scripts)
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} - {"bench"} == {function for _, function in scripts}
    named = set()
    for path, tree in trees(r"(tools|configs|docs)/|\bcommand\("):
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not re.search(r"(?:tools|configs|docs)/\w", node.value), (path, node.lineno)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command":
                (tool,) = node.args
                named.add(tool.value)
    assert len(named) > 4
    assert named <= TABLE.keys()
