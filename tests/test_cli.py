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
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import mpp.cli
from mpp.cli import pretrain
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


def test_help_is_complete_and_never_loads_torch(tmp_path: Path) -> None:
    done = call("--help", cwd=tmp_path, python=("-X", "importtime"), COLUMNS="80")
    assert done.returncode == 0
    for flag in ("--config FILE", "--run-dir STR", "--model.img-size", "--optim.lr FLOAT", "--log.num-pictures INT"):
        assert flag in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mpp.config" in modules
    assert not modules & {"torch", "timm", "numpy"}


WRONG = [
    ([], "no images to learn from: give --data, such as --data folder:/my/images or --data demo"),
    (["--data", "demo"], "nowhere to write to: give --run-dir, such as --run-dir runs/first, or --dry-run"),
    (["--optim.lrr", "3"], "no setting '--optim.lrr'; did you mean '--optim.lr'?"),
]


@pytest.mark.parametrize(("argv", "line"), WRONG)
def test_an_error_is_one_line_and_exit_code_2(argv: list[str], line: str) -> None:
    done = call(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pretrain: error: {line}\n")


TOOLS: dict[str, tuple[list[str], str, str, str]] = {
    "finetune": (
        ["--optim.lr [FLOAT [FLOAT ...]]", "--data.labels STR", "--model.head {linear,tanh,keep}"],
        "nothing to start from: give --init, such as --init runs/first, or none for a new model",
        "--optim.lrr",
        "--optim.lr",
    ),
    "fewshot": (
        ["--init [STR [STR ...]]", "--shots [INT [INT ...]]", "--pool [{mean,token,mean+token}"],
        "no encoder: give --init, such as --init runs/first, or several, one after the other",
        "--shotss",
        "--shots",
    ),
    "probe": (
        ["--kind {linear,knn}", "--l2 [FLOAT [FLOAT ...]]", "--layer INT"],
        "no encoder: give --init, such as --init runs/first, or several, one after the other",
        "--kinds",
        "--kind",
    ),
    "predict": (["--init STR", "--top INT"], "no model: give --init, such as --init runs/ft", "--topp", "--top"),
    "convert": (
        ["--init STR", "--format {auto,timm,hf,onnx}"],
        "nothing to convert: give --init, such as --init runs/first or --init vit.npz",
        "--inid",
        "--init",
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_helps_at_once_and_refuses_in_one_line(tool: str, tmp_path: Path) -> None:
    flags, line, misspelt, meant = TOOLS[tool]
    done = call("--help", tool=tool, cwd=tmp_path, python=("-X", "importtime"), COLUMNS="80")
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in flags), done.stdout
    modules = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()}
    assert not modules & {"torch", "timm", "numpy"}
    done = call(tool=tool)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{tool}: error: {line}\n")
    done = call(misspelt, "3", tool=tool)
    said = f"{tool}: error: no setting '{misspelt}'; did you mean '{meant}'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


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


def test_what_finetune_needs_beside_an_init() -> None:
    from mpp.cli import finetune

    assert finetune(["--init", "none"]) == 2
    assert finetune(["--init", "none", "--data", "demo"]) == 2


def test_the_tools_are_installed_as_commands() -> None:
    commands = {path.stem for path in (ROOT / "tools").glob("*.py")}
    text = (ROOT / "setup.cfg").read_text()
    for name in commands & {"pretrain", *TOOLS}:
        assert f"mpp-{name} = mpp.cli:{name}" in text


def test_a_wrong_config_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("optim: {lr: fast}")
    done = call("--config", "x.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "pretrain: error: x.yaml: optim.lr: takes a number, got 'fast'\n")


def test_rank_0_speaks_for_all_about_settings() -> None:
    assert call("--lr", "3", RANK="0").stderr == "pretrain: error: no setting '--lr'; did you mean '--optim.lr'?\n"
    done = call("--lr", "3", RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_help_into_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


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


ARGV = ["--data", "demo", "--run-dir", "runs/first"]


def test_the_recipe_gets_the_config_and_gives_the_exit_code(recipe) -> None:
    seen: list[PretrainConfig] = []

    def run(config: PretrainConfig) -> int:
        seen.append(config)
        return 75

    recipe(run)
    assert pretrain([*ARGV, "--train.seed", "7"]) == 75
    assert pretrain(["--data", "demo", "--dry-run"]) == 75
    assert [(config.run_dir, config.dry_run, config.train.seed) for config in seen] == [
        ("runs/first", False, 7),
        ("", True, 0),
    ]


def test_the_process_s_own_arguments_are_the_default(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(lambda config: len(config.run_dir))
    monkeypatch.setattr(sys, "argv", ["pretrain", *ARGV])
    assert pretrain() == len("runs/first")


ENDS = [
    (UserError("no room in runs/first"), "0", 2, "pretrain: error: no room in runs/first\n"),
    (UserError("two\nlines"), "0", 2, "pretrain: error: two lines\n"),
    (ConfigError("the config changed"), "0", 2, "pretrain: error: the config changed\n"),
    (ConfigError("the config changed"), "3", 2, ""),
    (
        UserError("no room in runs/first"),
        "3",
        2,
        f"pretrain: error: [rank 3 on {socket.gethostname()}] no room in runs/first\n",
    ),
    (KeyboardInterrupt(), "0", 130, "pretrain: interrupted\n"),
    (KeyboardInterrupt(), "3", 130, ""),
]


@pytest.mark.parametrize(("raised", "rank", "code", "line"), ENDS)
def test_how_a_run_ends(
    raised: BaseException,
    rank: str,
    code: int,
    line: str,
    recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(config: PretrainConfig) -> int:
        raise raised

    recipe(run)
    monkeypatch.setenv("RANK", rank)
    assert pretrain(ARGV) == code
    assert capsys.readouterr().err == line


def test_letters_that_the_locale_lacks_do_not_end_a_run(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    recipe(lambda config: print("41 ± 2", flush=True) or 0)
    assert pretrain(ARGV) == 0
    assert said.getvalue() == rb"41 \xb1 2" + b"\n"


def test_other_errors_keep_their_traceback(recipe) -> None:
    def run(config: PretrainConfig) -> int:
        raise ValueError("a bug")

    recipe(run)
    with pytest.raises(ValueError, match="a bug"):
        pretrain(ARGV)


@pytest.mark.parametrize(
    ("started", "other"),
    [
        ("tools/pretrain.py", "python tools/check_data.py"),
        (str(ROOT / "tools" / "pretrain.py"), f"python {shlex.quote(str(ROOT / 'tools' / 'check_data.py'))}"),
        ("/usr/bin/mpp-pretrain", "mpp-check-data"),
        ("/somewhere/else/tools/of_mine.py", "mpp-check-data"),
        ("tests/test_cli.py", "mpp-check-data"),
        ("", "mpp-check-data"),
    ],
)
def test_another_tool_is_named_as_this_one_was_started(started: str, other: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [started])
    assert command("check_data") == other


def test_an_extra_is_installed_by_its_packages_and_never_by_the_name_of_another_project(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    assert install("hf") == "'/my venv/bin/python' -m pip install 'datasets>=4' transformers"
    assert install("onnx") == "'/my venv/bin/python' -m pip install onnx onnxruntime onnxscript"

    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("mpp.errors.requires", nothing)
    assert shlex.split(install("hf"))[3:] == ["install", "-e", f"{ROOT}[hf]"]
    for path in (ROOT / "mpp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != install.__doc__:
                assert not re.search(r"pip install.*\bmpp\b", node.value), (path, node.lineno)


def test_nothing_that_is_printed_names_a_file_that_a_wheel_lacks() -> None:
    scripts = {
        line.split(" = ")[0].strip() for line in (ROOT / "setup.cfg").read_text().splitlines() if " = mpp.cli:" in line
    }
    named = set()
    for path in (ROOT / "mpp").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not re.search(r"(?:tools|configs|docs)/\w", node.value), (path, node.lineno)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command":
                (tool,) = node.args
                named.add(f"mpp-{tool.value.replace('_', '-')}")
    assert len(named) > 4
    assert named <= scripts
