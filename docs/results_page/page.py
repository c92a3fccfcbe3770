"""The page and the README's block, from studies: templates for the prose, tables and charts for the rest."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mpp.errors import UserError
from mpp.report.page import Picture
from mpp.report.settings import LONGER
from mpp.report.wording import NONE
from results_page import charts, figures, goals, making, tables
from results_page.data import KINDS, Study
from results_page.figures import side_markdown

TEMPLATES = Path(__file__).parents[1]
START, END = "<!-- results -->", "<!-- /results -->"
"""Marks in README.md, between which the headline stands."""
_WIDTH = 420  # pixels of a chart on the page: two fit beside each other

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    figures.accuracy,
    figures.gain,
    figures.fewshot,
    figures.fewshot_gain,
    figures.probe,
    figures.probe_chosen,
    figures.fewshot_chosen,
    figures.rank,
    figures.images,
    figures.parameters,
    tables.headline_table,
    tables.finetuning_table,
    tables.recipe_table,
    tables.fewshot_table,
    tables.probe_table,
    tables.ablation_table,
    tables.effects_table,
    tables.length_table,
    tables.best_table,
    tables.layers_table,
    goals.chosen,
    goals.times,
    goals.time_share,
    making.making,
    making.data,
    making.jpeg_copy,
    making.time,
    making.command,
    making.config_path,
    making.unfinished,
    making.arms_table,
    making.rates_table,
)


def render(studies: Mapping[str, Study]) -> dict[str, str]:
    """results.md, studies.md and the charts as results/NAME.svg, by their paths within docs/."""
    shown = {name: charts.pictures(study) for name, study in studies.items()}
    layered = {name: charts.layer_pictures(study) for name, study in studies.items()}
    svg = charts.files(picture for of in (*shown.values(), *layered.values()) for picture in of)

    def pictures(name: str) -> str:
        return _images(shown[name])

    def layer_pictures(name: str) -> str:
        return _images(layered[name])

    pages = {
        name: _template(f"{name}.jinja", studies, pictures=pictures, layer_pictures=layer_pictures)
        for name in ("results.md", "studies.md")
    }
    return pages | {f"results/{name}": content for name, content in svg.items()}


def _images(shown: Sequence[Picture]) -> str:
    return "\n".join(
        f'<img src="results/{each.name}.svg" alt="{html.escape(each.alt)}" width="{_WIDTH}">' for each in shown
    )


def in_headline(studies: Mapping[str, Study]) -> dict[str, Study]:
    """Those that README.md tells of: what pretraining is worth at all the shares of the goals, by finished studies.

    Where some gave scratch the pretraining's device time, the harder test, they stand alone.
    """
    asked = goals.FINETUNING.keys()
    benefit = {name: study for name, study in studies.items() if study.kind == "benefit" and study.finished}
    whole = {name: study for name, study in benefit.items() if asked <= set(study.labels)}
    timed = {name: study for name, study in whole.items() if study.in_equal_time}
    return timed or whole


def headline(studies: Mapping[str, Study]) -> str:
    """What README.md has between its marks."""
    return _template("headline.md.jinja", in_headline(studies)).strip()


def with_headline(readme: str, studies: Mapping[str, Study]) -> str:
    """README.md with the headline between its marks; the same text where it has no marks or no study has a headline.

    Raises:
        UserError: one mark without the other.
    """
    if (START in readme) != (END in readme):
        raise UserError(f"README.md needs both marks, {START} and {END}, or neither")
    if START not in readme or not in_headline(studies):
        return readme
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n{headline(studies)}\n{END}{rest.partition(END)[2]}"


def _template(name: str, studies: Mapping[str, Study], **more: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; alt texts are escaped where they are made
    )
    by_kind = {kind: [name for name, study in studies.items() if study.kind == kind] for kind in KINDS}
    functions = {function.__name__: _by_name(function, studies) for function in _FUNCTIONS}
    layered = [name for name, study in studies.items() if study.compares_readings]
    values = {"studies": studies, "kind": by_kind, "layered": layered, "LONGER": LONGER, "goals": _goals(studies)}
    text = environment.get_template(name).render(**functions, **values, **more)
    return re.sub(r"\n{3,}", "\n\n", text)


def _by_name(function: Callable[..., Any], studies: Mapping[str, Study]) -> Callable[..., Any]:
    """A function of a study as one of a study's name."""
    return lambda name, *args, **options: function(studies[name], *args, **options)


def _goals(studies: Mapping[str, Study]) -> str:
    """The table of goals: a column for each study, and for each arm of which none was chosen, or "not measured"."""
    columns = goals.columns(list(studies.values()))
    rows = goals.goal_rows(columns)
    if not columns:
        return tables.table(["goal", "reached"], [[*row, "not measured"] for row in rows])
    named = {
        at: f", {side_markdown(arm)}" if arm and len(study.arms) > 1 else "" for at, (study, arm) in enumerate(columns)
    }
    heads = [f"`{study.name}`{named[at]}" for at, (study, _) in enumerate(columns)]
    return tables.table(["goal", *heads], [[goal, *_measured(cells)] for goal, *cells in rows])


def _measured(cells: list[str]) -> list[str]:
    return cells if any(cell != NONE for cell in cells) else ["not measured"] * len(cells)
