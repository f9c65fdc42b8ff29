"""Read and write settings as YAML, in which `1e-4` is a number and `on` a string."""

import re
from pathlib import Path
from typing import Any

import yaml

from detection.errors import SettingsError
from detection.foreign_files import read_bounded

# The parser in C reads args.yaml in a tenth of the time; PyYAML may be installed without it.
MOST_VALUES, MOST_DIGITS, SHOWN = 1_000_000, 40, 300  # values of a file, digits of a number, characters of an error
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _YamlLoader(_SafeLoader):
    """Safe loader with YAML 1.2 scalars (`1e-3` is a number, `off` a string) that rejects duplicate keys."""

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(
                    f"key {key!r} occurs twice in the section that begins in line {node.start_mark.line + 1}"
                )
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Read an int as decimal; PyYAML's own constructor reads 010 as octal."""
        digits = self.construct_scalar(node)
        if len(digits) > MOST_DIGITS:
            raise yaml.YAMLError(f"a number of {len(digits)} digits in line {node.start_mark.line + 1}")
        return int(digits)

    def construct_document(self, node: yaml.Node) -> Any:
        """Refuse what aliases make endless or huge, before any of it is built."""
        _count_values(node, {})
        return super().construct_document(node)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values of a node with what its aliases stand for; `counts`: of those seen, 0 of those begun."""
    if (known := counts.get(id(node))) is not None:
        if not known:
            raise yaml.YAMLError(f"an alias of itself in line {node.start_mark.line + 1}")
        return known
    counts[id(node)] = 0
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    counts[id(node)] = 1 + sum(_count_values(part, counts) for part in inner)
    if counts[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"more than {MOST_VALUES} values in what begins in line {node.start_mark.line + 1}")
    return counts[id(node)]


_RESOLVERS = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)


class _YamlDumper(yaml.SafeDumper):
    """Dumper that quotes every string that `_YamlLoader` (or YAML 1.1) would read as another type."""


for _name, _pattern, _first in _RESOLVERS:
    for _rules in (_YamlLoader, _YamlDumper):
        _rules.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))
_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_decimal)


class _TextLoader(_YamlLoader):
    """Loader for which every value is text: class names are, also `no`, `010` and `null`."""

    yaml_implicit_resolvers: dict = {}


def write_yaml(content: Any) -> str:
    """Format a value as YAML that `read_yaml` reads back to the same value."""
    return yaml.dump(content, Dumper=_YamlDumper, sort_keys=False, default_flow_style=None, width=120)


def read_yaml(text: str, where: str, plain: bool = False) -> Any:
    """Parse YAML text.

    Args:
        where: origin of the text, for the error message.
        plain: every value and key is text, as it stands there.

    Raises:
        SettingsError: the text is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_TextLoader if plain else _YamlLoader)  # noqa: S506  (a SafeLoader subclass)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:SHOWN]
        raise SettingsError(f"{' '.join(where.split())}: not valid YAML: {reason}") from None


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read the sections of a settings file; an empty file has none.

    Raises:
        SettingsError: the file cannot be read or is not a mapping.
    """
    try:
        content = read_yaml(read_bounded(path).decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} cannot be read: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a mapping of sections, is a {type(content).__name__}")
    return content
