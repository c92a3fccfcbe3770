"""What the tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest
import torch

# Shapes and types in the signatures of the tensor code are checked in every call that a test makes.
jaxtyping.install_import_hook(["mpp.model", "mpp.objective"], "beartype.beartype")

import mpp.torchvision_import  # noqa: E402, F401  (makes timm importable beside the CPU build of torch)

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


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
