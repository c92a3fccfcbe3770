"""What a call of a tool from Python gives back: figures, tables, paths, pictures, and the model."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mpp.errors import UserError
from mpp.report.run_record import read_run
from mpp.report.visualize import FIGURES, REPORT
from mpp.system.files import read_csv
from mpp.system.outcome import Outcome
from mpp.system.process import global_draws
from mpp.training.earlier_run import MODEL
from mpp.training.rows import last_part
from mpp.weights.base import build
from mpp.weights.opening import open_weights

Table = list[dict[str, Any]]
_MOST_ROWS, _MOST_PICTURES = 20, 6  # that are shown


@dataclass(frozen=True, repr=False)
class Result:
    """What a tool found. Printed, and in a notebook, it is its figures, tables and pictures."""

    tool: str
    config: Any
    """The settings that it ran with, as a dataclass."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """By name. Accuracies are shares, 0 to 1."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """By name: rows, each a dict, as `pandas.DataFrame` takes them."""
    paths: Mapping[str, Path] = field(default_factory=dict)
    """What was written: `run_dir` and `model` (for timm) of a run, `report` (a page for the browser), `out`."""
    pictures: tuple[Path, ...] = ()
    """PNG files, the ones worth a look."""

    def __repr__(self) -> str:
        lines, figures = [f"mpp {self.tool}"], self._plain_figures()
        width = max(map(len, figures), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in figures.items()]
        for name, table in () if self.figures else self.tables.items():
            lines += [f"{name}:", *_columns(table)]
        width = max(map(len, self.paths), default=0)
        lines += [f"  {name:<{width}}  {path}" for name, path in self.paths.items()]
        return "\n".join(lines)

    def _plain_figures(self) -> dict[str, str]:
        """Those that a line can show."""
        plain = {name: value for name, value in self.figures.items() if not isinstance(value, Mapping) and value != []}
        return {name: text for name, value in plain.items() if (text := _shown(name, value))}

    def _repr_html_(self) -> str:
        """For notebooks; the pictures are in it."""
        blocks = [_html_table(["", ""], [[*pair] for pair in self._plain_figures().items()])]
        for name, table in self.tables.items():
            rows = [[_shown(key, value) for key, value in row.items()] for row in table[:_MOST_ROWS]]
            blocks += [f"<p>{html.escape(name)}</p>", _html_table([*table[0]] if table else [], rows)]
            blocks += [f"<p>and {len(table) - _MOST_ROWS:,} more</p>"] * (len(table) > _MOST_ROWS)
        for path in self.pictures:
            data = base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
            blocks.append(f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">')
        blocks.append(_html_table(["", ""], [[name, str(path)] for name, path in self.paths.items()]))
        return f"<p><b>mpp {self.tool}</b></p>" + "".join(blocks)


@dataclass(frozen=True, repr=False)
class RunResult(Result):
    """A run that ended, or weights that were written: `paths["model"]` is for timm, too."""

    def encoder(self) -> nn.Module:
        """The timm model without a head, in evaluation mode: images (B, C, H, W) -> features (B, D)."""
        with global_draws():
            return build(open_weights(self._model()), classes=()).eval()

    def model(self) -> nn.Module:
        """The classifier, in evaluation mode: images (B, C, H, W) -> logits (B, K). UserError without a head."""
        weights = open_weights(self._model())
        if not weights.classes:
            raise UserError(f"{self._model()} has no head to classify with: fine-tune it first, or take encoder()")
        with global_draws():
            return build(weights).eval()

    @property
    def run_dir(self) -> Path | None:
        """The run folder."""
        return self.paths.get("run_dir")

    def _model(self) -> str:
        if "model" not in self.paths:
            raise UserError(f"this {self.tool} wrote no model")
        return str(self.paths["model"])


def result_of(tool: str, config: Any, status: int) -> Result:
    """The result of a tool that ran with `config`: what it handed back, and what its folder holds."""
    figures, tables, paths = dict[str, Any](), dict[str, Table](), dict[str, Path]()
    pictures: Sequence[Path] = ()
    if isinstance(status, Outcome):
        figures |= status.figures
        tables |= {name: _table(rows) for name, rows in status.tables.items()}
    folder = Path(getattr(config, "run_dir", "") or getattr(config, "out", "")).expanduser()
    kind = Result
    if getattr(config, "run_dir", "") and not getattr(config, "dry_run", False):
        paths["run_dir"] = folder
        if tool in ("pretrain", "finetune"):
            kind, found = RunResult, _run_figures(folder)
            figures |= found
            classes = read_csv(folder / "classes.csv")
            tables |= {"classes": _numbers(classes, "class", "most_confused_with")} if classes else {}
            pictures = [*_newest(folder / "pictures"), *folder.glob("confusion.png")]
        else:
            names = "labels", "side", "encoder"
            tables |= {path.stem: _numbers(read_csv(path), *names) for path in sorted(folder.glob("*.csv"))}
            pictures = sorted(folder.glob("*.png"))
    elif getattr(config, "out", ""):
        paths["out"] = folder
        if tool == "predict":
            rows = read_csv(folder)
            classes = [f"class{n}" for n in range(1, config.top + 1) if rows and f"probability{n}" in rows[0]]
            tables["predictions"] = _numbers(rows, "path", *classes)
        pictures = sorted(folder.glob("*.png")) if folder.is_dir() else ()
    elif tool == "visualize":
        paths["run_dir"] = folder = Path(config.init).expanduser()
    if tool == "convert":
        kind = RunResult if (folder / "config.json").is_file() else Result
        paths |= {"model": folder} if kind is RunResult else {}
    if tool == "visualize":
        pictures = sorted((folder / FIGURES).glob("*.png"))
    if paths:  # else there is no folder
        files = ("model", MODEL), ("report", REPORT)
        paths |= {name: folder / file for name, file in files if (folder / file).exists()}
    return kind(tool, config, figures, tables, paths, tuple(pictures[:_MOST_PICTURES]))


def _run_figures(folder: Path) -> dict[str, Any]:
    """Of a fine-tuning result.json, of a pretraining the scores of its last part and its last evaluation."""
    run = read_run(folder)
    if run.result is not None:
        return {key: value for key, value in vars(run.result).items() if value is not None}
    if not run.trained:
        return {}
    figures: dict[str, Any] = {"steps": run.rows[-1]["step"], "images": run.rows[-1]["images"]}
    figures |= last_part(run.trained, run.score)[0]
    for row in run.rows:
        figures |= {name: value for name, value in row.items() if name.startswith(("fewshot/", "features/"))}
    return figures


def _newest(folder: Path) -> list[Path]:
    """Of the pictures of a run, NAME_STEP.png, the newest of each name."""
    return [*{path.stem.rpartition("_")[0]: path for path in sorted(folder.glob("*.png"))}.values()]


def _table(rows: Sequence[Sequence[Any]]) -> Table:
    table = [dict(zip(map(str, rows[0]), row, strict=True)) for row in rows[1:]] if rows else []
    return _numbers(table, "model", "labels")


def _numbers(rows: Iterable[Mapping[str, Any]], *names: str) -> Table:
    """The rows with numbers for their texts, but in the columns of `names`: a class "0001" is no 1."""
    return [{k: (None if v == "" else v) if k in names else _number(v) for k, v in row.items()} for row in rows]


def _number(value: Any) -> Any:
    """A cell of a CSV as a number where it is one, None where it is empty."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value or None


_SHARES = ("accuracy", "top1", "top5", "balanced", "interval", "probability", "held_out", "shot")


def _shown(name: str, value: Any) -> str:
    """A figure as the tools print it: accuracies in per cent."""
    if isinstance(value, tuple | list):
        return " to ".join(_shown(name, each) for each in value)
    if isinstance(value, float):
        share = any(word in name for word in _SHARES) and 0 <= value <= 1
        return f"{value:.1%}" if share else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


def _columns(table: Table) -> list[str]:
    if not table:
        return ["  (empty)"]
    cells = [[*table[0]], *([_shown(key, value) for key, value in row.items()] for row in table[:_MOST_ROWS])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    more = [f"  and {len(table) - _MOST_ROWS:,} more"] * (len(table) > _MOST_ROWS)
    return [line.rstrip() for line in [*lines, *more]]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>" if any(head) else ""
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"
