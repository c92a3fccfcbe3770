"""The gallery in the documentation: the script that makes it, and what it shows."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests import runs

DOCS = runs.ROOT / "docs"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(folder: Path) -> list[Path]:
    """The pictures of a gallery, each with words for who does not see it."""
    pictures = re.findall(r'<img src="([^"]+)" alt="([^"]+)" width="\d+">', (folder / "gallery.md").read_text("utf-8"))
    assert len(pictures) == (folder / "gallery.md").read_text("utf-8").count("<img")
    return [folder / path for path, _ in pictures]


def test_its_pictures_are_there_and_no_others() -> None:
    pictures = shown(DOCS)
    assert sorted(pictures) == sorted(path for path in (DOCS / "gallery").rglob("*") if path.is_file())
    assert {path.suffix for path in pictures} == {".svg", ".png", ".webp"}
    for path in pictures:
        assert path.stat().st_size < 400_000, path


@pytest.mark.slow
def test_it_is_made_from_runs(source: str, tmp_path: Path) -> None:
    words = ("--train.length", "6 steps", "--log.pictures", "3 steps")
    runs.finish(runs.command(source, tmp_path / "run", *words))
    script().make({"Blobs, once": tmp_path / "run", "twice": tmp_path / "run"}, tmp_path)
    pictures = shown(tmp_path)
    assert len([path for path in pictures if path.parent.name == "blobs_once"]) == len(pictures) // 2 > 20
    for path in pictures:
        if path.suffix != ".svg":
            with Image.open(path) as image:
                assert image.size > (20, 20)
    text = (tmp_path / "gallery.md").read_text("utf-8")
    for title in ("Curves", "Reconstructions", "Embedding filters", "Attention rollout", "Images by their features"):
        assert f"\n## {title}\n" in text
    assert "\n## Data\n" not in text
