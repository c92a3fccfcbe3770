"""Makes docs/gallery.md and its pictures from finished runs: `python docs/make_gallery.py "NAME=RUN" ...`.

The sections, sentences and pictures are those of the runs' own pages. What is there was made by:

    make demo
    python tools/pretrain.py --config configs/pretrain/cifar10_ti4.yaml --run-dir runs/cifar10 \
        --data "shards:$DATA/cifar10-train-*.tar.gz" \
        --fewshot.data "shards:$DATA/cifar10-train-*.tar.gz" --fewshot.test "shards:$DATA/cifar10-test-*.tar.gz" \
        --model.depth 6 --model.embed-dim 128 --model.num-heads 4 --log.every "20 steps" \
        --train.length "2 epochs" --train.batch-size 128 --fewshot.every "50%"
    python docs/make_gallery.py "CIFAR-10=runs/cifar10" "Emoji=runs/demo"
"""

import dataclasses
import html
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from mpp.report.html import write_pictures
from mpp.report.page import Gallery, Page, Picture, Section
from mpp.report.provenance import code, machine, versions
from mpp.report.settings import VisualizeRecipe, folder_name
from mpp.report.visualize import build_page
from mpp.system.files import whole_folder, write_whole
from mpp.training.provenance import read_starts

_LEFT_OUT = ("few-shot", "fine-tuning", "downstream", "data", "how-it-was-made")  # tables
_PACKAGES = ("python", "torch", "timm")
_SHOWN = 6  # images of a run
_WIDTH, _SHEET = 400, 820  # pixels of a picture and of a sheet on the page


def make(runs: Mapping[str, Path], out: Path) -> None:
    """Writes gallery.md and gallery/ into `out`, from finished runs by the name that the page has for them."""
    pages = {name: build_page(VisualizeRecipe(init=str(run), shown=_SHOWN)) for name, run in runs.items()}
    lines = [
        "# Gallery",
        "",
        "Each run ends with `report.html`, a page with these pictures; `tools/visualize.py` leaves them as files, too.",
        "These are of two small runs: they show how to read the pictures, not how good a model can be.",
        "[make_gallery.py](make_gallery.py) made this page and tells the commands of the runs.",
        "",
        *(f"- **{name}**: {_about(pages[name], run)}" for name, run in runs.items()),
    ]
    first = next(iter(pages.values()))
    with whole_folder(out / "gallery") as gallery:
        for section in (section for section in first.sections if section.name not in _LEFT_OUT):
            paper = f" (It follows {section.paper}.)" if section.paper else ""
            lines += ["", f"## {section.title}", "", f"{section.reading}{paper}"]
            for name, page in pages.items():
                for same in (each for each in page.sections if each.name == section.name):
                    lines += ["", f"**{name}**", "", *_pictures(name, page, same, gallery)]
    write_whole(out / "gallery.md", "\n".join(lines) + "\n")


def _about(page: Page, run: Path) -> str:
    start = read_starts(run)[-1]
    packages = {name: value for name, value in versions(start).items() if name in _PACKAGES}
    environment = code(start) | machine(start) | packages
    figures = [f"{name} {value}" for name, value in page.headline.items() if name != "training time"]
    made = ", ".join(f"{name} {value}" for name, value in environment.items())
    return f"{page.lead} Its figures: {', '.join(figures)}. Made by {made}."


def _pictures(name: str, page: Page, section: Section, gallery: Path) -> list[str]:
    """Writes the section's pictures, and shows them in Markdown."""
    folder = gallery / folder_name(name)
    alone = [block.pictures if isinstance(block, Gallery) else (block,) for block in section.blocks]
    alts = {each.name: each.alt for blocks in alone for each in blocks if isinstance(each, Picture)}
    lines = []
    for path in write_pictures(dataclasses.replace(page, sections=(section,)), folder):
        alt, width = alts.get(path.stem), _WIDTH
        if alt is None:  # a sheet: many small pictures, of which PNG would make megabytes
            alt, width, sheet = f"{section.title}: {name}", _SHEET, path
            path = sheet.with_suffix(".webp")
            Image.open(sheet).save(path, quality=80)
            sheet.unlink()
        alt = html.escape(alt)
        lines.append(f'<img src="gallery/{path.relative_to(gallery)}" alt="{alt}" width="{width}">')
    return lines


if __name__ == "__main__":
    named = [word.partition("=") for word in sys.argv[1:]]
    if not named or not all(name and run and Path(run).is_dir() for name, _, run in named):
        sys.exit('usage: python docs/make_gallery.py "NAME=RUN" ..., with the folders of finished runs')
    make({name: Path(run) for name, _, run in named}, Path(__file__).parent)
