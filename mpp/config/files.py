"""Files of settings: YAML in and out, and the configs that come with the package, by their names.

base                in `mpp pretrain --config base`: configs/pretrain/base.yaml
finetune/modern     configs/finetune/modern.yaml, in `mpp finetune` modern alone, too
DIR/mine.yaml       any other file, by its path
"""

import difflib
from pathlib import Path
from typing import Any

import yaml

from mpp.errors import ConfigError

_SHORT = {"pretrain/best": "pretrain/best_base"}
_KIND = {"plan": "pretrain"}
"""`bench plan` takes the settings of a pretraining."""


def shipped_folder() -> Path:
    """The folder of the configs: beside the package in a clone, in it where it is installed."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def config_file(text: str, tool: str) -> Path:
    """The file that `--config` of a tool names: a path, or a shipped config.

    Raises ConfigError, with the names that there are, for neither.
    """
    path = Path(text).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    folder, tool = shipped_folder(), _KIND.get(tool, tool)
    for name in (f"{tool}/{text}", text):
        name = _SHORT.get(name, name)
        if "/" in name and ".." not in name and (shipped := folder / f"{name}.yaml").is_file():
            return shipped
    files = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.glob("*/*.yaml"))]
    names = [name.removeprefix(f"{tool}/") for name in sorted([*files, *_SHORT]) if name.startswith(f"{tool}/")]
    if not names:
        raise ConfigError(f"--config {text}: there is no such file")
    near = difflib.get_close_matches(text.lower(), names, n=1)
    hint = f"did you mean {near[0]!r}? There" if near else "there"
    raise ConfigError(f"--config {text}: no such file, and no config of that name; {hint} are {', '.join(names)}")


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, scalars as text: `1e-3`, `off` stay as written, null is None. Raises ConfigError."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _TextLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{path}{line}: is not YAML that can be used: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict | None):
        raise ConfigError(f"{path}: holds no settings; a mapping such as 'optim: {{lr: 2e-4}}' is expected")
    return loaded or {}


class _TextLoader(yaml.SafeLoader):
    """Reads scalars as text, apart from null; a key twice in one mapping is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is set twice", problem_mark=key.start_mark)
            names.add(str(key.value))
        return node


def dump_yaml(tree: dict[str, Any]) -> str:
    """Plain nested values as YAML that `load_yaml` reads again."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, `img_size: [224, 160]`, and odd characters as escapes: PyYAML would lose some."""


_TAG = "tag:yaml.org,2002:"
_Dumper.add_representer(list, lambda out, items: out.represent_sequence(_TAG + "seq", items, True))
_Dumper.add_representer(str, lambda out, s: out.represent_scalar(_TAG + "str", s, None if s.isprintable() else '"'))
