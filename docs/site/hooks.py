"""Pages of the site that are made of code or lie elsewhere: home, contributors, settings, Python; MathML formulas."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mpp
from mpp.cli.commands import TOOLS
from mpp.config import by_name

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and the files outside docs/ that pages link to."""
    made = {
        "index.md": (ROOT / "README.md").read_text("utf-8").replace("](docs/", "](").replace('src="docs/', 'src="'),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text("utf-8"),
        "settings.md": settings_page(),
        "api.md": api_page(),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    texts = [*made.values(), *(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))]
    linked = {link for text in texts for link in re.findall(r"\]\((?:\.\./)?([\w./]+)\)", text)}
    for path in sorted(linked):
        if (ROOT / path).is_file() and path not in PAGES:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links out of docs/ to where their files lie in the site, and formulas into MathML."""
    for there, here in PAGES.items():
        markdown = re.sub(rf"\]\((\.\./)?{there}", f"]({here}", markdown)
    markdown = re.sub(r"\[([^\]]+)\]\((?:\.\./)?(?:configs/\w+|results)\)", r"\1", markdown)  # a folder is no page
    markdown = markdown.replace("](../", "](")
    if page.file.src_uri != "method.md":
        return markdown
    block = '\n<div style="overflow: auto hidden; padding: 0.3em 0">{}</div>\n'  # a phone scrolls it alone
    markdown = re.sub(r"\$\$(.+?)\$\$", lambda m: block.format(convert(m[1].strip(), display="block")), markdown)
    return re.sub(r"\$([^$\n]+)\$", lambda m: convert(m[1]), markdown)


def settings_page() -> str:
    """Every setting of every tool: name, default, meaning."""
    parts = [
        "# Settings\n\nEvery setting of every tool, with its default. On a command line a name has two dashes in front "
        "and `-` for `_`: `--optim.lr 2e-4`, `--train.batch-size 512`. In a YAML file the parts of a name are nested. "
        "`--help` of a tool says the same.\n"
    ]
    for tool, of in TOOLS.items():
        cls = of.settings
        parts.append(f"## {tool}\n\n`python tools/{tool}.py`, `mpp {tool.replace('_', '-')}`. {inspect.getdoc(cls)}\n")
        parts.append("| setting | default | meaning |\n|---|---|---|")
        defaults = by_name(cls())
        parts += [f"| `{name}` | {_shown(defaults[name])} | {meaning} |" for name, meaning in _meanings(cls)]
        parts.append("")
    return "\n".join(parts)


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return "" if value in ("", None, []) else f"`{text}`"


def _meanings(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted names of a class of settings, and what the text below each field says."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = str(text.value.value)  # pyright: ignore[reportAttributeAccessIssue]
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from _meanings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, " ".join(texts[field.name].split()).replace("|", "\\|")


def api_page() -> str:
    """The public names, in the order and groups of mpp/__init__.py."""
    source = inspect.getsource(mpp).partition("_HOME = {")[2].partition("}")[0]
    lines = [f"# Python\n\n{inspect.getdoc(mpp)}\n"]
    for line in source.splitlines():
        if line.strip().startswith("#"):
            lines.append(f"## {line.strip(' #').capitalize()}\n")
        elif found := re.match(r'\s+"(\w+)": "mpp.api"', line):
            tool = TOOLS.get(found[1])
            about = f"{tool.about} Settings: [{found[1]}](settings.md#{found[1]})." if tool else ""
            lines.append(f"### {found[1]}\n\n{about}\n" if tool else f"::: mpp.api.{found[1]}\n")
        elif named := re.match(r'\s+"(\w+)": "([\w.]+)"', line):
            lines.append(f"::: {named[2]}.{named[1]}\n")
    return "\n".join(lines)
