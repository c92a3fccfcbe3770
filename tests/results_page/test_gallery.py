"""The gallery in the documentation: the script that makes it, and what it shows."""

import re
from pathlib import Path

import numpy as np
import pytest
from make_gallery import make
from PIL import Image

from tests import runs

DOCS = runs.ROOT / "docs"


def shown(folder: Path) -> list[Path]:
    """The pictures of a gallery, each with words for who does not see it."""
    text = (folder / "gallery.md").read_text("utf-8")
    pictures = re.findall(r'<img src="([^"]+)" alt="[^"]+" width="\d+">', text)
    assert len(pictures) == text.count("<img")
    return [folder / path for path in pictures]


def test_its_pictures_are_there_and_no_others() -> None:
    pictures = shown(DOCS)
    assert sorted(pictures) == sorted(path for path in (DOCS / "gallery").rglob("*") if path.is_file())
    assert {path.suffix for path in pictures} == {".svg", ".png", ".webp"}
    assert max(path.stat().st_size for path in pictures) < 400_000


@pytest.mark.slow
def test_it_is_made_from_runs(source: str, tmp_path: Path) -> None:
    words = ("--train.length", "6 steps", "--log.pictures", "3 steps")
    runs.call(runs.command(source, tmp_path / "run", *words))
    make({"Blobs, once": tmp_path / "run", "twice": tmp_path / "run"}, tmp_path)
    pictures = shown(tmp_path)
    assert len([path for path in pictures if path.parent.name == "blobs_once"]) == len(pictures) // 2 > 20
    drawn = [np.asarray(Image.open(path)).shape for path in pictures if path.suffix != ".svg"]
    assert min(side for height, width, *_ in drawn for side in (height, width)) > 20
    text = (tmp_path / "gallery.md").read_text("utf-8")
    for title in ("Curves", "Reconstructions", "Embedding filters", "Attention rollout", "Images by their features"):
        assert f"\n## {title}\n" in text
    assert "\n## Data\n" not in text
