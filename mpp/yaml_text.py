"""YAML whose scalars stay the text that was written, and YAML that reads well."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mpp.errors import ConfigError


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its scalars as text: `1e-3` and `off` stay what was written; only null becomes None.

    Raises:
        ConfigError: unreadable, not YAML (with the line), a key twice in one mapping, not a mapping.
    """
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


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """A nested mapping as YAML, in its order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


class _TextLoader(yaml.SafeLoader):
    """Reads scalars as text, apart from null; a key twice in one mapping is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name!r} is set twice", problem_mark=key.start_mark)
            seen.add(name)
        return node


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, `img_size: [224, 160]`, and odd characters as escapes: PyYAML would lose some."""


_Dumper.add_representer(list, lambda out, items: out.represent_sequence("tag:yaml.org,2002:seq", items, True))
_Dumper.add_representer(
    str, lambda out, text: out.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')
)
