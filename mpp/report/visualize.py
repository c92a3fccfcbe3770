"""What a model learnt, as one page and single pictures; or several runs beside each other."""

from pathlib import Path

from mpp.errors import RunError, UserError
from mpp.report.page.document import write_page, write_pictures
from mpp.report.run_page.comparison import comparison, short_names
from mpp.report.settings import VisualizeRecipe
from mpp.report.views.page import REPORT, build_page, run_of
from mpp.system.files import make_folder

FIGURES = "figures"


def visualize(recipe: VisualizeRecipe) -> int:
    """Writes report.html, and the single pictures unless the report alone is asked for. Returns 0.

    Raises:
        UserError: bad input, before any file is written.
        RunError: images of which none can be decoded.
    """
    run = None if recipe.runs else run_of(recipe.init)
    if not recipe.out and run != Path(recipe.init).expanduser():
        raise UserError(f"nowhere to write to: --init {recipe.init} is no run folder; give --out, such as --out look")
    if not recipe.runs and not recipe.data and run is None:
        raise UserError(f"no images: --init {recipe.init} is no run; give --data, such as --data folder:/my/images")
    folder = Path(recipe.out or recipe.init).expanduser()
    make_folder(folder, (REPORT,))
    if recipe.runs:
        folders = [Path(run).expanduser() for run in recipe.runs]
        page = comparison(folders, short_names(folders))
    else:
        page = build_page(recipe)
    try:
        write_page(page, folder / REPORT)
        print(f"page         {folder / REPORT}")
        if not recipe.report:
            paths = write_pictures(page, folder / FIGURES)
            print(f"pictures     {folder / FIGURES}, {len(paths)} of them")
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; make room or give another --out") from error
    return 0
