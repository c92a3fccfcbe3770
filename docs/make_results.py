"""Makes docs/results.md, docs/studies.md, charts and README.md's headline: `python docs/make_results.py [STUDY ...]`.

Each STUDY is the folder of one, finished or not: its study.json is copied to docs/results/NAME.json. The pages are made
from docs/results/*.json and the prose in docs/*.md.jinja alone, so that without a STUDY it is only made again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from results_page.data import read_studies, take
from results_page.page import START, in_headline, render, with_headline

from mpp.errors import UserError
from mpp.system.files import write_whole

ROOT = Path(__file__).parents[1]


def make(root: Path, folders: Sequence[Path] = ()) -> None:
    """Writes docs/results.md, docs/studies.md, docs/results/ and, between its marks, README.md under `root`.

    Raises:
        UserError: a folder without a study, or a README.md with half of its marks.
    """
    out = root / "docs" / "results"
    for folder in folders:
        take(folder, out)
    studies = read_studies(out)
    readme = root / "README.md"
    headline = with_headline(readme.read_text("utf-8"), studies)
    if START in headline and not in_headline(studies):
        print("README.md: its headline stays as it is: no study of what pretraining is worth is finished")
    files = render(studies)
    for name, text in files.items():
        write_whole(root / "docs" / name, text)
    for old in {*out.glob("*.svg")} - {root / "docs" / name for name in files}:
        old.unlink()
    if headline != readme.read_text("utf-8"):
        write_whole(readme, headline)


if __name__ == "__main__":
    try:
        make(ROOT, [Path(word) for word in sys.argv[1:]])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
