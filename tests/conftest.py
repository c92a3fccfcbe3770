"""What the tests share."""

import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from tests.data import picture_files

# Shapes and types in the signatures of the tensor code are checked in every call that a test makes.
CHECKED = [f"mpp.report.{name}" for name in ("inspection", "attention", "features", "filters", "predictions")]


def pytest_configure(config: pytest.Config) -> None:
    """Imports what all tests need, but not into the process that only hands them out to others."""
    if config.getoption("numprocesses", 0) and not hasattr(config, "workerinput"):
        return
    gc.disable()  # a collection would look through all that is imported, each time
    # Processes of two tests share the cores: threads that spin while they wait would hold up the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once in a process of a GPU's driver that does not work
        torch.cuda.is_available()
    jaxtyping.install_import_hook(["mpp.model", "mpp.objective", *CHECKED], "beartype.beartype")
    import mpp.system.timm_import  # noqa: F401

    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def pytest_collection_finish() -> None:
    """Begins to collect garbage, in which nothing is looked for that has been imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """The path of a shared file, from $MPP_SHARED or from `shared` beside the repository; skips where it is missing."""
    folder = Path(os.environ.get("MPP_SHARED") or Path(__file__).resolve().parents[2] / "shared")

    def find(relative: str) -> Path:
        path = folder / relative
        if not path.exists():
            pytest.skip(f"{path} is not there (set MPP_SHARED to the folder with {relative})")
        return path

    return find


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small labelled images for tiny runs."""
    from tests import runs

    return runs.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Indices and unpacked shards go to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MPP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Attention kernels take the same time in every test, so that noise chooses none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mpp.model.kernel_choice.time_kernels", lambda names, *_, **__: {name: 1 / len(name) for name in names}
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def grey_confusion():
    """Fine-tuning leaves a grey picture of its confusion matrix: to draw one takes half a second and has its tests."""
    with pytest.MonkeyPatch.context() as patch:
        grey = picture_files.encoded(np.full((20, 30, 3), 128, np.uint8))
        patch.setattr("mpp.downstream.finetune.plot_confusion", lambda path, *_: path.write_bytes(grey))
        yield


@pytest.fixture(scope="session")
def quadrants() -> np.ndarray:
    """uint8 (32, 48, 3) in four colours."""
    return picture_files.quadrants()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(array or Pillow image, "PNG", ...)`: encoded bytes."""
    return picture_files.encoded


@pytest.fixture
def any_name() -> None:
    """File names may have any letters here; skips where the locale's lack some."""
    try:
        os.fsencode("ü€")
    except UnicodeEncodeError as error:
        pytest.skip(f"file names are {error.encoding} here (locale)")


@pytest.fixture
def picture_folder(tmp_path: Path, encode: Callable[..., bytes]) -> Callable[..., Path]:
    """`picture_folder("a/1.png", "b/2.jpg")`: a folder with these pictures, each of one grey."""

    def make(*names: str) -> Path:
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(np.full((8, 8, 3), number % 256, dtype=np.uint8)))
        return tmp_path

    return make
